"""Tests of `bnres.models.summarize` and ``bnres summary``: a row for each child, and a total."""

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import bnres
from bnres import cli, models

runner = CliRunner()


# The kernels' interpreter is slow, and other tests cover the kernels.
pytestmark = pytest.mark.usefixtures("aten")


def lines(text):
    """Returns the words of each line."""
    return [line.split() for line in text.splitlines()]


def test_resnet18(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")  # lines longer than the terminal are not wrapped
    result = runner.invoke(cli.app, ["summary", "resnet18", "--input", "2x3x64x64"])
    assert result.exit_code == 0, result.output
    assert lines(result.output) == [
        ["stage", "class", "output", "parameters"],
        ["conv1", "StemConv2d", "2x64x32x32", "9,408"],
        ["bn1", "BatchNormActMaxPool2d", "2x64x16x16", "128"],
        ["relu", "Identity", "2x64x16x16", "0"],
        ["maxpool", "Identity", "2x64x16x16", "0"],
        ["layer1", "Chain", "2x64x16x16", "147,968"],
        ["layer2", "Chain", "2x128x8x8", "525,568"],
        ["layer3", "Chain", "2x256x4x4", "2,099,712"],
        ["layer4", "Chain", "2x512x2x2", "8,393,728"],
        ["avgpool", "AdaptiveAvgPool2d", "2x512x1x1", "0"],
        ["flatten", "Flatten", "2x512", "0"],
        ["fc", "Linear", "2x1000", "513,000"],
        ["total", "ResNet", "2x1000", "11,689,512"],
    ]


def test_resnet18_seed():
    stages = models.summarize(models.resnet18_seed(), (1, 1, 224, 224)).stages
    assert [(s.cls, s.shape) for s in stages] == [
        ("Sequential", (1, 64, 56, 56)),
        ("Sequential", (1, 64, 56, 56)),
        ("Sequential", (1, 128, 28, 28)),
        ("Sequential", (1, 256, 14, 14)),
        ("Sequential", (1, 512, 7, 7)),
        ("AdaptiveAvgPool2d", (1, 512, 1, 1)),
        ("Flatten", (1, 512)),
        ("Linear", (1, 10)),
    ]


class Pair(nn.Module):
    def forward(self, x):
        return x, x.mean()


class Odd(nn.Module):
    """A model with children that are called twice or never, share a module, or return a tuple."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.unused = nn.Linear(2, 2)
        self.blocks = nn.ModuleList([nn.Linear(2, 2)])
        self.none = None
        self.pool = nn.AvgPool2d(2)
        self.act = nn.ReLU()
        self.pair = Pair()
        self.conv = self.same = nn.Conv2d(3, 3, 1)
        self.a_rather_long_name_of_a_stage_that_is_not_to_be_wrapped_or_cut = nn.Flatten()

    def forward(self, x):
        x = self.act(self.act(self.conv(x * self.scale[:, None, None])))
        x, _ = self.pair(self.pool(self.pool(x)))
        return {"y": self.a_rather_long_name_of_a_stage_that_is_not_to_be_wrapped_or_cut(x)}


def test_every_child_has_a_row():
    found = models.summarize(Odd(), (1, 3, 8, 8))
    long = "a_rather_long_name_of_a_stage_that_is_not_to_be_wrapped_or_cut"
    assert [(s.name, s.shape, s.parameters, s.note) for s in [*found.stages, found.total]] == [
        ("conv", (1, 3, 8, 8), 12, ""),
        ("same", (1, 3, 8, 8), 12, "the same module as conv"),
        ("act", (1, 3, 8, 8), 0, "called 2 times"),
        ("pool", (1, 3, 4, 4), 0, "called 2 times, outputs 1x3x2x2, 1x3x4x4"),
        ("pair", None, 0, "returns tuple: 1x3x2x2, scalar"),
        (long, (1, 12), 0, ""),
        ("unused", None, 6, "not called"),
        ("blocks", None, 6, "has no forward"),
        ("-", None, 3, "parameters outside of the stages"),
        ("total", None, 27, "returns dict"),
    ]
    assert str(found).splitlines()[5] == (
        f"{'pair':<{len(long)}}  Pair        {'-':<7}  {'0':>10}  returns tuple: 1x3x2x2, scalar"
    )


def test_modes_and_hooks_of_the_model_are_restored():
    model = Odd().train()
    model.pool.eval()
    models.summarize(model, (1, 3, 8, 8))
    assert model.training and not model.pool.training
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_without_children():
    found = models.summarize(nn.Linear(3, 2), (4, 3))
    assert str(found).splitlines()[-1].split() == ["total", "Linear", "4x2", "8"]


@pytest.mark.parametrize(
    ("name", "sites", "total"),
    [
        ("tests.own_models:by_chans", 2, ["Net", "2x5", "885"]),
        # The factory has no default number of classes, so the commands pass 1000.
        ("tests.own_models:Net", 2, ["Net", "2x1000", "9,840"]),
        ("timm:resnet18", 20, ["ResNet", "2x1000", "11,689,512"]),
        ("torchvision:resnet18", 20, ["ResNet", "2x1000", "11,689,512"]),
    ],
)
@pytest.mark.parametrize("command", ["summary", "explain"])
def test_models_of_factories(command, name, sites, total):
    import benchmarks.torchvision_import  # noqa: F401

    result = runner.invoke(cli.app, [command, name, "--input", "2x3x32x32"])
    assert result.exit_code == 0, result.output
    last = result.output.splitlines()[-1]
    if command == "summary":
        assert last.split() == ["total", *total]
    else:
        assert last == f"{sites} of {sites} batch norms are fused"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["resnet18", "--input", "3x224"],
         "input must be four sizes such as 1x3x224x224, got '3x224'"),
        (["resnet18", "--input", "²x3x8x8"],
         "input must be four sizes such as 1x3x224x224, got '²x3x8x8'"),
        (["lenet-seed", "--input", "2x1x40x40"], "the model does not accept inputs of 2x1x40x40: "
         "mat1 and mat2 shapes cannot be multiplied (2x784 and 256x120)"),
        (["tests.own_models:missing"], "model: module 'tests.own_models' has no 'missing'"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)  # fmt: skip
@pytest.mark.parametrize("command", ["summary", "explain"])
def test_bad_input_is_one_line(command, arguments, line):
    result = runner.invoke(cli.app, [command, *arguments])
    assert (result.exit_code, result.stderr) == (2, f"bnres: {line}\n")


def test_fused_models_show_their_stages():
    """No stage has the note "not called".

    The hooks of `summarize` run in a fused model, because they are added before its first call.
    """
    found = models.summarize(bnres.fuse(models.resnet18(fused=False)), (1, 3, 32, 32))
    assert [s.note for s in found.stages] == [""] * 11

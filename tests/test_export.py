"""Tests that exported and traced layers contain only torch's operators and load without bnres."""

import subprocess
import sys
import warnings

import pytest
import torch

from bnres import nn
from bnres.models import create_model
from bnres.models.blocks import BasicBlock
from tests.device import DEVICE
from tests.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("route")
IMAGES = (3, 2, 4, 4)


class TwoNorms(torch.nn.Module):
    """A model with a batch norm on the residual, and a forked output."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.BatchNormAct2d(2), nn.BatchNorm2d(2)

    def forward(self, x):
        y, fork = self.one(x, x.sin(), residual_norm=self.two, fork=True)
        return y + 2 * fork


MODELS = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(2), (4, 2)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(2), (3, 2, 1, 2, 2)),
    "BatchNormAct2d": (lambda: nn.BatchNormAct2d(2, act_layer="silu"), IMAGES),
    "cumulative": (lambda: nn.BatchNormAct2d(2, momentum=None), IMAGES),
    "BatchNormActMaxPool2d": (lambda: nn.BatchNormActMaxPool2d(2, 2), IMAGES),
    "ConvBatchNormAct2d": (lambda: nn.ConvBatchNormAct2d(2, 2, 3, bias=True), IMAGES),
    "two norms": (TwoNorms, IMAGES),
    "block": (lambda: BasicBlock(2, 4, 2), IMAGES),
    "lenet-seed": (lambda: create_model("lenet-seed"), (2, 1, 28, 28)),
}


def model_of(name, training=False):
    """Returns a model in fp64 with random statistics and parameters, and an input for it."""
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model = make().to(DEVICE, torch.float64)
    for t in (*model.parameters(), *model.buffers()):
        if t.is_floating_point() and t.dim() == 1:
            t.data.uniform_(0.5, 1.5)
    return model.train(training), torch.rand(shape, dtype=torch.float64, device=DEVICE)


@pytest.mark.parametrize(
    "strict", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["default", "strict"]
)
@pytest.mark.parametrize("name", MODELS)
def test_export(name, strict):
    model, x = model_of(name)
    batch = {0: torch.export.Dim("batch", min=2, max=1024)}
    program = torch.export.export(model, (x,), dynamic_shapes=(batch,), strict=strict)
    assert "bnres" not in str(program.graph)
    assert not program.run_decompositions().graph_signature.buffers_to_mutate
    for inputs in (x, torch.cat([x, x * 2])):
        assert_close(program.module()(inputs), model(inputs), torch.float64)


@pytest.mark.parametrize("name", MODELS)
def test_export_in_training(name):
    model, x = model_of(name, training=True)
    program = torch.export.export(model, (x,))
    assert "bnres" not in str(program.graph)
    found, expected = program.module(), model
    for _ in range(2):
        assert_close(found(x), expected(x), torch.float64)
    for key, buffer in expected.named_buffers():
        assert_close(found.get_buffer(key), buffer, torch.float64)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_trace(name, training):
    model, x = model_of(name, training)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        traced = torch.jit.trace(model, (x,), check_trace=False)
    kinds = {node.kind().split("::")[0] for node in traced.inlined_graph.nodes()}
    assert kinds <= {"aten", "prim"}
    other = torch.cat([x, x * 2])
    if training:
        for key, buffer in model_of(name, training)[0].named_buffers():
            traced.get_buffer(key).copy_(buffer)
        model = model_of(name, training)[0]
    assert_close(traced(other), model(other), torch.float64)
    for key, buffer in model.named_buffers():
        assert_close(traced.get_buffer(key), buffer, torch.float64)


@pytest.mark.parametrize("name", ["BatchNormAct2d", "BatchNormActMaxPool2d", "block"])
def test_trace_does_not_warn(name):
    model, x = model_of(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        torch.jit.trace(model, (x,), check_trace=False)


WITHOUT_BNRES = """
import sys
import torch

sys.modules["bnres"] = None
x, expected = torch.load("tensors.pt")
for model in (torch.export.load("exported.pt2").module(), torch.jit.load("traced.pt")):
    torch.testing.assert_close(model(x), expected)
"""


def test_archives_load_without_bnres(tmp_path):
    model, x = model_of("lenet-seed")
    torch.save((x, model(x).detach()), tmp_path / "tensors.pt")
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "exported.pt2")
    torch.jit.trace(model, (x,)).save(tmp_path / "traced.pt")
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_BNRES], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("dynamo", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MODELS)
def test_onnx(name, dynamo, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="runs the exported file")
    pytest.importorskip("onnxscript", reason="torch.onnx needs it to export")
    model, x = model_of(name)
    # The model is put into a Sequential, because the older exporter passes the root module's
    # keyword-only arguments by position.
    model, x = torch.nn.Sequential(model).eval().float().cpu(), x.float().cpu()
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (x,), path, dynamo=dynamo, input_names=["x"], verbose=False)
    (found,) = runtime.InferenceSession(path).run(None, {"x": x.numpy()})
    expected = model.to(DEVICE)(x.to(DEVICE)).detach().cpu()
    assert_close(torch.from_numpy(found), expected.double(), torch.float32)

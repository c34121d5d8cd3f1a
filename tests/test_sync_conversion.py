"""Tests the conversion of batch norms to synchronised batch norms and back, in one process."""

import copy
import importlib
import pickle

import pytest
import torch
from torch import nn

import benchmarks.torchvision_import  # noqa: F401
import bnres
from bnres.functional import sync_batch_norm_act
from bnres.models import blocks, layers
from bnres.nn.sync import convert_sync_batchnorm, revert_sync_batchnorm

timm = importlib.import_module("timm.layers.norm_act")  # only after torchvision_import
torchs_converter = nn.SyncBatchNorm.convert_sync_batchnorm

OURS = [
    *(getattr(bnres.nn, f"BatchNorm{act}{d}d")(3) for act in ("", "Act") for d in (1, 2, 3)),
    bnres.nn.BatchNormActMaxPool2d(3, 3, 2, 1),
    bnres.nn.SyncBatchNorm(3),
    bnres.nn.SyncBatchNormAct(3),
    bnres.nn.SyncBatchNormActMaxPool2d(3, 3, 2, 1),
    bnres.nn.ConvBatchNormAct2d(3, 3, 1),
]
STOCK = [nn.BatchNorm1d(3), nn.BatchNorm2d(3), nn.BatchNorm3d(3), nn.SyncBatchNorm(3)]
TIMMS = [
    timm.BatchNormAct2d(3),
    timm.BatchNormAct2d(3, act_layer=nn.LeakyReLU, act_kwargs={"negative_slope": 0.3}),
    timm.BatchNormAct2d(3, apply_act=False),
    # Our operation does not compute the activation of these two modules. The first uses timm's own
    # class of gelu. The second has a layer between batch norm and activation.
    timm.BatchNormAct2d(3, act_layer="gelu"),
    timm.BatchNormAct2d(3, drop_layer=nn.Tanh, inplace=False),
]


def small_net():
    norm_act = layers.stock_norm_act
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), *norm_act(4, pool=nn.MaxPool2d(3, 2, 1)),
        blocks.BasicBlock(4, 6, norm_act=norm_act),
    )  # fmt: skip


def name_of(module):
    return type(module).__name__


def input_for(module):
    dims = 3 if name_of(module).endswith("1d") else 5 if name_of(module).endswith("3d") else 4
    return torch.randn(4, 3, *[6] * (dims - 2), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "convert", [torchs_converter, timm.convert_sync_batchnorm], ids=["torch", "timm"]
)
@pytest.mark.parametrize("module", OURS, ids=name_of)
def test_other_converters_refuse_our_modules(module, convert):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), copy.deepcopy(module))
    with pytest.raises(TypeError, match=r"convert it with bnres\.convert_sync_batchnorm"):
        convert(model)
    assert type(model[1]) is type(module)
    assert list(model.named_children())[1][1] is model[1]


def test_torchs_converter_takes_fused_models():
    model, x = small_net(), torch.randn(4, 3, 8, 8)
    expected = [copy.deepcopy(model)(x), copy.deepcopy(model).eval()(x)]
    fused = bnres.fuse(model)
    fused(x[:2])
    fused.load_state_dict(model.state_dict())
    fused = torchs_converter(fused)
    found = [fused(x), fused.load_state_dict(model.state_dict()) and fused.eval()(x)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def steps(module, x):
    """Returns the outputs in training and in evaluation, the gradients, and the state dict."""
    module = copy.deepcopy(module)
    y = module(x)
    y.square().sum().backward()
    gradients = [p.grad for p in module.parameters()]
    return [y, module.eval()(x), *gradients, *module.state_dict().values()]


@pytest.mark.parametrize("module", [*OURS, *STOCK, *TIMMS], ids=name_of)
def test_a_conversion_keeps_everything_and_is_undone(module):
    module = copy.deepcopy(module)
    for i, tensor in enumerate(module.state_dict().values()):
        tensor.add_(i)
    x, calls = input_for(module), []
    with bnres.use_backend("aten"):
        before = steps(module, x)
        cls, state, fields = type(module), module.state_dict(), set(vars(module))
        handle = module.register_forward_hook(lambda *_: calls.append(1))
        hooks = dict(module._forward_hooks)
        for mode in (True, False):
            assert convert_sync_batchnorm(module.train(mode)) is module
            assert module.training is mode and module._forward_hooks == hooks
            assert list(module.state_dict()) == list(state)
            assert all(module.state_dict()[k].data_ptr() == t.data_ptr() for k, t in state.items())
            synchronised = [m for m in module.modules() if getattr(m, "synchronises", False)]
            assert len(synchronised) == 1
            # There is no process group, so the module normalises with this process's batch.
            for each in (module, pickle.loads(pickle.dumps(strip(module)))):
                for a, b in zip(steps(each.train(), x), before, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
            if name_of(module).startswith("Sync") and cls.__name__.startswith("Sync"):
                break
            assert revert_sync_batchnorm(module) is module
            assert type(module) is cls and set(vars(module)) == fields
        handle.remove()
    assert len(calls) > 0


def strip(module):
    """Returns a copy without forward hooks, because hooks can't be pickled."""
    twin = copy.deepcopy(module)
    twin._forward_hooks.clear()
    return twin


def test_activations_stay_in_the_operation():
    kinds = [type(convert_sync_batchnorm(copy.deepcopy(m))).__name__ for m in TIMMS]
    assert kinds == 3 * ["SyncBatchNormAct"] + 2 * ["_SyncBatchNormThenAct"]
    block = convert_sync_batchnorm(blocks.BasicBlock(3, 6, 2))
    norms = [m for m in block.modules() if getattr(m, "synchronises", False)]
    assert [m.act for m in norms] == ["relu", "relu", None]


class OwnForward(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input) * 2


class OwnName(nn.BatchNorm2d):
    pass


def test_bad_input():
    model = nn.Sequential(nn.BatchNorm2d(3), OwnForward(3))
    with pytest.raises(TypeError, match=r"module contains 1, a OwnForward: its forward"):
        convert_sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm2d
    with pytest.raises(TypeError, match="LazyBatchNorm2d"):
        convert_sync_batchnorm(nn.LazyBatchNorm2d())
    assert type(convert_sync_batchnorm(OwnName(3))) is bnres.nn.SyncBatchNorm
    for function in (convert_sync_batchnorm, revert_sync_batchnorm):
        with pytest.raises(TypeError, match=r"module must be a torch.nn.Module, got int"):
            function(3)
    with pytest.raises(TypeError, match=r"process_group must be a torch.distributed.ProcessGroup"):
        bnres.nn.SyncBatchNorm(3, process_group=3)
    with pytest.raises(RuntimeError, match=r"process_group: there is no default group"):
        sync_batch_norm_act(torch.randn(2, 3), None, None)


def test_fold_takes_converted_models():
    stock, x = small_net(), torch.randn(2, 3, 8, 8)
    stock(x)
    folded = bnres.fold(convert_sync_batchnorm(copy.deepcopy(stock)).eval(), x)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
    torch.testing.assert_close(folded(x), stock.eval()(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "convert", [convert_sync_batchnorm, torchs_converter], ids=["ours", "torchs"]
)
def test_fused_models_without_a_group(convert):
    model, x = convert(small_net()), torch.randn(2, 3, 8, 8)
    fused = bnres.fuse(model)
    with bnres.use_backend("aten"):
        report = bnres.explain(model, x)
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)
    assert len(report.fused) == len(report.sites) == 4
    twin, unfused = copy.deepcopy(fused), bnres.unfuse(fused, inplace=True)
    assert type(twin[1]) is type(unfused[1]) is type(model[1])
    if convert is torchs_converter:
        assert type(bnres.fuse(model)[1]) is not nn.SyncBatchNorm
        traced = torch.fx.symbolic_trace(bnres.fuse(nn.Sequential(nn.SyncBatchNorm(3))))
        assert [n.op for n in traced.graph.nodes] == ["placeholder", "call_module", "output"]

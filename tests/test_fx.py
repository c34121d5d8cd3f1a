"""Tests that torch.fx traces each of our layers as one node, like torch's layers."""

import copy
import pickle

import pytest
import torch
from torch import fx

from bnres import nn, use_backend
from bnres.models import create_model, resnet18
from bnres.models.blocks import BasicBlock
from bnres.models.chain import Chain
from tests.device import DEVICE
from tests.steps import assert_same_steps
from tests.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("route")
IMAGES = (3, 2, 4, 4)
LAYERS = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(2), (4, 2)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(2), IMAGES),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(2), (3, 2, 1, 2, 2)),
    "BatchNormAct1d": (lambda: nn.BatchNormAct1d(2, act_layer="silu"), (4, 2, 3)),
    "BatchNormAct2d": (lambda: nn.BatchNormAct2d(2), IMAGES),
    "BatchNormAct3d": (lambda: nn.BatchNormAct3d(2), (3, 2, 1, 2, 2)),
    "BatchNormActMaxPool2d": (lambda: nn.BatchNormActMaxPool2d(2, 2), IMAGES),
    "ConvBatchNormAct2d": (lambda: nn.ConvBatchNormAct2d(2, 2, 3, bias=True), IMAGES),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_a_node(name):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    model = torch.nn.Sequential(make()).to(DEVICE, torch.float64)
    traced = fx.symbolic_trace(copy.deepcopy(model))
    assert [(node.op, node.target) for node in traced.graph.nodes][1:-1] == [("call_module", "0")]
    assert type(traced.get_submodule("0")) is type(model[0])
    assert_same_steps(traced, model, torch.randn(shape, dtype=torch.float64, device=DEVICE))


def test_hook_runs_once_a_call():
    torch.manual_seed(0)
    layer = nn.BatchNormAct2d(2).to(DEVICE)
    layer.register_forward_hook(lambda module, args, y: y + 1)
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    traced = fx.symbolic_trace(torch.nn.Sequential(layer.eval()))
    x = torch.randn(IMAGES, device=DEVICE)
    assert torch.equal(traced(x), layer(x))


def test_residual_is_an_argument_and_copies_are_leaves():
    """A layer is traced as one node that has the residual as an argument.

    A copy of the layer, and a layer loaded from a pickle, are traced in the same way.
    """

    class Net(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x, x)

    layer = nn.BatchNormAct2d(2)
    assert type(layer).__module__ == "bnres.nn.batchnorm"
    for other in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        model = Net(other).to(DEVICE, torch.float64)
        x = torch.randn(IMAGES, dtype=torch.float64, device=DEVICE)
        assert_same_steps(fx.symbolic_trace(copy.deepcopy(model)), model, x)


def test_chain():
    """The blocks of a chain return two tensors. While the chain is traced, they return one."""
    torch.manual_seed(0)
    model = Chain(BasicBlock(2, 4, 2), BasicBlock(4, 4)).to(DEVICE, torch.float64)
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64, device=DEVICE)
    assert_same_steps(fx.symbolic_trace(copy.deepcopy(model)), model, x)


@pytest.mark.parametrize("name", ["lenet-seed", "resnet18-seed-cifar"])
def test_models_of_the_course(name):
    torch.manual_seed(0)
    model = create_model(name).to(DEVICE, torch.float64).eval()
    shape = (2, 1, 28, 28) if name == "lenet-seed" else (2, 3, 8, 8)
    x = torch.rand(shape, dtype=torch.float64, device=DEVICE)
    with use_backend("aten"):
        assert_close(fx.symbolic_trace(model)(x), model(x), torch.float64)


def test_resnet_and_its_features():
    from benchmarks.torchvision_import import torchvision  # noqa: F401, before torchvision's own modules

    from torchvision.models.feature_extraction import create_feature_extractor  # isort: skip

    torch.manual_seed(0)
    model = resnet18(5).to(DEVICE, torch.float64)
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64, device=DEVICE)
    expected = {}
    for name in ("layer1", "layer4"):
        model.get_submodule(name).register_forward_hook(
            lambda module, args, y, name=name: expected.update({name: y})
        )
    with use_backend("aten"):
        assert_same_steps(fx.symbolic_trace(copy.deepcopy(model)), model, x)
        features = create_feature_extractor(copy.deepcopy(model), ["layer1", "layer4"])
        for training in (True, False):
            found = features.train(training)(x)
            model.train(training)(x)
            assert list(found) == ["layer1", "layer4"]
            for name, y in found.items():
                assert_close(y, expected[name], torch.float64)

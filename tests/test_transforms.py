"""Tests that a layer under `torch.func`'s transforms has the same results as without them."""

import copy

import pytest
import torch
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils._pytree import tree_leaves, tree_map

from bnres import nn, use_backend
from bnres.functional import BatchNormState, batch_norm_act
from bnres.models import create_model
from tests.device import DEVICE
from tests.tolerances import assert_close

ROUTES = ("aten", "triton-interpreter" if DEVICE == "cpu" else "triton")
IMAGES = (3, 2, 4, 4)
# For each layer, a function that makes the layer, and the shape of the layer's input.
LAYERS = {
    "BatchNorm1d": (lambda **o: nn.BatchNorm1d(2, **o), (5, 2)),
    "BatchNorm3d": (lambda **o: nn.BatchNorm3d(2, **o), (3, 2, 2, 1, 2)),
    "BatchNormAct2d": (lambda **o: nn.BatchNormAct2d(2, act_layer="silu", **o), IMAGES),
    "cumulative": (lambda **o: nn.BatchNormAct2d(2, momentum=None, **o), IMAGES),
    "BatchNormActMaxPool2d": (lambda **o: nn.BatchNormActMaxPool2d(2, 2, **o), IMAGES),
    "ConvBatchNormAct2d": (lambda **o: nn.ConvBatchNormAct2d(2, 2, 3, bias=True, **o), IMAGES),
}
MODES = ("train", "untracked", "eval")


@pytest.fixture(params=ROUTES, autouse=True)
def route(request):
    with use_backend(request.param):
        yield request.param


def layer_of(name, mode, seed=0):
    """Returns a layer in fp64 with random parameters and statistics."""
    torch.manual_seed(seed)
    make, _ = LAYERS[name]
    layer = make(track_running_stats=mode != "untracked", dtype=torch.float64, device=DEVICE)
    for t in (*layer.parameters(), *layer.buffers()):
        if t.is_floating_point():
            t.data.uniform_(0.5, 1.5)
    return layer.train(mode != "eval")


def inputs_of(name, count=3):
    torch.manual_seed(9)
    return torch.randn(count, *LAYERS[name][1], dtype=torch.float64, device=DEVICE)


def assert_all_close(found, expected):
    pairs = zip(tree_leaves(found), tree_leaves(expected), strict=True)
    for actual, other in pairs:
        assert_close(actual, other, torch.float64)


def stacked(results):
    """Stacks the corresponding tensors of several nested structures."""
    return tree_map(lambda *leaves: torch.stack(leaves), *results)


@pytest.mark.parametrize("with_grad", [True, False])
@pytest.mark.parametrize("mode", ["untracked", "eval"])
@pytest.mark.parametrize("name", LAYERS)
def test_vmap_equals_a_loop(name, mode, with_grad):
    layer, xs = layer_of(name, mode), inputs_of(name)
    with torch.set_grad_enabled(with_grad):
        expected = stacked([layer(x) for x in xs])
        assert_all_close(vmap(layer)(xs), expected)
        by_last = vmap(layer, in_dims=-1, out_dims=1, randomness="different", chunk_size=2)
        assert_all_close(by_last(xs.movedim(0, -1)).movedim(1, 0), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_vmap_with_unbatched_statistics_raises_torchs_error(name):
    layer, stock, xs = layer_of(name, "train"), torch.nn.BatchNorm1d(2), torch.randn(3, 5, 2)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match="were not batched") as torchs:
        vmap(stock)(xs)
    with pytest.raises(RuntimeError) as ours:
        vmap(layer)(inputs_of(name))
    assert str(ours.value) == str(torchs.value)
    assert all(torch.equal(t, before[key]) for key, t in layer.state_dict().items())


@pytest.mark.parametrize("mapped", ["x", "residual"])
def test_vmap_over_only_the_input_or_the_residual_writes_no_statistics(mapped):
    one, two = (layer_of("BatchNormAct2d", "train", seed) for seed in (0, 1))
    before = copy.deepcopy([one.state_dict(), two.state_dict()])
    xs = inputs_of("BatchNormAct2d")
    with pytest.raises(RuntimeError, match="were not batched"):
        vmap(lambda x: one(*((x, xs[0]) if mapped == "x" else (xs[0], x)), residual_norm=two))(xs)
    assert_all_close([one.state_dict(), two.state_dict()], before)


@pytest.mark.parametrize("levels", ["inner", "outer"])
def test_vmap_of_vmap(levels):
    """Nested vmaps equal nested loops. Statistics mapped by only one vmap raise an error."""
    layer = layer_of("BatchNormAct2d", "untracked")
    xs = torch.stack([inputs_of("BatchNormAct2d"), inputs_of("BatchNormAct2d").exp()])
    expected = torch.stack([torch.stack([layer(x) for x in row]) for row in xs])
    assert_all_close(vmap(vmap(layer))(xs), expected)
    means = torch.zeros(2 if levels == "outer" else 3, 2, dtype=torch.float64, device=DEVICE)

    def train(x, mean):
        return batch_norm_act(x, mean, None, training=True)

    inner = (0, 0) if levels == "inner" else (0, None)
    outer = (0, 0) if levels == "outer" else (0, None)
    with pytest.raises(RuntimeError, match="were not batched"):
        vmap(vmap(train, inner), outer)(xs, means)
    assert means.abs().max() == 0


def test_vmap_over_the_residual_only():
    xs, layer = inputs_of("BatchNormAct2d"), layer_of("BatchNormAct2d", "eval")
    with torch.no_grad():
        found = vmap(lambda residual: layer(xs[0], residual))(xs)
        assert_all_close(found, torch.stack([layer(xs[0], x) for x in xs]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LAYERS)
def test_ensemble(name, mode):
    """A vmap over the stacked states of several layers equals separate calls of the layers.

    Outputs, gradients and updated statistics are compared.
    """
    layers = [layer_of(name, mode, seed) for seed in range(3)]
    xs, base = inputs_of(name), layer_of(name, mode)
    parameters, buffers = stack_module_state(layers)
    before = copy.deepcopy(base.state_dict())

    def loss(parameters, buffers, x):
        y = functional_call(base, (parameters, buffers), (x,))
        return y.square().sum(), y

    found, ys = vmap(grad(loss, has_aux=True))(parameters, buffers, xs)
    expected = stacked([layer(x) for layer, x in zip(layers, xs, strict=True)])
    assert_all_close(ys, expected)
    expected.square().sum().backward()
    named = [dict(layer.named_parameters()) for layer in layers]
    assert_all_close(found, {key: torch.stack([p[key].grad for p in named]) for key in found})
    named = [dict(layer.named_buffers()) for layer in layers]
    assert_all_close(buffers, {key: torch.stack([b[key] for b in named]) for key in buffers})
    assert_all_close(base.state_dict(), before)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_each_sample(name):
    layer, xs = layer_of(name, "eval"), inputs_of(name)[0]
    parameters, buffers = dict(layer.named_parameters()), dict(layer.named_buffers())

    def loss(parameters, x):
        return functional_call(layer, (parameters, buffers), (x[None],)).square().sum()

    found = vmap(grad(loss), (None, 0))(parameters, xs)
    expected = []
    for x in xs:
        of_x = torch.autograd.grad(layer(x[None]).square().sum(), list(parameters.values()))
        expected.append(dict(zip(parameters, of_x, strict=True)))
    assert_all_close(found, stacked(expected))
    of_sum = grad(lambda parameters: vmap(loss, (None, 0))(parameters, xs).sum())(parameters)
    assert_all_close(of_sum, tree_map(lambda t: t.sum(0), stacked(expected)))


def test_vmap_over_functions():
    """The function has two norms and a fork. All of its arguments are mapped."""
    xs, others = inputs_of("BatchNormAct2d"), inputs_of("BatchNormAct2d").sin()
    weights = torch.rand(3, 2, dtype=torch.float64, device=DEVICE)

    def run(x, residual, weight):
        y, fork = batch_norm_act(
            x, None, None, weight, residual=residual, training=True, fork=True,
            residual_norm=BatchNormState(None, None, None, weight),
        )  # fmt: skip
        return y + 2 * fork

    expected = torch.stack([run(*given) for given in zip(xs, others, weights, strict=True)])
    assert_all_close(vmap(run)(xs, others, weights), expected)


@pytest.mark.parametrize("transform", ["call", "grad", "vjp", "jvp"])
@pytest.mark.parametrize("name", LAYERS)
def test_functional_call_updates_the_statistics_passed_to_it(name, transform):
    layer, own = layer_of(name, "train"), layer_of(name, "train", 1)
    before, x = copy.deepcopy(own.state_dict()), inputs_of(name)[0]
    # The parameters are copied, so that those of the module get no gradient.
    parameters = {key: p.detach().clone() for key, p in layer.named_parameters()}
    given = {key: b.clone() for key, b in layer.named_buffers()}

    def loss(x, parameters):
        # The buffers are copied, because a transform refuses writes to tensors from outside `loss`.
        buffers = tree_map(torch.clone, given)
        return functional_call(own, (parameters, buffers), (x,)).square().sum(), buffers

    leaf = x.clone().requires_grad_()
    expected = layer(leaf).square().sum()
    (dx,) = torch.autograd.grad(expected, leaf)
    if transform == "call":
        y, buffers = loss(x, parameters)
        assert_all_close(y, expected)
    elif transform == "grad":
        found, buffers = grad(loss, has_aux=True)(x, parameters)
        assert_all_close(found, dx)
    elif transform == "vjp":
        y, pullback, buffers = torch.func.vjp(loss, x, parameters, has_aux=True)
        assert_all_close((y, pullback(torch.ones_like(y))[0]), (expected, dx))
    else:
        tangents = (x.cos(), tree_map(torch.zeros_like, parameters))
        *found, buffers = torch.func.jvp(loss, (x, parameters), tangents, has_aux=True)
        assert_all_close(found, [expected, (dx * x.cos()).sum()])
    assert_all_close(buffers, dict(layer.named_buffers()))
    assert_all_close(own.state_dict(), before)


@pytest.mark.slow
def test_functional_call_of_a_model():
    torch.manual_seed(0)
    own, x = create_model("lenet-seed").to(DEVICE, torch.float64), torch.rand(2, 1, 28, 28)
    model, x = copy.deepcopy(own), x.to(DEVICE, torch.float64)
    before = copy.deepcopy(own.state_dict())
    state = {key: t.detach().clone() for key, t in model.state_dict().items()}
    parameters = {key: state[key] for key, _ in model.named_parameters()}

    def loss(parameters, state):
        return functional_call(own, {**state, **parameters}, (x,)).square().sum()

    found = grad(loss)(parameters, state)
    model(x).square().sum().backward()
    assert_all_close(found, {key: p.grad for key, p in model.named_parameters()})
    buffers = dict(model.named_buffers())
    assert_all_close({key: state[key] for key in buffers}, buffers)
    assert_all_close(own.state_dict(), before)

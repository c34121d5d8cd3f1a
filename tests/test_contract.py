"""Tests that modules behave like torch.nn.BatchNorm*, also in cases that broke other libraries."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bnres import functional, use_backend, use_conv_route
from bnres.functional import batch_norm_act
from bnres.kernels.reference import ACTIVATION_FORMULAS
from bnres.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormAct2d
from tests.device import DEVICE
from tests.tolerances import assert_close


def test_later_training_step_does_not_change_the_eval_gradient():
    torch.manual_seed(0)
    bn = BatchNorm2d(3).to(DEVICE)
    x = torch.randn(2, 3, 4, 4, device=DEVICE)
    bn.eval()
    rstd = (bn.running_var + bn.eps).rsqrt()
    evaluated = x.clone().requires_grad_()
    y = bn(evaluated)
    bn.train()
    bn(x * 5)
    y.sum().backward()
    expected = rstd.view(1, 3, 1, 1).expand_as(x)
    torch.testing.assert_close(evaluated.grad, expected, rtol=1e-6, atol=0)


def test_training_without_running_statistics_does_not_change_the_input():
    bn = BatchNorm2d(3, track_running_stats=False).to(DEVICE)
    x = torch.randn(2, 3, 4, 4, device=DEVICE)
    before = x.clone()
    y = bn(x)
    assert torch.equal(x, before)
    assert torch.equal(bn.eval()(x), y)
    assert list(bn.state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize(
    ("module", "shape", "words"),
    [
        (BatchNorm1d, (2, 3, 4, 5), r"expected 2D or 3D input \(got 4D input\)"),
        (BatchNorm2d, (2, 3, 4), r"expected 4D input \(got 3D input\)"),
        (BatchNorm3d, (2, 3, 4, 5), r"expected 5D input \(got 4D input\)"),
        (BatchNorm2d, (1, 3, 1, 1), "Expected more than 1 value per channel when training"),
    ],
)
def test_errors_are_the_same_as_in_torch(module, shape, words):
    with pytest.raises(ValueError, match=words):
        module(3).to(DEVICE)(torch.zeros(shape, device=DEVICE))


def test_two_forwards_then_backward():
    torch.manual_seed(1)
    bn, stock = BatchNormAct2d(3).to(DEVICE), torch.nn.BatchNorm2d(3).to(DEVICE)
    a, b = (torch.randn(2, 3, 4, 4, device=DEVICE) for _ in range(2))
    (bn(a).sum() + bn(b).square().sum()).backward()
    (stock(a).relu().sum() + stock(b).relu().square().sum()).backward()
    torch.testing.assert_close(bn.weight.grad, stock.weight.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bn.running_var, stock.running_var, rtol=1e-6, atol=1e-7)


def test_frozen_layer_in_a_training_model():
    torch.manual_seed(2)
    bn = BatchNormAct2d(3).to(DEVICE).eval()
    bn.weight.requires_grad_(False)
    x = torch.randn(2, 3, 4, 4, device=DEVICE, requires_grad=True)
    bn(x).sum().backward()
    assert bn.weight.grad is None
    assert torch.equal(bn.running_mean, torch.zeros(3, device=DEVICE))
    expected = (x > 0).float() * (1 + bn.eps) ** -0.5
    torch.testing.assert_close(x.grad, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", [None, "aten"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("parameters", [torch.float32, None], ids=["fp32", "same"])
def test_mixed_dtypes(dtype, parameters, backend):
    torch.manual_seed(3)
    bn = BatchNormAct2d(3, dtype=parameters or dtype).to(DEVICE)
    x = torch.randn(4, 3, 5, 5, device=DEVICE).to(dtype).requires_grad_()
    with use_backend(backend) if backend else nullcontext():
        y = bn(x)
        y.sum().backward()
    z = torch.nn.functional.batch_norm(x.detach().double(), None, None, training=True)
    assert y.dtype == dtype and x.grad.dtype == dtype
    assert bn.weight.grad.dtype == bn.running_var.dtype == (parameters or dtype)
    assert_close(y, z.relu(), dtype)


def test_residual_of_another_dtype_promotes_as_addition_does():
    x = torch.randn(2, 3, 4, 4, device=DEVICE).bfloat16()
    residual = torch.randn(2, 3, 4, 4, device=DEVICE)
    y = BatchNormAct2d(3).to(DEVICE)(x, residual)
    z = torch.nn.functional.batch_norm(x.double(), None, None, training=True) + residual
    assert y.dtype == torch.float32
    assert_close(y, z.relu(), torch.float32)


@pytest.mark.parametrize("kind", ["expanded", "other layout", "strided"])
def test_gradient_in_any_layout(kind):
    torch.manual_seed(4)
    x = torch.randn(2, 4, 3, 3, device=DEVICE)
    dy = {
        "expanded": torch.ones((), device=DEVICE).expand_as(x),
        "other layout": torch.randn_like(x).contiguous(memory_format=torch.channels_last),
        "strided": torch.randn(2, 4, 3, 6, device=DEVICE)[..., ::2],
    }[kind]
    grads = []
    for bn in (BatchNormAct2d(4).to(DEVICE), torch.nn.BatchNorm2d(4).to(DEVICE)):
        leaf = x.clone().requires_grad_()
        y = bn(leaf) if isinstance(bn, BatchNormAct2d) else bn(leaf).relu()
        grads.append(torch.autograd.grad(y, leaf, dy)[0])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_saved_tensors_may_come_back_in_another_layout():
    torch.manual_seed(4)
    last = torch.channels_last
    x, residual = (torch.randn(3, 8, 5, 4, device=DEVICE).to(memory_format=last) for _ in "ab")
    bn = BatchNormAct2d(8).to(DEVICE)
    grads = []
    for hooks in (
        nullcontext(),
        torch.autograd.graph.saved_tensors_hooks(torch.Tensor.contiguous, lambda t: t),
    ):
        leaves = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
        with hooks:
            y = bn(*leaves)
        grads.append(torch.autograd.grad(y, (*leaves, bn.weight), x))
    assert all(map(torch.equal, *grads))


def test_strided_input():
    x = torch.randn(2, 6, 5, 4, device=DEVICE)
    bn = BatchNorm2d(6).to(DEVICE)
    for view in (x.transpose(2, 3), x.permute(0, 3, 2, 1)[:, :, :, ::2], x[:, :, ::2]):
        layer = bn if view.shape[1] == 6 else BatchNorm2d(view.shape[1]).to(DEVICE)
        expected = torch.nn.functional.batch_norm(view, None, None, training=True)
        torch.testing.assert_close(layer(view), expected, rtol=1e-4, atol=1e-5)


def test_tracking_turned_off_after_construction():
    bn, stock = BatchNorm2d(3).to(DEVICE), torch.nn.BatchNorm2d(3).to(DEVICE)
    x = torch.randn(4, 3, 2, 2, device=DEVICE)
    for layer in (bn, stock):
        layer.track_running_stats = False
        layer(x)
    assert torch.equal(bn.running_mean, stock.running_mean)
    assert bn.num_batches_tracked == stock.num_batches_tracked == 0
    torch.testing.assert_close(bn.eval()(x), stock.eval()(x))


def test_version_1_state_dict_keeps_the_counter():
    bn = BatchNormAct2d(3)
    state = {k: v for k, v in bn.state_dict().items() if k != "num_batches_tracked"}
    bn.num_batches_tracked.fill_(7)
    state_dict = type(bn.state_dict())(state)
    bn.load_state_dict(state_dict)
    assert bn.num_batches_tracked == 7


@given(
    shape=st.lists(st.integers(1, 6), min_size=2, max_size=5),
    layout=st.permutations(range(5)),
    residual=st.booleans(),
    affine=st.booleans(),
    act=st.sampled_from(["relu", "silu", None]),
    seed=st.integers(0, 999),
)
@settings(max_examples=25, deadline=None)
def test_any_shape_stride_and_option(shape, layout, residual, affine, act, seed):
    torch.manual_seed(seed)
    shape = [max(shape[0], 2), *shape[1:]]
    order = [d for d in layout if d < len(shape)]
    x = torch.randn([shape[d] for d in order], device=DEVICE)
    x = x.permute([order.index(d) for d in range(len(shape))]).requires_grad_()
    r = torch.randn(shape, device=DEVICE) if residual else None
    weight, bias = (torch.randn(shape[1], device=DEVICE) if affine else None for _ in range(2))
    y = batch_norm_act(x, None, None, weight, bias, residual=r, act=act, training=True)
    wide = x.detach().double().requires_grad_()
    z = torch.nn.functional.batch_norm(
        wide, None, None, None if weight is None else weight.double(),
        None if bias is None else bias.double(), training=True, eps=1e-5,
    )  # fmt: skip
    z = z if r is None else z + r
    expected = ACTIVATION_FORMULAS[act or "identity"](z, 0.0)
    # If a channel's few values are nearly equal, rstd is large and magnifies errors.
    scale = (
        1 + x.detach().var([0, *range(2, len(shape))], correction=0).rsqrt().clamp(max=316).max()
    )
    assert (y - expected).abs().max() <= 3e-6 * scale * max(1.0, expected.abs().max())


def test_strided_parameters_and_buffers():
    torch.manual_seed(5)
    x = torch.randn(4, 3, 2, 2, device=DEVICE)
    table = torch.rand(4, 3, 2, device=DEVICE) + 0.5
    # The reference is on the CPU, because on a GPU torch may update a copy of a strided buffer
    # instead of the buffer.
    other = table.cpu().clone()
    results = []
    for function, source, t in (
        (functional.batch_norm, x, table),
        (torch.nn.functional.batch_norm, x.cpu(), other),
    ):
        y = function(
            source, t[0, :, 0], t[1, :, 0], t[2, :, 0], t[3, :1, 0].expand(3), training=True
        )
        results.append(y.cpu())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(table.cpu(), other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("name", ["residual shape", "no residual", "residual norm"])
def test_call_that_raises_changes_no_buffer(momentum, name):
    x = torch.randn(3, 4, 5, 2, device=DEVICE)
    bn, residual_norm = (BatchNormAct2d(4, momentum=momentum).to(DEVICE) for _ in "ab")
    arguments = {
        "residual shape": {"residual": x[..., :1]},
        "no residual": {"residual_norm": residual_norm},
        "residual norm": {
            "residual": x, "residual_norm": BatchNorm2d(5, momentum=momentum).to(DEVICE)
        },
    }[name]  # fmt: skip
    with pytest.raises((ValueError, RuntimeError), match="residual"):
        bn(x, **arguments)
    assert bn.num_batches_tracked == residual_norm.num_batches_tracked == 0
    assert not bn.running_mean.any() and (bn.running_var == 1).all()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"weight": torch.ones(4).cfloat()}, TypeError, "weight must be of a floating dtype, got"),
        ({"bias": torch.ones(4).long()}, TypeError, "bias must be of a floating dtype, got"),
        ({"weight": torch.ones(3)}, RuntimeError, "weight should contain 4 elements not 3"),
        ({"act": "mish"}, ValueError, "act must be one of"),
        ({"training": False}, RuntimeError, "running_var must be defined in evaluation mode"),
        ({"momentum": torch.ones(2)}, ValueError, "momentum must have one element, got 2"),
        ({"momentum": torch.ones((), device="meta")}, RuntimeError, "momentum is on meta, but"),
        (
            {"residual": torch.ones(())},
            ValueError,
            r"residual must have the shape \(3, 4",
        ),
    ],
)
def test_errors_name_the_argument_and_write_nothing(arguments, error, words):
    x, mean = torch.randn(3, 4, 5, 2, device=DEVICE), torch.zeros(4, device=DEVICE)
    counter = torch.tensor(0, device=DEVICE)
    given = {k: v.to(DEVICE) if getattr(v, "is_cpu", False) else v for k, v in arguments.items()}
    given = {"training": True, "num_batches_tracked": counter} | given
    with pytest.raises(error, match=words):
        batch_norm_act(x, mean, None, **given)
    assert counter == 0 and not mean.any()


@pytest.fixture(params=["aten", None], ids=["aten", "kernels"])
def backend(request):
    with use_backend(request.param) if request.param else nullcontext():
        yield


def norm_of(channels):
    statistics = torch.zeros(channels, device=DEVICE), torch.ones(channels, device=DEVICE)
    return functional.BatchNormState(*statistics, *(t.clone() for t in statistics))


CALLS = {
    "batch_norm": lambda x, training: functional.batch_norm(x, *norm_of(3)[:4], training=training),
    "act": lambda x, training: batch_norm_act(x, *norm_of(3)[:4], training=training),
    "no tensors": lambda x, training: batch_norm_act(x, None, None, training=training),
    "residual": lambda x, training: batch_norm_act(
        x, *norm_of(3)[:4], residual=x, training=training
    ),
    "residual norm": lambda x, training: batch_norm_act(
        x, *norm_of(3)[:4], residual=x, residual_norm=norm_of(3), training=training
    ),
    "pool": lambda x, training: functional.batch_norm_act_max_pool2d(
        x, *norm_of(3)[:4], kernel_size=2, training=training
    ),
    "dilated pool": lambda x, training: functional.batch_norm_act_max_pool2d(
        x, *norm_of(3)[:4], kernel_size=2, padding=1, dilation=2, training=training
    ),
    "conv": lambda x, training: functional.conv2d_batch_norm_act(
        x, torch.ones(3, 3, 1, 1, device=DEVICE), None, *norm_of(3)[:4], training=training
    ),
    "conv bias": lambda x, training: functional.conv2d_batch_norm_act(
        x, torch.ones(3, 3, 1, 1, device=DEVICE), torch.ones(3, device=DEVICE), *norm_of(3)[:4],
        training=training,
    ),
}  # fmt: skip
ONLY_4D = ("pool", "dilated pool", "conv", "conv bias")


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_wrong_number_of_input_dimensions(backend, name, training, needs_grad):
    for shape in [(), (0,), (3,), (0, 3), (3, 3, 3), (2, 3, 2, 2, 2), (2, 3, 2, 2, 2, 2)]:
        dims, expected = len(shape), "4D" if name in ONLY_4D else "2D to 5D"
        if 2 <= dims <= 5 and name not in ONLY_4D:
            continue
        x = torch.zeros(shape, device=DEVICE, requires_grad=needs_grad)
        with use_conv_route("kernel"), pytest.raises(ValueError) as caught:
            CALLS[name](x, training)
        assert str(caught.value) == f"expected {expected} input (got {dims}D input)"


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(), (0,), (3, 3), (3, 3, 1), (3, 3, 1, 1, 1)])
def test_wrong_number_of_filter_dimensions(backend, shape, training):
    x, filter = (torch.zeros(s, device=DEVICE) for s in ((2, 3, 2, 2), shape))
    words = rf"expected 4D conv_weight \(got {len(shape)}D conv_weight\)"
    for bias in (None, torch.zeros(3, device=DEVICE)):
        with use_conv_route("kernel"), pytest.raises(ValueError, match=words):
            functional.conv2d_batch_norm_act(x, filter, bias, *norm_of(3)[:4], training=training)


@pytest.mark.parametrize("of_residual", [False, True])
@pytest.mark.parametrize("shape", [(0,), (2,), (1, 3)])
def test_counter_must_have_one_element(backend, shape, of_residual):
    """If a counter were empty, kernels would write outside its memory."""
    x, counter = torch.randn(2, 3, 2, 2, device=DEVICE), torch.ones(shape, device=DEVICE).long()
    norm, residual_norm = norm_of(3), norm_of(3)
    prefix, name = "residual_" if of_residual else "", "num_batches_tracked"
    given = {} if of_residual else {name: counter}
    if of_residual:
        residual_norm = residual_norm._replace(num_batches_tracked=counter)
    with pytest.raises(
        ValueError, match=f"^{prefix}{name} must have one element, got {counter.numel()}"
    ):
        batch_norm_act(
            x, *norm[:4], residual=x, residual_norm=residual_norm, training=True, **given
        )  # fmt: skip
    assert (counter == 1).all() and not norm.running_mean.any()

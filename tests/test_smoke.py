"""Compares every kernel with its reference, in every dtype and layout (``pytest -m smoke``)."""

import ast
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_map

from bnres import augment, use_backend
from bnres.kernels import augment as augment_kernels
from bnres.kernels import bn_backward, bn_forward, bn_max_pool, conv, reference
from bnres.kernels.config import CHANNELS, GROUPS, PLANES, tile_for
from bnres.kernels.conv_config import ConvShape
from bnres.kernels.dtypes import SUPPORTED_DTYPES, acc_type
from bnres.kernels.layout import view_of
from bnres.kernels.norm import Norm, RunningStatistics
from bnres.operations.batch_norm_act import unpack_mask
from tests.device import DEVICE
from tests.tolerances import assert_close

pytestmark = pytest.mark.smoke

KERNELS = Path(bn_forward.__file__).parent
# Each layout has a shape, a memory format and a kind of tile. Channels and rows never fill whole
# tiles, so the kernels' masks are tested.
LAYOUTS = {
    "planes": ((3, 5, 9, 16), torch.contiguous_format, PLANES),
    "small odd planes": ((9, 16, 7, 7), torch.contiguous_format, GROUPS),
    "channels_last": ((3, 11, 5, 7), torch.channels_last, CHANNELS),
}
EPS = 1e-3


def draw(dtype, layout, count):
    """Returns random tensors of one layout, with the same values on every device."""
    shape, memory_format, kind = LAYOUTS[layout]
    torch.manual_seed(0)
    found = [
        (torch.randn(shape) * 2 + 1).to(DEVICE, dtype).contiguous(memory_format=memory_format)
        for _ in range(count)
    ]
    view = view_of(found[0].shape, found[0].is_contiguous())
    assert tile_for(view, dtype.itemsize).kind == kind
    return found


def affine(x):
    channels, dtype = x.shape[1], acc_type(x)
    return torch.rand(channels).to(DEVICE, dtype) + 0.5, torch.randn(channels).to(DEVICE, dtype)


def double(*values):
    """Returns the values with all tensors in fp64, also tensors inside tuples."""
    return [tree_map(lambda v: v.double() if isinstance(v, torch.Tensor) else v, v) for v in values]


def assert_all_close(actual, expected, dtype):
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, dtype)


def check_batch_norm_act(dtype, layout):
    x, residual, dy, dy_skip = draw(dtype, layout, 4)
    stats = acc_type(x)
    weight, bias = affine(x)
    buffers = [torch.zeros_like(weight), torch.ones_like(weight)]
    wide_buffers = double(*buffers)
    counter = torch.tensor(6, device=DEVICE)
    found = bn_forward.bn_stats(x, *buffers, 0.3, EPS, counter=counter)
    expected = reference.bn_stats_ref(x.double(), *wide_buffers, 0.3, EPS)
    assert_all_close((*found, *buffers), (*expected, *wide_buffers), stats)
    assert counter == 7

    norm = Norm(found, weight, bias)
    y, bits = bn_forward.bn_apply(x, norm, residual, None, "relu", 0.0, save_mask=True)
    wide_y, wide_mask = reference.bn_apply_ref(
        *double(x, norm, residual), None, "relu", 0.0, save_mask=True
    )
    assert y.stride() == x.stride() and y.dtype == dtype
    assert_close(y, wide_y, dtype)
    mask = unpack_mask(bits, x)
    assert torch.equal(mask, wide_mask)
    running = Norm(RunningStatistics(*buffers, EPS), weight, bias)
    evaluated, _ = bn_forward.bn_apply(x, running, None, None, "silu", 0.0)
    wide_evaluated, _ = reference.bn_apply_ref(*double(x, running), None, None, "silu", 0.0)
    assert_close(evaluated, wide_evaluated, dtype)

    count = x[:, 0].numel()
    for act, given, known, added in (("relu", bits, mask, None), ("silu", None, None, residual)):
        tensors = (dy, x, norm, added, None)
        sums, dz = bn_backward.bn_backward_reduce(
            *tensors, given, act, 0.0, dy_skip=dy_skip, write_dz=True
        )
        wide_sums, wide_dz = reference.bn_backward_reduce_ref(
            *double(*tensors), known, act, 0.0, dy_skip=dy_skip.double(), write_dz=True
        )
        assert_all_close(sums[:2], wide_sums[:2], stats)
        found = bn_backward.bn_backward_dx(
            *tensors, given, act, 0.0, sums, count, dy_skip=dy_skip, write_dresidual=True
        )
        expected = reference.bn_backward_dx_ref(
            *double(*tensors), known, act, 0.0, *double(sums), count, dy_skip=dy_skip.double(),
            write_dresidual=True,
        )  # fmt: skip
        assert_all_close((*found, dz), (*expected, wide_dz), dtype)


def check_two_norms(dtype, layout):
    x, residual, dy, dy_skip = draw(dtype, layout, 4)
    norm, residual_norm = (
        Norm(bn_forward.bn_stats(t, None, None, 0.1, EPS), *affine(t)) for t in (x, residual)
    )
    tensors = (x, norm, residual, residual_norm)
    y, _ = bn_forward.bn_apply(*tensors, "silu", 0.0)
    assert y.stride() == x.stride()
    assert_close(y, reference.bn_apply_ref(*double(*tensors), "silu", 0.0)[0], dtype)
    backward = (*tensors, None, "silu", 0.0)
    sums, _ = bn_backward.bn_backward_reduce(dy, *backward, dy_skip=dy_skip)
    wide_sums, _ = reference.bn_backward_reduce_ref(
        *double(dy, *backward), dy_skip=dy_skip.double()
    )
    assert_all_close(sums, wide_sums, acc_type(x))
    count = x[:, 0].numel()
    found = bn_backward.bn_backward_dx(
        dy, *backward, sums, count, dy_skip=dy_skip, write_dresidual=True
    )
    expected = reference.bn_backward_dx_ref(
        *double(dy, *backward, sums), count, dy_skip=dy_skip.double(), write_dresidual=True
    )
    assert_all_close(found, expected, dtype)


def check_max_pool(dtype, layout):
    (x,) = draw(dtype, layout, 1)
    norm = Norm(bn_forward.bn_stats(x, None, None, 0.1, EPS), *affine(x))
    y, index, x_max = bn_max_pool.bn_max_pool(x, norm, "silu", 0.0, save=True)
    expected = reference.bn_max_pool_ref(*double(x, norm), "silu", 0.0)[0]
    assert_close(y, expected, dtype)
    # The index is not compared. If values are equal after rounding, the kernel and the reference
    # may choose different indices. So y is compared with the value at the kernel's index.
    at_index = reference.bn_max_pool_at_ref(*double(x, norm), "silu", 0.0, index)
    assert_close(y, at_index, dtype)
    flat = reference.pooled_offsets(index, x.shape[3]).flatten(2)
    assert torch.equal(x_max.flatten(2), x.flatten(2).gather(2, flat))
    dy = torch.randn(y.shape).to(DEVICE, dtype)
    dy = dy.contiguous(memory_format=LAYOUTS[layout][1])
    sums, _ = bn_backward.bn_backward_reduce(dy, x_max, norm, None, None, None, "silu", 0.0)
    count = x[:, 0].numel()
    dx = bn_max_pool.bn_max_pool_backward_dx(dy, index, x, norm, "silu", 0.0, sums, count)
    expected = reference.bn_max_pool_backward_dx_ref(
        dy.double(), index, *double(x, norm), "silu", 0.0, *double(sums), count
    )
    assert dx.stride() == x.stride()
    assert_close(dx, expected, dtype)


def check_conv(dtype):
    torch.manual_seed(0)
    n, channels, height, width, filters = 3, 17, 11, 10, 37
    shape = ConvShape(3, 2, 2, 1, 1, 0, 1, 2)

    def last(*shape):
        return torch.randn(shape).to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)

    x = last(n, channels, height, width)
    filter = last(filters, channels, shape.kernel_h, shape.kernel_w) / 8
    residual = last(n, filters, *shape.output_size(height, width))
    mean, weight, bias, conv_bias = torch.randn(4, filters).to(DEVICE).unbind()
    running = RunningStatistics(mean, torch.rand(filters).to(DEVICE) + 0.5, EPS)
    norm = Norm(running, weight, bias)
    options = (residual, "relu", 0.0, shape)
    y = conv.conv_bn_act(x, filter, conv_bias, norm, *options)
    expected = reference.conv_bn_act_ref(*double(x, filter, conv_bias, norm, *options))
    assert_close(y, expected, dtype, tf32=dtype == torch.float32)


MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def check_augment(dtype, memory_format):
    """Tests small images, which one program processes, and larger images, which several share.

    For the larger images a separate kernel sums the gray values that contrast needs.
    """
    jitter = augment.ColorJitter(0.5, 0.2, 0.6, 0.4)
    for size, crop in ((12, augment.RandomResizedCrop((9, 7))), (36, augment.RandomCrop(34, 2))):
        torch.manual_seed(0)
        x = torch.randint(256, (3, 3, size, size)).byte()
        chain = augment.Compose(
            [augment.RandomHorizontalFlip(), crop, jitter, augment.Normalize(MEAN, STD)],
            dtype=dtype, memory_format=memory_format,
        )  # fmt: skip
        draws = chain.draws(3, size, size, torch.Generator().manual_seed(1))
        y = chain.apply(x.to(DEVICE), draws).cpu()
        assert y.dtype == dtype and y.is_contiguous(memory_format=memory_format)
        exact = augment.Compose(chain.transforms)
        with use_backend("aten"):
            expected = exact.apply(x, draws)
        # Colours have an error of at most 1e-4 (see test_augment.py). Normalising divides this
        # error by STD. Rounding to ``dtype`` adds a second error.
        allowed = 1e-4 / min(STD) + torch.finfo(dtype).eps * expected.abs().max()
        assert (y.float() - expected).abs().max() <= allowed


BATCH_NORMS = (check_batch_norm_act, check_two_norms)
# The interpreter's tl.dot does not support bf16, and the convolution kernel does not support fp64.
CONV_DTYPES = [torch.float16, torch.float32] + [torch.bfloat16] * (DEVICE == "cuda")
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.mark.parametrize("dtype", SUPPORTED_DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("check", BATCH_NORMS)
def test_batch_norms(check, layout, dtype):
    check(dtype, layout)


@pytest.mark.parametrize("dtype", [d for d in SUPPORTED_DTYPES if d != torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["planes", "channels_last"])
def test_max_pool(layout, dtype):
    check_max_pool(dtype, layout)


@pytest.mark.parametrize("dtype", CONV_DTYPES, ids=str)
def test_convolution(dtype):
    check_conv(dtype)


@pytest.mark.parametrize("dtype", augment.compose.OUTPUT_DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_augmentation(memory_format, dtype):
    check_augment(dtype, FORMATS[memory_format])


def launched_by(path):
    """Returns the names of the kernels that a file passes to ``launch``."""
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    return {c.args[0].id for c in calls if isinstance(c.func, ast.Name) and c.func.id == "launch"}


def test_no_kernel_is_left_out(monkeypatch):
    """The checks of this file launch every kernel of `bnres.kernels`."""
    launched = set()
    for module in (augment_kernels, bn_backward, bn_forward, bn_max_pool, conv):
        original = module.launch

        def record(kernel, *arguments, original=original, **named):
            launched.add(kernel.fn.__name__)
            original(kernel, *arguments, **named)

        monkeypatch.setattr(module, "launch", record)
    for check in BATCH_NORMS:
        check(torch.float32, "planes")
    check_max_pool(torch.float32, "planes")
    check_conv(torch.float32)
    check_augment(torch.float32, torch.contiguous_format)
    named = set().union(*map(launched_by, KERNELS.glob("*.py")))
    assert len(launched) > 10 and launched == named

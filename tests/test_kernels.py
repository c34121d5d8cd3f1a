"""Compares each launcher with its reference, and tests launch geometry and addressing."""

import pytest
import torch
import triton
import triton.language as tl
from torch.utils._pytree import tree_leaves, tree_map

from bnres.kernels import bn_backward, bn_forward, bn_max_pool, launch, reference
from bnres.kernels.config import launch_config, tile_for, tile_rows
from bnres.kernels.interpreter import check_versions
from bnres.kernels.layout import ChannelView, view_of
from bnres.kernels.norm import Norm
from bnres.kernels.outputs import empty_mask
from bnres.kernels.tiles import divide, split_rows, tile_offsets
from bnres.operations.batch_norm_act import unpack_mask
from tests.device import DEVICE
from tests.tolerances import assert_close

# The shapes have from 1 to 130 channels. Some sizes are prime. One shape has a single spatial
# element. Every kind of tile is used.
SHAPES = [
    (3, 1, 5, 7),
    (5, 3, 1, 1),
    (2, 63, 3, 3),
    (2, 65, 5),
    (11, 130),
    (9, 16, 7, 7),
    (5, 8, 16, 8),
]


@pytest.fixture
def many_programs(monkeypatch):
    """Makes launchers split small tensors among several programs, as on a GPU."""
    if DEVICE == "cpu":
        monkeypatch.setattr(launch, "sm_count", lambda device: 5)


def draw(shape, last):
    torch.manual_seed(1)
    tensors = [torch.randn(shape, device=DEVICE) * 2 + 1 for _ in range(3)]
    if last:
        tensors = [t.movedim(1, -1).contiguous().movedim(-1, 1) for t in tensors]
    c = shape[1]
    return *tensors, torch.rand(c, device=DEVICE) + 0.5, torch.randn(c, device=DEVICE)


def double(*values):
    """Returns the values with all tensors in fp64, also tensors inside tuples."""
    return [tree_map(lambda v: v.double() if isinstance(v, torch.Tensor) else v, v) for v in values]


@pytest.mark.parametrize(
    ("shape", "last"),
    [(s, i % 2 == 0) for i, s in enumerate(SHAPES)] + [((40, 8, 7, 7), False)],
    ids=str,
)
def test_launchers_agree_with_their_references(shape, last, many_programs):
    x, dy, residual, weight, bias = draw(shape, last)
    mean, var = torch.zeros_like(weight), torch.ones_like(weight)
    counter, wide_counter = torch.tensor(6, device=x.device), torch.tensor(6, device=x.device)
    wide_mean, wide_var = double(mean, var)
    stats = bn_forward.bn_stats(x, mean, var, 0.3, 1e-3, counter=counter)
    wide_stats = reference.bn_stats_ref(
        x.double(), wide_mean, wide_var, 0.3, 1e-3, counter=wide_counter
    )
    assert counter == wide_counter == 7
    pairs = [*zip(stats, wide_stats, strict=True), (mean, wide_mean), (var, wide_var)]

    shifted, wide_shifted = torch.zeros_like(mean), torch.zeros_like(wide_mean)
    again = bn_forward.bn_stats(x, shifted, None, 0.3, 1e-3, input_bias=bias)
    reference.bn_stats_ref(x.double(), wide_shifted, None, 0.3, 1e-3, input_bias=bias.double())
    assert all(map(torch.equal, again, stats))
    pairs.append((shifted, wide_shifted))

    norm = Norm(stats, weight, bias)
    forward = (norm, residual, None, "relu", 0.0)
    y, mask = bn_forward.bn_apply(x, *forward, save_mask=True)
    wide_y, wide_mask = reference.bn_apply_ref(x.double(), *double(*forward), save_mask=True)
    assert torch.equal(unpack_mask(mask, x), wide_mask)
    backward = (norm, None, None)
    for given, wide_given, act in ((mask, wide_mask, "relu"), (None, None, "silu")):
        sums, dz = bn_backward.bn_backward_reduce(dy, x, *backward, given, act, 0.0, write_dz=True)
        wide_sums, wide_dz = reference.bn_backward_reduce_ref(
            dy.double(), x.double(), *double(*backward), wide_given, act, 0.0, write_dz=True
        )
        pairs += zip((*sums[:2], dz), (*wide_sums[:2], wide_dz), strict=True)
        count = x[:, 0].numel()
        for used, wide_used in ((sums, wide_sums), (None, None)):
            dx = bn_backward.bn_backward_dx(
                dy, x, *backward, given, act, 0.0, used, count, write_dresidual=True
            )
            wide_dx = reference.bn_backward_dx_ref(
                dy.double(), x.double(), *double(*backward), wide_given, act, 0.0, wide_used,
                count, write_dresidual=True,
            )  # fmt: skip
            pairs += zip(dx, wide_dx, strict=True)
    for actual, expected in [*pairs, (y, wide_y)]:
        assert_close(actual, expected, torch.float32)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_outputs_may_be_allocated_by_the_caller(last):
    x, dy, residual, weight, bias = draw((3, 16, 6, 8), last)
    norm = Norm(bn_forward.bn_stats(x, None, None, 0.1, 1e-5), weight, bias)
    other = Norm(bn_forward.bn_stats(residual, None, None, 0.1, 1e-5), bias)
    pool = (norm, "relu", 0.0)
    pooled = bn_max_pool.bn_max_pool(x, *pool, save=True)
    dy_pooled = torch.ones_like(pooled[0])
    plain, two_norms = (x, norm, residual, None), (x, norm, residual, other)
    count = x[:, 0].numel()
    calls = [
        lambda **out: bn_forward.bn_stats(x, None, None, 0.1, 1e-5, **out),
        lambda **out: bn_forward.bn_apply(*plain, "relu", 0.0, save_mask=True, **out),
        lambda **out: bn_max_pool.bn_max_pool(x, *pool, save=True, **out),
        lambda **out: bn_max_pool.bn_max_pool_backward_dx(
            dy_pooled, pooled[1], x, *pool, None, 1, **out
        ),
    ]
    for tensors in (plain, two_norms):
        backward = (dy, *tensors, None, "silu", 0.0)
        sums, _ = bn_backward.bn_backward_reduce(*backward)
        calls += [
            lambda backward=backward, **out: bn_backward.bn_backward_reduce(
                *backward, write_dz=True, **out
            ),
            lambda backward=backward, sums=sums, **out: bn_backward.bn_backward_dx(
                *backward, sums, count, write_dresidual=True, **out
            ),
        ]
    for call in calls:
        expected = call()
        out = tree_map(lambda t: t if t is None else torch.zeros_like(t), expected)
        found = call(out=out)
        for ours, given, wanted in zip(*map(tree_leaves, (found, out, expected)), strict=True):
            assert ours is given
            assert ours is None or torch.equal(ours, wanted)
    # Without write_dresidual, dresidual is None, and dx does not change.
    both = bn_backward.bn_backward_dx(*backward, sums, count, write_dresidual=True)
    dx, dresidual = bn_backward.bn_backward_dx(*backward, sums, count)
    assert dresidual is None and torch.equal(dx, both[0])


def test_launch_refuses_unknown_and_missing_arguments():
    x = torch.ones(2, 3, 4, 4, device=DEVICE)
    kernel, plan = bn_forward._bn_stats_kernel, launch.plan("stats", x)
    with pytest.raises(TypeError, match="_bn_stats_kernel: unknown arguments: y_ptr;"):
        launch.launch(kernel, plan, sums_ptr=x, x_ptr=x, y_ptr=None)
    with pytest.raises(TypeError, match="unknown arguments: none; missing arguments: count, C"):
        launch.launch(kernel, launch.Plan((1, 1), {"ACC": tl.float32}), sums_ptr=x, x_ptr=x)


def test_initial_contents_of_memory_do_not_matter(many_programs, monkeypatch):
    """No memory is read before it is written, and every element of each output is written."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(t):
        return t.fill_(float("nan")) if t.is_floating_point() else t.fill_(255)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    test_launchers_agree_with_their_references((7, 9, 7, 7), False, None)
    test_launchers_agree_with_their_references((7, 9, 7, 7), True, None)


@pytest.mark.parametrize("channels", [64, 128, 256, 512])
@pytest.mark.parametrize("kernel", ["stats", "apply", "apply_residual", "reduce", "dx"])
def test_work_is_split_over_the_whole_chip(kernel, channels):
    size = 3584 // channels
    for view in (
        ChannelView(256 * size * size, channels, 1),
        ChannelView(256, channels, size * size),
    ):
        tile = tile_for(view, 2)
        config = launch_config(kernel, view, tile, 132)
        assert config.col_blocks * config.splits >= 132
        assert config.splits * config.rows_per_split >= tile_rows(view, tile)
        assert (config.splits - 1) * config.rows_per_split < tile_rows(view, tile)


@pytest.mark.parametrize("shape, last", [((3, 8, 4, 4), False), ((5, 16, 7, 7), True)], ids=str)
def test_bfloat16_tensors_may_start_inside_a_word(shape, last):
    x, dy, residual, weight, bias = draw(shape, last)
    given = bn_forward.bn_stats(x, None, None, 0.1, 1e-5)

    def run(shift):
        moved = []
        for t in (x, dy, residual):
            storage = torch.empty(t.numel() + 1, dtype=torch.bfloat16, device=t.device)
            moved.append(storage.as_strided(t.shape, t.stride(), shift).copy_(t))
            assert moved[-1].data_ptr() % 4 == 2 * shift
        stats = bn_forward.bn_stats(moved[0], None, None, 0.1, 1e-5)
        forward = (moved[0], Norm(given, weight, bias), moved[2], None)
        y, mask = bn_forward.bn_apply(*forward, "relu", 0.0, save_mask=True)
        sums, dz = bn_backward.bn_backward_reduce(
            moved[1], *forward, mask, "relu", 0.0, write_dz=True
        )
        dx, _ = bn_backward.bn_backward_dx(
            moved[1], *forward, mask, "relu", 0.0, sums, x[:, 0].numel()
        )
        return [*stats, *sums[:2], dx], [y, mask, dz]

    (sums, exact), (aligned_sums, aligned_exact) = run(1), run(0)
    assert all(map(torch.equal, exact, aligned_exact))
    for actual, expected in zip(sums, aligned_sums, strict=True):
        assert_close(actual, expected, expected.dtype)


@triton.jit
def _last_offset_kernel(out_ptr, split, rows_per_split, col_block, count, C, L, TILE: tl.constexpr):
    """Stores the largest offset of a split's last tile."""
    start, stop = split_rows(split, rows_per_split, count, TILE)
    row = start + (stop - 1 - start) // TILE.sub_rows * TILE.sub_rows
    offsets, mask = tile_offsets(row, col_block, (count, C, L), TILE, 1, False, 1)
    tl.store(out_ptr, tl.max(tl.max(tl.where(mask, offsets.to(tl.int64), 0), 1), 0))


@pytest.mark.parametrize(
    "view",
    [
        ChannelView(50_000_017, 64, 1),
        ChannelView(1031, 65, 49_999),
        ChannelView(43_701, 1024, 56 * 56),
        ChannelView(90_001, 512, 49),
        ChannelView(3, 64, 64_000_000),
        ChannelView(33_000_000, 64, 1),
        ChannelView(661, 65, 49_177),
        ChannelView(661, 64, 49_984),
        ChannelView(84_000, 512, 49),
    ],
    ids=str,
)
def test_addresses_on_both_sides_of_2_to_31(view):
    tile = tile_for(view, 2)
    assert view.numel > 2_100_000_000 and tile.narrow == (view.numel < 2**31)
    config = launch_config("apply", view, tile, 132)
    out = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    _last_offset_kernel[(1,)](
        out, config.splits - 1, config.rows_per_split, config.col_blocks - 1, view.count,
        view.channels, view.inner, tile,
    )  # fmt: skip
    assert out.item() == view.numel - 1


def test_mask_of_more_than_2_to_31_bytes_has_64_bit_offsets():
    x = torch.empty(1, 5_000_000, 8, dtype=torch.bfloat16, device="meta")
    assert x.numel() < 2**31 < empty_mask(x).numel()
    assert not tile_for(view_of(x.shape, True), x.itemsize).narrow


@triton.jit
def _divide_kernel(out_ptr, a_ptr, b, TILE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, divide(tl.load(a_ptr + i), b, TILE))


@pytest.mark.parametrize("b", [1, 2, 3, 7, 98, 392, 1568, 65_535, 65_537, 2**30 - 1, 2**31 - 1])
def test_division_by_a_reciprocal(b):
    near = [q * b + r for q in (1, 2, 3, (2**31 - 1) // b) for r in (-1, 0, 1)]
    a = torch.tensor([0, 2**31 - 1, 2**31 - 2, 2**24 + 1, *near], device=DEVICE)
    a = a[(a >= 0) & (a < 2**31)]
    a = torch.nn.functional.pad(a, (0, 16 - len(a))).int()
    out = torch.empty_like(a)
    _divide_kernel[(1,)](out, a, b, tile_for(ChannelView(2, 8, 8), 2), 16)
    assert torch.equal(out, a // b)


def test_versions_whose_interpreter_fails_are_refused():
    for versions in (("3.6.0", "2.3.5"), ("3.7.0", "2.4.0"), ("3.10.1+git1", "3.0")):
        check_versions(*versions)
    with pytest.raises(ImportError, match=r"triton 3\.6\.0's interpreter .* needs numpy < 2\.4"):
        check_versions("3.6.0", "2.5.0")


@pytest.mark.parametrize("momentum", [0.3, torch.tensor([0.3])], ids=type)
def test_combined_moments_of_parts_are_the_statistics_of_the_whole(momentum):
    """A part is the batch of one rank. One part is empty. One has a single value per channel."""
    if isinstance(momentum, torch.Tensor):
        momentum = momentum.to(DEVICE)
    x = torch.randn(9, 5, 3, generator=torch.Generator().manual_seed(0)).to(DEVICE) + 100
    parts = [x[:0], x[:8], x[8:, :, :1].contiguous(), x[8:, :, 1:].contiguous()]
    moments = torch.stack([bn_forward.bn_moments(part) for part in parts])
    wide = torch.stack([reference.bn_moments_ref(part.double()) for part in parts])
    assert_close(moments, wide, torch.float32)
    found, expected = (
        (*(torch.full((5,), v).to(t) for v in (0, 1)), torch.tensor(0, device=DEVICE))
        for t in (x, wide)
    )
    statistics, total = bn_forward.bn_combine(moments, *found[:2], momentum, 1e-3, counter=found[2])
    wide_statistics, _ = reference.bn_combine_ref(
        wide, *expected[:2], momentum, 1e-3, counter=expected[2]
    )
    whole = reference.bn_stats_ref(x.double(), None, None, 0.0, 1e-3)
    for a, b, c in zip(statistics, wide_statistics, whole, strict=True):
        assert_close(a, b, torch.float32)
        assert_close(b, c, torch.float64)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, torch.float32)
    assert total == 27
    nothing, before = torch.zeros_like(moments), [t.clone() for t in found]
    assert bn_forward.bn_combine(nothing, *found[:2], momentum, 1e-3, counter=found[2])[1] == 0
    assert all(map(torch.equal, found[:2], before[:2])) and found[2] == before[2] + 1

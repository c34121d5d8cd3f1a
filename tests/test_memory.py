"""Tests how much memory the kernels touch, which is counted in the interpreter as in the audit."""

import pytest
import torch

from benchmarks.byte_model import PASSES, passes
from benchmarks.operations import LAYOUTS
from benchmarks.sites import RESNET18_SITES

if torch.cuda.is_available():
    pytest.skip("counts what the interpreter touches", allow_module_level=True)

from benchmarks.audit.memory import channel_buffer_share, operation_traffic

OPERATIONS = ("bn", "bn_relu", "bn_add_relu", "bn_add_relu_fork", "dual_bn_add_relu")
# The limits of the stem's traffic, counted in sectors and divided by S, the size of the input. At
# these small sizes the traffic differs from the byte model, because windows at the border skip some
# positions and read others twice.
STEM_CEILINGS = {"eval": 1.27, "forward": 2.65, "backward": 2.9}
# The traffic of the samples for the pivot at these small shapes, divided by S. Each program reads
# four samples per channel.
SLACK = 0.03
H200_SM_COUNT = 132


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(32, 64, 7, 7), (16, 32, 16, 16)], ids=str)
@pytest.mark.slow
def test_passes_over_the_activations(operation, layout, shape):
    if operation in ("bn", "bn_add_relu_fork"):
        shape = (16, 64, 7, 7)  # one shape is enough: other operations test the same kernels
    size = torch.Size(shape).numel() * torch.bfloat16.itemsize
    counts = operation_traffic(operation, shape, torch.bfloat16, LAYOUTS[layout])
    for step in ("eval", "forward", "backward"):
        if (operation, step) not in PASSES:
            continue
        floor = passes(operation, step, torch.bfloat16.itemsize)
        for count in (counts[step].lanes, counts[step].sectors):
            assert floor - 0.001 <= count / size <= floor + SLACK, (step, count / size)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stem(layout):
    shape = (2, 64, 16, 16)
    size = torch.Size(shape).numel() * torch.bfloat16.itemsize
    counts = operation_traffic("bn_relu_pool", shape, torch.bfloat16, LAYOUTS[layout])
    found = {step: counts[step].sectors / size for step in STEM_CEILINGS}
    assert all(1 < found[step] <= ceiling for step, ceiling in STEM_CEILINGS.items()), found
    assert found["forward"] + found["backward"] <= 5.8


@pytest.mark.parametrize("site", RESNET18_SITES, ids=lambda s: f"{s.name}-{s.operation}")
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_channel_buffers_are_small(site, channels_last, itemsize):
    # Every program reads these bytes, but from the L2 cache.
    limit = 0.10 if site.name == "layer4" else 0.05
    shares = channel_buffer_share(site, 256, channels_last, itemsize, H200_SM_COUNT)
    assert all(0 < share <= limit for share in shares.values()), shares

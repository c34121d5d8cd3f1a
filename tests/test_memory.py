"""Tests of the memory that the kernels touch, counted in the interpreter as in the audit."""

import pytest
import torch

from benchmarks.byte_model import PASSES, passes
from benchmarks.operations import LAYOUTS

if torch.cuda.is_available():
    pytest.skip("counts what the interpreter touches", allow_module_level=True)

from benchmarks.audit.memory import operation_traffic

OPERATIONS = ("bn", "bn_relu", "bn_add_relu", "bn_add_relu_fork", "dual_bn_add_relu")
# Greatest traffic of the stem in S, counted in sectors. At these small sizes it differs from the
# byte model, because windows at the border skip some positions and read others twice.
STEM_CEILINGS = {"eval": 1.27, "forward": 2.65, "backward": 2.9}
# Traffic in S that the pivot's samples add at these small shapes: four elements per channel and
# program.
SLACK = 0.03


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(32, 64, 7, 7), (16, 32, 16, 16)], ids=str)
@pytest.mark.slow
def test_passes_over_the_activations(operation, layout, shape):
    if operation in ("bn", "bn_add_relu_fork"):
        shape = (16, 64, 7, 7)  # one shape suffices: other operations test the same kernels
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
    print(found, {step: counts[step].lanes / size for step in STEM_CEILINGS})
    assert all(1 < found[step] <= ceiling for step, ceiling in STEM_CEILINGS.items()), found
    assert found["forward"] + found["backward"] <= 5.8

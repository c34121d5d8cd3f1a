"""Tests of the memory that the kernels touch, counted in the interpreter.

``python -m benchmarks audit`` counts more operations, on smaller planes.
"""

import pytest
import torch

from benchmarks.byte_model import passes
from benchmarks.operations import LAYOUTS

if torch.cuda.is_available():
    pytest.skip("counts what the interpreter touches", allow_module_level=True)

from benchmarks.audit.memory import operation_traffic

SHAPE = (16, 32, 16, 16)
# To choose a value that it subtracts from x, each program of the statistics' kernel reads four more
# elements per channel. At this shape, these reads are fewer bytes than SLACK times the size of x.
SLACK = 0.03


@pytest.mark.parametrize("operation", ["bn_relu", "bn_add_relu", "dual_bn_add_relu"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.slow
def test_operations_touch_the_fewest_bytes(operation, layout):
    size = torch.Size(SHAPE).numel() * torch.bfloat16.itemsize
    counts = operation_traffic(operation, SHAPE, torch.bfloat16, LAYOUTS[layout])
    for step, traffic in counts.items():
        floor = passes(operation, step, torch.bfloat16.itemsize)
        for count in (traffic.lanes, traffic.sectors):
            assert floor - 0.001 <= count / size <= floor + SLACK, (step, count / size)

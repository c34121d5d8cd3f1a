"""Tests of the memory that the kernels touch, counted in the interpreter.

``python -m benchmarks audit`` counts more operations, on smaller tensors.
"""

import pytest
import torch
from torch import nn

from benchmarks.byte_model import passes
from benchmarks.operations import LAYOUTS
from bnres.nn import BatchNormAct2d

if torch.cuda.is_available():
    pytest.skip("counts what the interpreter touches", allow_module_level=True)

from benchmarks.audit.memory import operation_traffic
from benchmarks.audit.step import inference_bytes

SHAPE = (16, 32, 16, 16)
# Each program of the statistics' kernel reads four more elements per channel, to choose a value to
# subtract from x. At this shape, the four elements of all programs and channels have fewer bytes
# than SLACK times the size of x.
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


def test_bytes_of_inference():
    """Torch's two layers each read and write the activation. Our layer does so only once."""
    shape, sectors = (4, 8, 32, 32), {("bn_relu", "eval"): 2.0}
    size = torch.Size(shape).numel() * torch.bfloat16.itemsize
    assert inference_bytes(lambda: BatchNormAct2d(8), shape, sectors) == 2 * size
    stock = inference_bytes(lambda: nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()), shape, sectors)
    assert 4 * size < stock < 4.01 * size  # the parameters of the batch norm are read too

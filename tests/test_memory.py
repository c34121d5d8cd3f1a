"""Tests of the memory that the kernels touch, counted in the interpreter.

``python -m benchmarks audit`` counts more operations, on smaller tensors.
"""

from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from benchmarks.byte_model import passes
from benchmarks.operations import LAYOUTS
from benchmarks.report.performance_page import INDUCTOR_HELD
from bnres.models import resnet18
from bnres.nn import BatchNormAct2d

if torch.cuda.is_available():
    pytest.skip("counts what the interpreter touches", allow_module_level=True)

from benchmarks.audit.memory import NET_INPUT, operation_traffic
from benchmarks.audit.operations import OPERATIONS, steps
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


@pytest.mark.slow
def test_bytes_that_inductor_saves():
    """`INDUCTOR_HELD` is what a graph of ResNet-18 saves after AOTAutograd prepared it."""
    import torch._inductor.lowering  # the decompositions need this module
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    batch, saved = 8, []

    def backward(graph, example_inputs):
        values = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
        saved.extend(v for v in values if isinstance(v, torch.Tensor) and v.shape[0] == batch)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=lambda graph, example_inputs: make_boxed_func(graph.forward),
        bw_compiler=backward,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    options = {"dtype": torch.bfloat16, "memory_format": torch.channels_last}
    net, x = resnet18(fused=False).to(**options), torch.randn(batch, 3, 224, 224).to(**options)
    y = torch.compile(net, backend=backend)(x)
    y.float().square().sum().backward()
    size = sum(v.numel() * v.itemsize for v in saved) - y.nbytes  # the gradient of y is not saved
    assert round(size * NET_INPUT[0] / batch / 1e6) == INDUCTOR_HELD


@contextmanager
def only_own_memory():
    """Inside the context, a launch may only access the memory of the tensors that it gets."""
    ranges = []
    launch = GridExecutor.__call__

    def checked(name, mask_at):
        access = getattr(InterpreterBuilder, name)

        def call(builder, pointers, *rest):
            mask = np.broadcast_to(rest[mask_at].data, pointers.data.shape)
            own = np.zeros(pointers.data.shape, dtype=bool)
            for start, stop in ranges:
                own |= (pointers.data >= start) & (pointers.data < stop)
            assert (own | ~mask).all(), "memory outside the launch's tensors"
            return access(builder, pointers, *rest)

        return patch.object(InterpreterBuilder, name, call)

    def execute(self, *arguments, **named):
        storages = [t.untyped_storage() for t in named.values() if isinstance(t, torch.Tensor)]
        ranges[:] = [(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages]
        launch(self, *arguments, **named)

    accesses = checked("create_masked_load", 0), checked("create_masked_store", 1)
    with patch.object(GridExecutor, "__call__", execute), accesses[0], accesses[1]:
        yield


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 2, 32, 32), (2, 6, 6, 16)], ids=["whole tiles", "parts"])
def test_kernels_stay_inside_their_tensors(operation, layout, shape):
    def random():
        x = torch.randn(shape, dtype=torch.bfloat16)
        return x.contiguous(memory_format=LAYOUTS[layout])

    with only_own_memory():
        for step in steps(operation, random).values():
            step()

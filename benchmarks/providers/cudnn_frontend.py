"""cuDNN's graphs that fuse batch norm, addition and ReLU, called through NVIDIA's frontend.

The graphs are built as in ``test/python/norm/graph/test_batchnorm_fusion.py`` of
NVIDIA/cudnn-frontend. If an operation has a ReLU, its forward stores one bit for each element: 1
if the output is positive, otherwise 0. The backward multiplies the gradient by this bit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import OpCase
from benchmarks.operations import EPS, MOMENTUM, Inputs
from benchmarks.providers.base import Bind, Implementation, Provider, Results, Unavailable

LEAST_VERSION = 8904
LEAST_CAPABILITY = (8, 0)
# One byte of the mask stores the bits of eight channels.
CHANNELS = 8
DTYPES = ("bf16", "fp16")
OPERATIONS = ("bn", "bn_relu", "bn_add_relu")


@dataclass(frozen=True)
class Graph:
    """A graph that has been built.

    Attributes:
        graph: cuDNN's graph.
        tensors: tensors of the graph by name.
        workspace: bytes of workspace that the graph needs.
    """

    graph: Any
    tensors: dict[str, Any]
    workspace: int


class Builder:
    """Builds the graphs for one shape and dtype.

    Args:
        cudnn: module of the frontend.
        x: an activation of shape (N, C, H, W). Only its shape and dtype are used.
        has_residual: whether the operation adds a residual.
        has_relu: whether the operation ends with ReLU.
        handle: cuDNN's handle for the device of ``x``.
    """

    def __init__(
        self, cudnn: ModuleType, x: Tensor, has_residual: bool, has_relu: bool, handle: Any
    ) -> None:
        self.cudnn, self.has_residual, self.has_relu = cudnn, has_residual, has_relu
        types = cudnn.data_type
        self.io = types.BFLOAT16 if x.dtype == torch.bfloat16 else types.HALF
        n, c, h, w = x.shape
        self.activation = {"dim": [n, c, h, w], "stride": [h * w * c, 1, w * c, c]}
        self.channel = {
            "dim": [1, c, 1, 1],
            "stride": [c, 1, c, c],
            "data_type": types.FLOAT,
        }
        self.scalar = {"dim": [1] * 4, "stride": [1] * 4, "is_pass_by_value": True}
        self.handle = handle

    def bind_stream(self) -> None:
        """Makes cuDNN launch on torch's current stream."""
        stream = torch.cuda.current_stream().cuda_stream
        self.cudnn.set_stream(handle=self.handle, stream=stream)

    def forward(self) -> Graph:
        """Builds the forward.

        Intermediate tensors have the activations' dtype, or fp32 if cuDNN does not support that.
        """
        try:
            return self._forward(self.io)
        except self.cudnn.cudnnGraphNotSupportedError:
            return self._forward(self.cudnn.data_type.FLOAT)

    def _forward(self, virtual: Any) -> Graph:
        types, graph = self.cudnn.data_type, self._new()
        t = {"x": graph.tensor(name="x", data_type=self.io, **self.activation)}
        for name in ("weight", "bias", "running_mean", "running_var"):
            t[name] = graph.tensor(name=name, **self.channel)
        for name in ("eps", "momentum"):
            t[name] = graph.tensor(name=name, data_type=types.DOUBLE, **self.scalar)
        y, *statistics = graph.batchnorm(
            name="bn", input=t["x"], scale=t["weight"], bias=t["bias"],
            in_running_mean=t["running_mean"], in_running_var=t["running_var"],
            epsilon=t["eps"], momentum=t["momentum"],
        )  # fmt: skip
        y.set_data_type(virtual)
        if self.has_residual:
            t["residual"] = graph.tensor(name="residual", data_type=self.io, **self.activation)
            y = graph.add(a=y, b=t["residual"], name="add")
            y.set_data_type(virtual)
        if self.has_relu:
            y = graph.relu(input=y, name="relu")
            t["zero"] = graph.tensor(name="zero", data_type=self.io, **self.scalar)
            t["mask"] = graph.cmp_gt(input=y, comparison=t["zero"], name="mask")
            t["mask"].set_output(True).set_data_type(types.BOOLEAN)
        y.set_output(True).set_data_type(self.io)
        for each in statistics:
            each.set_output(True).set_data_type(types.FLOAT)
        t["mean"], t["rstd"], t["new_running_mean"], t["new_running_var"] = statistics
        return self._finish(graph, t | {"y": y})

    def backward(self) -> Graph:
        """Builds the backward.

        With a ReLU, dy is first multiplied by the mask that forward stored. The product is also the
        gradient of the residual.
        """
        types, graph = self.cudnn.data_type, self._new()
        t = {
            name: graph.tensor(name=name, data_type=self.io, **self.activation)
            for name in ("x", "dy")
        }
        for name in ("weight", "mean", "rstd"):
            t[name] = graph.tensor(name=name, **self.channel)
        gradient = t["dy"]
        if self.has_relu:
            t["mask"] = graph.tensor(name="mask", data_type=types.BOOLEAN, **self.activation)
            gradient = graph.mul(a=gradient, b=t["mask"], name="drelu")
            gradient.set_data_type(self.io)
            if self.has_residual:
                gradient.set_output(True)
                t["dresidual"] = gradient
        outputs = graph.batchnorm_backward(
            name="dbn", grad=gradient, input=t["x"], scale=t["weight"], mean=t["mean"],
            inv_variance=t["rstd"],
        )  # fmt: skip
        for name, tensor in zip(("dx", "dweight", "dbias"), outputs, strict=True):
            tensor.set_output(True).set_data_type(self.io if name == "dx" else types.FLOAT)
            t[name] = tensor
        return self._finish(graph, t)

    def _new(self) -> Any:
        types = self.cudnn.data_type
        return self.cudnn.pygraph(
            io_data_type=self.io,
            intermediate_data_type=types.FLOAT,
            compute_data_type=types.FLOAT,
            handle=self.handle,
        )

    def _finish(self, graph: Any, tensors: dict[str, Any]) -> Graph:
        graph.validate()
        return Graph(graph, tensors, self._build(graph))

    def _build(self, graph: Any) -> int:
        """Builds a graph's execution plans. Returns the number of bytes of its workspace."""
        graph.build_operation_graph()
        graph.create_execution_plans([self.cudnn.heur_mode.A, self.cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
        return int(graph.get_workspace_size())

    def runner(self, graph: Graph, values: dict[str, Tensor]) -> Callable[[], None]:
        """Returns a function that runs the graph on the tensors in ``values``."""
        pack = {tensor: values[name] for name, tensor in graph.tensors.items()}
        workspace = torch.empty(
            max(graph.workspace, 1), dtype=torch.uint8, device=values["x"].device
        )

        def run() -> None:
            self.bind_stream()
            graph.graph.execute(pack, workspace, handle=self.handle)

        return run


def _module(case: OpCase) -> ModuleType:
    if case.site.operation not in OPERATIONS or case.direction == "eval":
        raise Unavailable(f"has no fused {case.site.operation} ({case.direction})")
    if case.dtype not in DTYPES or case.layout != "channels_last":
        raise Unavailable("only supports 16-bit channels_last tensors")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        raise Unavailable("needs a GPU of sm_80 or newer")
    try:
        import cudnn

        version = cudnn.backend_version()
    except (ImportError, OSError, RuntimeError) as error:
        raise Unavailable(f"nvidia-cudnn-frontend can't be imported: {error}") from error
    if version < LEAST_VERSION:
        raise Unavailable(f"needs cuDNN {LEAST_VERSION} or newer, got {version}")
    return cudnn


def _prepare(case: OpCase) -> Bind:
    cudnn = _module(case)
    operation = case.site.operation
    has_residual, has_relu = "add" in operation, operation != "bn"
    built: list[tuple[Builder, Graph, Graph]] = []

    def bind(inputs: Inputs) -> Implementation:
        x = inputs.x.detach()
        if x.shape[1] % CHANNELS:
            raise Unavailable(f"only supports multiples of {CHANNELS} channels, got {x.shape[1]}")
        if not built:
            with torch.cuda.device(x.device):
                handle = cudnn.create_handle()
            builder = Builder(cudnn, x, has_residual, has_relu, handle)
            builder.bind_stream()
            try:
                built.append((builder, builder.forward(), builder.backward()))
            except cudnn.cudnnGraphNotSupportedError as error:
                raise Unavailable(f"cuDNN does not support this graph: {error}") from error
        return _bound(*built[0], inputs)

    return bind


def _bound(builder: Builder, forward: Graph, backward: Graph, inputs: Inputs) -> Implementation:
    x, norm = inputs.x.detach(), inputs.norm
    n, c, h, w = x.shape
    channels = {
        name: getattr(norm, name).detach().view(1, c, 1, 1)
        for name in ("weight", "bias", "running_mean", "running_var")
    }
    values = channels | {
        "x": x,
        "y": torch.empty_like(x),
        "dx": torch.empty_like(x),
        "dresidual": torch.empty_like(x),
        "new_running_mean": channels["running_mean"],
        "new_running_var": channels["running_var"],
        # cuDNN reads these three scalars on the CPU.
        "eps": torch.full((1, 1, 1, 1), EPS, dtype=torch.float64),
        "momentum": torch.full((1, 1, 1, 1), MOMENTUM, dtype=torch.float64),
        "zero": torch.zeros((1, 1, 1, 1), dtype=x.dtype),
        "mask": torch.empty(
            (n, c // CHANNELS, h, w), dtype=torch.uint8, device=x.device,
            memory_format=torch.channels_last,
        ),
    }  # fmt: skip
    values |= {
        name: torch.empty_like(channels["weight"]) for name in ("mean", "rstd", "dweight", "dbias")
    }
    if inputs.residual is not None:
        values["residual"] = inputs.residual.detach()
    if inputs.gradients:
        values["dy"] = inputs.gradients[0]
    run_forward = builder.runner(forward, values)

    run_backward = builder.runner(backward, values) if inputs.gradients else None
    ran_forward = False

    def forward_call() -> Results:
        nonlocal ran_forward
        run_forward()
        ran_forward = True
        return (values["y"],)

    def backward_call() -> Results:
        assert run_backward is not None
        if not ran_forward:
            forward_call()  # stores the statistics and the mask
        run_backward()
        found = [values["dx"], values["dweight"].view(c), values["dbias"].view(c)]
        return found if inputs.residual is None else [*found, values["dresidual"]]

    version = builder.cudnn.backend_version()
    return Implementation(forward_call, backward_call, f"cuDNN {version}")


CUDNN_FRONTEND = Provider("cudnn-frontend", _prepare)

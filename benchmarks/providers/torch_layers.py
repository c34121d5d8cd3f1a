"""Provides torch's own operations, eager and compiled."""

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from benchmarks.cases import OpCase
from benchmarks.operations import EPS, Inputs, formula
from benchmarks.providers.base import Bind, Implementation, Provider, Unavailable, by_autograd


def chosen_backend(x: Tensor, training: bool) -> str:
    """Returns the backend that torch's batch norm selects: ``Native``, ``Cudnn`` or ``Miopen``."""
    channel = torch.ones(x.shape[1], device=x.device)
    return torch._C._select_batch_norm_backend(
        x, channel, channel, channel, channel, training, EPS
    ).name


def _eager(case: OpCase) -> Bind:
    training = case.direction != "eval"
    function = formula(case.site, training)

    def bind(inputs: Inputs) -> Implementation:
        backend = chosen_backend(inputs.x.detach(), training)
        return by_autograd(function, inputs, f"batch norm by {backend}")

    return bind


def _eager_fp16_cudnn(case: OpCase) -> Bind:
    if case.dtype != "bf16":
        raise Unavailable("only supports bf16 cases, and converts them to fp16")
    if not torch.cuda.is_available():
        raise Unavailable("needs a GPU")
    bind = _eager(case)

    def checked(inputs: Inputs) -> Implementation:
        implementation = bind(inputs)
        if "Cudnn" not in implementation.note:
            raise Unavailable(f"torch does not select cuDNN: {implementation.note}")
        return implementation

    return checked


def _compiled(case: OpCase, mode: str | None) -> Bind:
    if mode is not None and not torch.cuda.is_available():
        raise Unavailable("needs a GPU")
    plain = formula(case.site, case.direction != "eval")

    def function(inputs: Inputs) -> tuple[Tensor, ...]:
        outputs = plain(inputs)
        if len(outputs) == 2:
            # Both outputs are one tensor. Without the clone, autograd would add their gradients
            # outside the compiled graph.
            return outputs[0], outputs[1].clone()
        return outputs

    torch._dynamo.reset()
    compiled = torch.compile(function, dynamic=False, fullgraph=True, mode=mode)

    first = True

    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        nonlocal first
        if not first:
            return compiled(inputs)
        first = False
        # Backward runs many times after one forward. With donated_buffer, the first backward could
        # overwrite the tensors that forward saved.
        with functorch_config.patch(donated_buffer=False):
            return compiled(inputs)

    return lambda inputs: by_autograd(call, inputs)


EAGER = Provider("eager", _eager)
EAGER_FP16_CUDNN = Provider("eager-fp16-cudnn", _eager_fp16_cudnn, dtype="fp16")
COMPILE = Provider("compile", lambda case: _compiled(case, None))
# Inductor makes no CUDA graphs, because `benchmarks.clock` captures calls in a CUDA graph itself.
COMPILE_MAX_AUTOTUNE = Provider(
    "compile-max-autotune", lambda case: _compiled(case, "max-autotune-no-cudagraphs")
)

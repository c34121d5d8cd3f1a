"""Emulates TF32 on the CPU: rounds fp32 operands to 10 bits of mantissa where a GPU may do so.

With this emulation, tests that need full fp32 but do not disable TF32 fail even without a GPU.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, get_kernel
from triton._C.libtriton import ir
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

# Kept alive, because torch unregisters a library's kernels when the library is freed.
_LIBRARY = Library("aten", "IMPL")


def emulate() -> None:
    """Starts rounding the operands of CPU convolutions and matrix products, and of ``tl.dot``.

    The operands of ``tl.dot`` are rounded in triton's interpreter. The operands of torch's
    operations are rounded if torch's switches allow TF32 at the call.
    """
    for name, operands, allowed in (
        ("convolution", (0, 1), _in_convolutions),
        ("convolution_backward", (0, 1, 2), _in_convolutions),
        ("mm", (0, 1), _in_products),
        ("addmm", (1, 2), _in_products),
        ("bmm", (0, 1), _in_products),
        ("baddbmm", (1, 2), _in_products),
    ):
        function = _of_rounded_operands(f"aten::{name}", operands, allowed)
        _LIBRARY.impl(name, function, "CPU", with_keyset=True)
    InterpreterBuilder.create_dot = _dot_of_rounded_operands(InterpreterBuilder.create_dot)


def _in_convolutions() -> bool:
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


def _in_products() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _of_rounded_operands(
    operator: str, operands: tuple[int, ...], allowed: Callable[[], bool]
) -> Callable[..., Any]:
    kernel = get_kernel(operator, "CPU")

    def run(keys: Any, *arguments: Any, **options: Any) -> Any:
        if allowed():
            arguments = tuple(_rounded(a) if i in operands else a for i, a in enumerate(arguments))
        return kernel.call_boxed(keys, *arguments, **options)

    return run


def _dot_of_rounded_operands(create_dot: Callable[..., Any]) -> Callable[..., Any]:
    def run(builder: Any, a: Any, b: Any, acc: Any, precision: Any, *options: Any) -> Any:
        if precision == ir.INPUT_PRECISION.TF32 and a.data.dtype == "float32":
            a, b = (
                TensorHandle(_rounded(torch.from_numpy(h.data.copy())).numpy(), h.dtype)
                for h in (a, b)
            )
        return create_dot(builder, a, b, acc, precision, *options)

    return run


def _rounded(t: Tensor) -> Tensor:
    """Rounds an fp32 tensor to nearest, ties away from zero. Returns other dtypes unchanged."""
    if t.dtype != torch.float32:
        return t
    rounded = ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(t.isfinite(), rounded, t)

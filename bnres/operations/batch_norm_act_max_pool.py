"""Computes max_pool2d(act(batch_norm(x))), as in the stem of a ResNet."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bnres.backend import uses_kernels
from bnres.kernels.config import has_pool_kernel
from bnres.kernels.layout import dense
from bnres.operations.batch_norm_act import BATCH_NORM_ACT, as_call, batch_norm_act
from bnres.operations.call import call, needs_aten

Size = int | tuple[int, int]

# With again=None, `bnres.recompute` stores the output of this operation instead of recomputing it.
# In a ResNet this output is the residual of the first block. A block's output can be recomputed
# only if the block's residual is stored.
BATCH_NORM_ACT_MAX_POOL = replace(BATCH_NORM_ACT, again=None)


def batch_norm_act_max_pool2d(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    input_bias: Tensor | None = None,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    act: str | type[torch.nn.Module] | None = "relu",
    act_kwargs: dict[str, Any] | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    num_batches_tracked: Tensor | None = None,
    fork: bool = False,
) -> Any:
    """Computes ``max_pool2d(act(batch_norm(input + input_bias)))``, as in the stem of a ResNet.

    With a 3×3 window, stride 2 and padding 1, one kernel normalises, applies the activation and
    pools. The kernel does not write the activation's output to memory, but rounds it to the dtype
    of ``input`` before pooling. If the largest value of a window occurs several times, the gradient
    goes to the first of these positions. If a window contains NaN, the result for this window is
    NaN, as in `torch.nn.functional.max_pool2d`.

    `batch_norm_act` followed by torch's pooling runs instead of this kernel for:

    - other windows, strides or paddings, a dilation, or ``ceil_mode``
    - CPU tensors and fp64
    - an ``input`` with 2^31 − 2^24 elements or more
    - a contiguous ``input`` whose rows (of W elements) are not a multiple of 32 bytes long
    - `torch.vmap`, and programs that are exported or traced

    Args:
        input: (N, C, H, W), otherwise as in `batch_norm_act`.
        running_mean, running_var, weight, bias, input_bias: as in `batch_norm_act`.
        kernel_size, stride, padding, dilation, ceil_mode: as in
            `torch.nn.functional.max_pool2d`.
        act, act_kwargs, training, momentum, eps, num_batches_tracked, fork: as in
            `batch_norm_act`.

    Returns:
        (N, C, OH, OW) in the dtype and memory format of ``input``, where OH and OW are the height
        and width after pooling. With ``fork``, two such tensors.

    Raises:
        ValueError: if ``input`` is not 4-D, or if `batch_norm_act` raises it.
        TypeError: if `batch_norm_act` raises it.
        RuntimeError: if `torch.nn.functional.max_pool2d` rejects the window, or if
            `batch_norm_act` raises it.

    The batch norm and the max-pool are those of `torch.nn.functional.batch_norm` (Ioffe and
    Szegedy, arXiv 1502.03167) and `torch.nn.functional.max_pool2d`. The stem is from He et al.,
    arXiv 1512.03385.
    """
    if input.dim() != 4:
        raise ValueError(f"expected 4D input (got {input.dim()}D input)")
    pooling = (kernel_size, stride, padding, dilation, ceil_mode)
    fuses = uses_kernels(input) and is_stem(*pooling) and not needs_aten(input)
    x = dense(input) if fuses else input
    if not fuses or not has_pool_kernel(x.shape, x.is_contiguous(), x.itemsize):
        y = batch_norm_act(
            x, running_mean, running_var, weight, bias, input_bias=input_bias, act=act,
            act_kwargs=act_kwargs, training=training, momentum=momentum, eps=eps,
            num_batches_tracked=num_batches_tracked,
        )  # fmt: skip
        y = F.max_pool2d(y, *pooling)
        return (y, y) if fork else y
    arguments = as_call(
        x, running_mean, running_var, weight, bias, input_bias, None, None, act, act_kwargs,
        training, momentum, eps, num_batches_tracked, pools=True,
    )  # fmt: skip
    return call(BATCH_NORM_ACT_MAX_POOL, *arguments, fork)


def is_stem(
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
) -> bool:
    """Whether a max-pool has the window of a ResNet's stem: 3×3, stride 2, padding 1."""
    sizes = (kernel_size, kernel_size if stride is None else stride, padding, dilation)
    pairs = [(size, size) if isinstance(size, int) else tuple(size) for size in sizes]
    return pairs == [(3, 3), (2, 2), (1, 1), (1, 1)] and not ceil_mode

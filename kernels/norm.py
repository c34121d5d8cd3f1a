"""The per-channel tensors of a batch norm."""

from typing import NamedTuple

from torch import Tensor


class Norm(NamedTuple):
    """What one batch norm does to its channels, each tensor (C,).

    Where a launcher takes an ``eps`` beside it, ``rstd`` is a variance.
    """

    mean: Tensor
    rstd: Tensor
    weight: Tensor | None
    bias: Tensor | None

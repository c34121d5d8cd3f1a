"""Synchronised batch norm modules, and the conversion of models to and from these modules.

A synchronised batch norm uses the statistics of the batches of all ranks. A rank is a process of a
process group.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.lazy import LazyModuleMixin

from bnres.activations import CLASSES
from bnres.kernels.torch_internals import process_group_named
from bnres.nn.batchnorm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    BatchNormActMaxPool2d,
    _BatchNormAct,
    _FusedForward,
)
from bnres.nn.hooks import hooked, make_leaf
from bnres.nn.state import Norm, group_of, next_state, normalizes_by_batch
from bnres.operations.sync_batch_norm_act import group_named, sync_batch_norm


# This is not a subclass of torch.nn.SyncBatchNorm, because DistributedDataParallel refuses such
# subclasses on a CPU.
class _Synchronised(_FusedForward):
    """The base class of the synchronised modules. `SyncBatchNorm` explains synchronisation."""

    synchronises = True
    process_group: Any = None
    # The class and the child modules that the module had before its conversion.
    local_class: type[Norm]
    local_children: dict[str, nn.Module | None] | None = None

    def _check_input_dim(self, input: Tensor) -> None:
        """Accepts any number of dimensions, because the operation checks the number."""

    def __getstate__(self) -> dict[str, Any]:
        # A process group can be neither copied nor pickled, so its name is stored instead.
        group = self.process_group
        return self.__dict__ | {"process_group": None if group is None else group.group_name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.process_group is not None:
            self.process_group = process_group_named(self.process_group)


class SyncBatchNorm(_Synchronised):
    """Computes y = (x − mean) / sqrt(var + eps) · weight + bias, with the statistics of all ranks.

    The mean and var of a channel are computed over the batches of all ranks. A rank is a process of
    the process group. `bnres.functional.sync_batch_norm_act` computes y, on GPUs and CPUs. As in
    torch, the module works like an ordinary batch norm in eval mode, with only one rank, and if
    `torch.distributed` is not initialised.

    This module can do more than torch's module:

    - It accepts empty batches without making the host wait for the device.
    - ``torch.compile(fullgraph=True)`` can capture it.
    - It allows several forward passes before a backward pass, even if DistributedDataParallel
      broadcasts the buffers before each forward pass.

    The call is ``forward(input, residual=None, *, residual_norm=None, fork=False)``, as in
    `BatchNormAct2d`, but without an activation. If ``residual_norm`` is synchronised over the same
    group, both batch norms share one all_gather.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as in
            `torch.nn.BatchNorm2d`.
        process_group: the process group of the participating ranks. By default all ranks
            participate.

    The input has 2 to 5 dimensions, from (N, C) to (N, C, D, H, W), in fp16, bf16, fp32 or fp64.

    Raises:
        TypeError: if ``process_group`` is not a process group that this process belongs to.

    The batch norm is that of `torch.nn.SyncBatchNorm` (Ioffe and Szegedy, arXiv 1502.03167).
    """

    local_class = BatchNorm2d

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        self.process_group = process_group and group_named(process_group)

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        *,
        residual_norm: Norm | None = None,
        fork: bool = False,
    ) -> Any:
        if is_compiling() and residual is None and not fork:
            return as_node(self, input)
        return super().forward(input, residual, residual_norm=residual_norm, fork=fork)


def as_node(bn: Norm, input: Tensor) -> Tensor:
    """Computes what ``bn`` computes, so that `bnres.fuse` sees one node in the captured graph."""
    s, group = next_state(bn), group_of(bn)
    return sync_batch_norm(
        input, s.running_mean, s.running_var, s.weight, s.bias, normalizes_by_batch(bn), s.momentum,
        s.eps, s.num_batches_tracked, "" if group is None else group.group_name,
    )  # fmt: skip


class CapturedSyncBatchNorm(nn.SyncBatchNorm):
    """The class that `bnres.fuse` gives to torch's SyncBatchNorms in a fused model.

    Copies and pickles of such a module have torch's class.
    """

    __module__ = nn.SyncBatchNorm.__module__  # makes torch.fx trace a call as one node

    def forward(self, input: Tensor) -> Tensor:
        return as_node(self, input)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        make, (_, *others), *state = reduced
        return make, (nn.SyncBatchNorm, *others), *state


def make_nodes(model: nn.Module) -> None:
    """Changes the class of torch's SyncBatchNorms in a model to `CapturedSyncBatchNorm`."""
    for module in model.modules():
        if type(module) is nn.SyncBatchNorm:
            module.__class__ = CapturedSyncBatchNorm


class SyncBatchNormAct(_Synchronised, _BatchNormAct):
    """Computes act(bn(input) + residual), where bn is a `SyncBatchNorm`.

    The call is ``forward(input, residual=None, *, residual_norm=None, fork=False)``, as in
    `BatchNormAct2d`. ``options`` are the other arguments of `BatchNormAct2d`.

    Raises:
        ValueError: for an unknown activation or option.
        TypeError: if ``process_group`` is not a process group that this process belongs to.

    The batch norm is that of `torch.nn.SyncBatchNorm` (Ioffe and Szegedy, arXiv 1502.03167).
    """

    local_class = BatchNormAct2d

    def __init__(self, num_features: int, *, process_group: Any = None, **options: Any) -> None:
        super().__init__(num_features, **options)
        self.process_group = process_group and group_named(process_group)


class SyncBatchNormActMaxPool2d(_Synchronised, BatchNormActMaxPool2d):
    """Computes max_pool2d(act(bn(input))), as in a ResNet's stem, where bn is a `SyncBatchNorm`.

    ``process_group`` is as in `SyncBatchNorm`, and the other arguments are as in
    `BatchNormActMaxPool2d`.

    Raises:
        ValueError: for an unknown activation or option.
        TypeError: if ``process_group`` is not a process group that this process belongs to.

    The batch norm and the max-pool are those of `torch.nn.SyncBatchNorm` (Ioffe and Szegedy, arXiv
    1502.03167) and `torch.nn.MaxPool2d`.
    """

    local_class = BatchNormActMaxPool2d
    _check_input_dim = nn.BatchNorm2d._check_input_dim

    def __init__(
        self, num_features: int, *args: Any, process_group: Any = None, **options: Any
    ) -> None:
        super().__init__(num_features, *args, **options)
        self.process_group = process_group and group_named(process_group)

    def forward(self, input: Tensor, *, fork: bool = False) -> Any:  # type: ignore[override]
        if group_of(self) is None:
            return BatchNormActMaxPool2d.forward(self, input, fork=fork)
        y = _FusedForward.forward(self, input)
        y = F.max_pool2d(
            y, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode
        )
        return (y, y) if fork else y


class _SyncBatchNormThenAct(SyncBatchNorm):
    """A converted batch norm of timm whose child modules ``drop`` and ``act`` can't be fused."""

    def forward(self, input: Tensor) -> Any:  # type: ignore[override]
        return self._modules["act"](self._modules["drop"](super().forward(input)))  # type: ignore[misc]


CONVERTED: dict[type[Norm], type[_Synchronised]] = {
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), SyncBatchNorm),
    nn.SyncBatchNorm: SyncBatchNorm,
    **dict.fromkeys((BatchNorm1d, BatchNorm2d, BatchNorm3d), SyncBatchNorm),
    **dict.fromkeys((BatchNormAct1d, BatchNormAct2d, BatchNormAct3d), SyncBatchNormAct),
    BatchNormActMaxPool2d: SyncBatchNormActMaxPool2d,
}
OF_TIMM = ("BatchNormAct2d", "SyncBatchNormAct")


def convert_sync_batchnorm(module: nn.Module, process_group: Any = None) -> nn.Module:
    """Makes the batch norms of ``module`` use the statistics of all ranks, and returns ``module``.

    A rank is a process. The batch norms of torch, of timm and of `bnres.nn` are converted in place
    by changing their class. Torch's SyncBatchNorm is converted too. `SyncBatchNorm` describes what
    a converted batch norm computes. The conversion keeps parameters, buffers, the keys of the state
    dict, training or eval mode, hooks, activations, residuals and pooling.

    `revert_sync_batchnorm` undoes the conversion. A model can be converted before or after
    `bnres.fuse`.

    Args:
        module: a model or a batch norm.
        process_group: the process group of the ranks that share statistics. By default, a batch
            norm that is already synchronised keeps its group, and all others use all ranks.

    Raises:
        TypeError: if ``module`` is not a module, if ``process_group`` is not a process group that
            this process belongs to, or if the forward of a batch norm is not that of torch, timm or
            `bnres.nn`. In each case no module has been changed.

    Use this function instead of `torch.nn.SyncBatchNorm.convert_sync_batchnorm`.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    group = process_group and group_named(process_group)
    norms: dict[str, Any] = {n: m for n, m in module.named_modules() if isinstance(m, Norm)}
    for norm, cls in [(norm, _converted(name, norm)) for name, norm in norms.items()]:
        if not isinstance(norm, _Synchronised):
            _become(norm, cls)
        norm.process_group = group or norm.process_group
    return module


def _converted(name: str, norm: Norm) -> type[_Synchronised]:
    """Returns the class to which ``norm`` is converted. ``name`` is for the error message."""
    cls = type(norm)
    if "forward" not in vars(norm) and not isinstance(norm, LazyModuleMixin):
        if isinstance(norm, _Synchronised):
            return cls  # type: ignore[return-value]
        for base in cls.__mro__:
            if base in CONVERTED and cls.forward is base.forward:  # type: ignore[attr-defined]
                return CONVERTED[base]
        if cls.__module__.startswith("timm.") and cls.__name__ in OF_TIMM:
            drop, act = norm._modules["drop"], norm._modules["act"]
            fuses = type(drop) is nn.Identity and type(act) in CLASSES and not hooked(drop, act)
            return SyncBatchNormAct if fuses else _SyncBatchNormThenAct
    found = f"contains {name}, a {cls.__name__}" if name else f"is a {cls.__name__}"
    raise TypeError(
        f"module {found}: its forward is not that of an initialised batch norm of torch, timm or "
        "bnres.nn, so it can't be converted"
    )


def _become(norm: Any, cls: type[_Synchronised]) -> None:
    """Changes the class of ``norm`` to ``cls``.

    The activation module of a timm batch norm is removed if ``cls`` fuses the activation.
    """
    local_class, act = type(norm), norm._modules.get("act")
    norm.__class__ = cls
    make_leaf(norm)
    norm.local_class = local_class
    if act is not None and cls is SyncBatchNormAct:
        # The children are kept for `revert_sync_batchnorm`. They have no parameters.
        norm.local_children = dict(norm._modules)
        norm._modules.clear()
        options = ("negative_slope", "approximate")
        norm.act, norm.act_kwargs = (
            type(act),
            {k: getattr(act, k) for k in options if hasattr(act, k)},
        )


def revert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Restores the batch norms that `convert_sync_batchnorm` converted, and returns ``module``.

    A module that was created as a synchronised batch norm becomes one that is not synchronised:

    - A `bnres.nn.SyncBatchNorm` becomes a `bnres.nn.BatchNorm2d`.
    - A `bnres.nn.SyncBatchNormAct` becomes a `bnres.nn.BatchNormAct2d`.
    - A `bnres.nn.SyncBatchNormActMaxPool2d` becomes a `bnres.nn.BatchNormActMaxPool2d`.

    Raises:
        TypeError: if ``module`` is not a module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    for norm in module.modules():
        if not isinstance(norm, _Synchronised):
            continue
        cls, children, own = norm.local_class, norm.local_children, vars(norm)
        for name in ("local_class", "local_children"):
            own.pop(name, None)
        if children:
            del own["act"], own["act_kwargs"]
            norm._modules.update(children)
        if not issubclass(cls, _FusedForward):
            del own["__module__"]
        if not issubclass(cls, nn.SyncBatchNorm):
            del own["process_group"]
        norm.__class__ = cls  # type: ignore[assignment]
    return module

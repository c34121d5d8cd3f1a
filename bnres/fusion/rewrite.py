"""fuse, unfuse and explain."""

import copy
from dataclasses import dataclass, field

import torch
from torch import nn

from bnres.fusion.calls import NORMS, SWAPS
from bnres.fusion.forward import FusedForward, Variant, rewrite
from bnres.fusion.patterns import Match
from bnres.fusion.report import FusionReport, Site
from bnres.fusion.trace import NotProvedError
from bnres.nn import BatchNormActMaxPool2d
from bnres.nn.batchnorm import _BatchNormAct, _FusedForward
from bnres.nn.handout import LINKED
from bnres.nn.hooks import hooked

_SWAPPED = "_bnres_swapped"


@dataclass
class Plan:
    """What would be done to a model.

    Attributes:
        forwards: modules that get another forward.
        matches: the fused calls, by the name of the module whose forward holds them.
        sites: the report's rows.
        swaps: batch norms that get another class.
        links: modules of which the second alone takes the first one's output.
        calls: how often the forwards call each module.
    """

    forwards: dict[str, list[Variant]] = field(default_factory=dict)
    matches: dict[str, list[Match]] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)
    swaps: list[nn.Module] = field(default_factory=list)
    links: list[tuple[nn.Module, nn.Module]] = field(default_factory=list)
    calls: dict[nn.Module, int] = field(default_factory=dict)


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _has_own_forward(module: nn.Module) -> bool:
    """Whether a module's class says how its children are called."""
    if isinstance(module, torch.jit.ScriptModule) or not module._modules:
        return False
    of_torch = type(module).__module__.split(".")[0] == "torch"
    return isinstance(module, nn.Sequential) or not of_torch


def make_plan(model: nn.Module) -> Plan:
    """What can be fused in a model, without changing it."""
    plan = Plan()
    patterns: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        if not _has_own_forward(module) or not any(type(m) in NORMS for m in module.modules()):
            continue
        direct = [_joined(name, n) for n, c in module.named_children() if type(c) in NORMS]
        try:
            if "forward" in vars(module):
                raise NotProvedError("its forward was replaced")
            variants, found = rewrite(module)
        except NotProvedError as error:
            where = name or "the model"
            reasons.update({norm: f"{where}: {error}" for norm in direct})
            continue
        for called, count in found.calls.items():
            child = module.get_submodule(called)
            plan.calls[child] = plan.calls.get(child, 0) + count
        plan.links += [tuple(map(module.get_submodule, link)) for link in found.links]  # type: ignore[misc]
        reasons.update({_joined(name, norm): reason for norm, reason in found.reasons.items()})
        if found.matches:
            plan.forwards[name], plan.matches[name] = variants, found.matches
        for match in found.matches:
            for branch in match.branches:
                patterns.setdefault(_joined(name, branch.norm), match.pattern)
    for name, module in model.named_modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        kind = type(module)
        if name in patterns:
            plan.sites.append(Site(name, patterns[name], reasons.get(name, "")))
        elif isinstance(module, _FusedForward):
            plan.sites.append(Site(name, "bn-act" if module.act else "bn", "fused by its class"))
        elif kind not in SWAPS:
            plan.sites.append(Site(name, "-", f"class {kind.__name__}", fused=False))
        elif hooked(module):
            plan.sites.append(Site(name, "-", f"a hook waits on {name}", fused=False))
        else:
            plan.swaps.append(module)
            plan.sites.append(Site(name, "bn", reasons.get(name, "")))
    return plan


def explain(model: nn.Module) -> FusionReport:
    """What `fuse` would do to a model, which stays as it is.

    Args:
        model: any module.

    Returns:
        A report with a row for each batch norm.
    """
    return FusionReport(make_plan(model).sites)


def fuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The same model with fused operations: same parameters, keys, classes and results.

    Convolution, batch norm, residual addition, activation and max-pool become one operation where
    the forward of the module that holds them is proved to allow it (`torch.fx`); every other batch
    norm becomes a fused one by itself. A module's mode, momentum, eps and hooks count at the time
    of the call. `explain` says what is fused and why something is not.

    Args:
        model: any module, in any mode, on any device.
        inplace: change ``model`` itself in place of a copy.

    Returns:
        The fused model, ``model`` itself with ``inplace``. `unfuse` gives the stock one back.

    A residual block whose output another one takes gets the gradients of its two uses apart, so
    `torch.autograd.grad` with respect to such an output itself sees one of them. Hooks and
    ``retain_grad`` on it are noticed, and see the whole.

    Fused modules carry their forward as an attribute, which replicas of `torch.nn.DataParallel`
    would share: use `torch.nn.parallel.DistributedDataParallel`.
    """
    model = _stripped(model, inplace)
    plan = make_plan(model)
    modules = dict(model.named_modules())
    for name, variants in plan.forwards.items():
        setattr(modules[name], "forward", FusedForward(modules[name], variants))  # noqa: B010
        setattr(modules[name], LINKED, False)
    for producer, consumer in plan.links:
        ends = _end(producer, -1), _end(consumer, 0)
        rewritten = all(isinstance(vars(end).get("forward"), FusedForward) for end in ends)
        if rewritten and plan.calls.get(ends[0]) == 1:
            setattr(ends[0], LINKED, True)
    for module in plan.swaps:
        stock = type(module)
        setattr(module, _SWAPPED, stock)
        module.__class__ = SWAPS[stock]
    return model


def _end(module: nn.Module, index: int) -> nn.Module:
    """The first (0) or last (-1) module that a Sequential calls, or the module itself."""
    while isinstance(module, nn.Sequential) and len(module):
        module = module[index]
    return module


def unfuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The stock model that `fuse` made a fused one of; the models of bnres become stock ones too.

    A `bnres.nn.BatchNormAct2d` of another's module stays: its forward relies on it.

    Args:
        model: a fused model; another one comes back as it is (or copied).
        inplace: change ``model`` itself in place of a copy.
    """
    model = _stripped(model, inplace)
    for module in list(model.modules()):
        # Their children are called in the order in which they have them.
        if isinstance(module, nn.Sequential) or type(module).__module__.startswith("bnres.models."):
            _expand(module)
    return model


def _stripped(model: nn.Module, inplace: bool) -> nn.Module:
    """A model without what `fuse` put into it."""
    if not inplace:
        model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(vars(module).get("forward"), FusedForward):
            del vars(module)["forward"]
            vars(module).pop(LINKED, None)
        stock = vars(module).pop(_SWAPPED, None)
        if stock is not None:
            module.__class__ = stock
    return model


def _expand(module: nn.Module) -> None:
    """Gives the Identities after fused batch norms back what these took in."""
    children = [(name, child) for name, child in module._modules.items() if child is not None]
    for i, (_, norm) in enumerate(children):
        if not isinstance(norm, _BatchNormAct):
            continue
        room = 2 if isinstance(norm, BatchNormActMaxPool2d) else int(norm.act is not None)
        places = [
            name for name, child in children[i + 1 : i + 1 + room] if type(child) is nn.Identity
        ]
        if len(places) == room:
            for place, layer in zip(places, norm.to_stock(), strict=False):
                setattr(module, place, layer)

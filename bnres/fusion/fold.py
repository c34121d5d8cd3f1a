"""Folds batch norms into convolutions, for inference."""

import copy

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bnres.fusion.rewrite import _joined, fuse, make_plan, unfuse


def fold(model: nn.Module) -> nn.Module:
    """A copy for inference: batch norms behind convolutions are folded into their weights.

    What follows them, residual and activation, goes into the convolution's epilogue; batch norms
    that stand elsewhere are fused as `bnres.fuse` does it. The folded ones become
    `torch.nn.Identity` and their keys are gone.

    Args:
        model: any module in eval mode, fused or not; it stays as it is.

    Raises:
        ValueError: for a model, or a batch norm of it, in training mode.
    """
    norms = nn.modules.batchnorm._BatchNorm
    for name, module in model.named_modules():
        if module.training and (not name or isinstance(module, norms)):
            raise ValueError(
                f"model must be in eval mode to be folded, but {name or 'it'} is in training mode: "
                "call model.eval() first"
            )
    model = unfuse(model)
    plan = make_plan(model)
    fused = fuse(model, inplace=True)
    calls = _use_counts(fused)
    for holder, matches in plan.matches.items():
        root = fused.get_submodule(holder)
        for match in matches:
            for branch in match.branches:
                if branch.conv is None:
                    continue
                conv, norm = root.get_submodule(branch.conv), root.get_submodule(branch.norm)
                if calls.get(id(conv)) == calls.get(id(norm)) == 1 and _has_statistics(norm):
                    assert isinstance(conv, nn.Conv2d) and isinstance(norm, norms)
                    fused.set_submodule(
                        _joined(holder, branch.conv), fuse_conv_bn_eval(conv, _plain(norm))
                    )
                    fused.set_submodule(_joined(holder, branch.norm), nn.Identity())
    return fused


def _has_statistics(norm: nn.Module) -> bool:
    return getattr(norm, "running_mean", None) is not None and not norm.training


def _use_counts(model: nn.Module) -> dict[int, int]:
    """Under how many names each module goes."""
    counts: dict[int, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        counts[id(module)] = counts.get(id(module), 0) + 1
    return counts


def _plain(norm: nn.modules.batchnorm._BatchNorm) -> nn.modules.batchnorm._BatchNorm:
    """A batch norm with weight and bias, which torch's fusion asks for."""
    if norm.affine:
        return norm
    plain = copy.copy(norm)
    plain._parameters = dict(norm._parameters)
    return plain

"""Folds batch norms into convolutions, for inference."""

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bnres.fusion.calls import FoldedNorm
from bnres.fusion.rewrite import _joined, fuse, make_plan, unfuse


def fold(model: nn.Module) -> nn.Module:
    """A copy for inference: batch norms behind convolutions are folded into their weights.

    What follows them, residual and activation, goes into the convolution's epilogue; batch norms
    that stand elsewhere are fused as `bnres.fuse` does it. The folded ones become
    identities and their keys are gone.

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
    names = [module for _, module in fused.named_modules(remove_duplicate=False)]
    for holder, matches in plan.matches.items():
        root = fused.get_submodule(holder)
        for match in matches:
            for branch in match.branches:
                if branch.conv is None or branch.is_sequential:
                    continue  # a Sequential's own forward holds it
                pair = root.get_submodule(branch.conv), root.get_submodule(branch.norm)
                once = all(plan.calls.get(m) == 1 and names.count(m) == 1 for m in pair)
                if once and _has_statistics(pair[1]):
                    folded = fuse_conv_bn_eval(*pair)  # type: ignore[arg-type, type-var]
                    fused.set_submodule(_joined(holder, branch.conv), folded)
                    fused.set_submodule(_joined(holder, branch.norm), FoldedNorm())
    return fused


def _has_statistics(norm: nn.Module) -> bool:
    return getattr(norm, "running_mean", None) is not None and not norm.training

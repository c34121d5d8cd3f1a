"""Folds batch norms into convolutions, for export and for the CPU."""

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bnres.fusion.rewrite import _joined, make_plan, unfuse


def fold(model: nn.Module) -> nn.Module:
    """A copy of torch's own modules in which convolutions have taken in the batch norms after them.

    A folded batch norm becomes an `nn.Identity`, and its keys are gone; everything else stays as it is.
    The copy loads and exports without bnres. On a GPU ``bnres.fuse(model).eval()`` moves less memory.

    Args:
        model: any module in eval mode, fused or not; it is not changed.

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
    folded = unfuse(model)
    plan = make_plan(folded)
    names = [module for _, module in folded.named_modules(remove_duplicate=False)]
    for holder, matches in plan.matches.items():
        root = folded.get_submodule(holder)
        for branch in (branch for match in matches for branch in match.branches):
            if branch.conv is None or branch.is_sequential:
                continue  # a Sequential's own forward holds it
            pair = root.get_submodule(branch.conv), root.get_submodule(branch.norm)
            once = all(plan.calls.get(m) == 1 and names.count(m) == 1 for m in pair)
            if once and getattr(pair[1], "running_mean", None) is not None:
                conv = fuse_conv_bn_eval(*pair)  # type: ignore[arg-type, type-var]
                folded.set_submodule(_joined(holder, branch.conv), conv)
                folded.set_submodule(_joined(holder, branch.norm), nn.Identity())
    return folded

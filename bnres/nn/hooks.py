"""Whether calling a module does more than its forward."""

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooked(*modules: nn.Module | None) -> bool:
    """Whether a hook, or a replaced forward, waits for a call of one of the modules.

    A fused call would pass it by. A forward that `bnres.fuse` has put there is none.
    """
    if _has_any_global_hook():
        return True
    for module in modules:
        if module is None:
            continue
        forward = vars(module).get("forward")
        if forward is not None and not getattr(forward, "of_bnres", False):
            return True
        if any(getattr(module, name) for name in HOOKS):
            return True
    return False

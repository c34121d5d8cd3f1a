"""Whether calling a module does more than its forward."""

from torch import nn

from bnres.kernels.torch_internals import has_global_hooks

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooked(*modules: nn.Module | None) -> bool:
    """Whether one of the modules has a hook or a replaced forward.

    A fused call would not run it.
    """
    if has_global_hooks():
        return True
    for module in modules:
        if module is None:
            continue
        if "forward" in vars(module) or any(getattr(module, name) for name in HOOKS):
            return True
    return False

"""Whether calling a module does more than its forward."""

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooked(*modules: nn.Module | None) -> bool:
    """Whether a hook waits for a call of one of the modules; a fused call would pass it by."""
    return _has_any_global_hook() or any(
        getattr(module, name) for module in modules if module is not None for name in HOOKS
    )

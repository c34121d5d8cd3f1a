"""What a call of a module involves besides its forward: hooks and torch.fx's traces."""

from torch import nn

from bnres.kernels.torch_internals import has_global_hooks

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def make_leaf(module: nn.Module) -> None:
    """Makes torch.fx trace a call of ``module``, with its hooks, as one node, like torch's layers.

    `torch.fx.Tracer.is_leaf_module` reads the instance's ``__module__``. The class keeps its
    ``__module__``, which pickle needs.
    """
    module.__module__ = "torch.nn"


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

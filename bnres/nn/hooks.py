"""What calling a module does besides its forward: hooks, and torch.fx's traces."""

from torch import nn

from bnres.kernels.torch_internals import has_global_hooks

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def make_leaf(module: nn.Module) -> None:
    """Makes calls of ``module`` nodes of torch.fx's graphs, hooks included, as those of torch's own layers.

    `torch.fx.Tracer.is_leaf_module` asks where a module is from. It asks the instance, so the class keeps
    its place, by which it is pickled.
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

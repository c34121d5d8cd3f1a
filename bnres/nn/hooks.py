"""Detects hooks on modules, and makes torch.fx trace a module as one node."""

from torch import nn

from bnres.kernels.torch_internals import has_global_hooks

# These instance attributes of a module change what its call does, unless they are None or empty.
# `Module.compile` sets ``_compiled_call_impl``.
CHANGES = (
    "forward", "_compiled_call_impl",
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


def make_leaf(module: nn.Module) -> None:
    """Makes torch.fx trace a call of ``module``, including its hooks, as one node.

    torch.fx recognises torch's layers by ``__module__``, and traces each as one node. The attribute
    is set on the instance, because pickle needs the class's own ``__module__``.
    """
    module.__module__ = "torch.nn"


def hooked(*modules: nn.Module | None) -> bool:
    """Whether any of the modules has a hook or an instance attribute that replaces its call.

    A fused operation would run neither the hook nor the replacement. A global hook counts as a hook
    of every module.
    """
    return has_global_hooks() or any(
        module is not None and any(map(vars(module).get, CHANGES)) for module in modules
    )

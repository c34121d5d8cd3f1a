"""Detects hooks on modules, and makes torch.fx trace a module as one node."""

from torch import nn

from bnres.kernels.torch_internals import has_global_hooks

# If one of these instance attributes of a module is neither None nor empty, it changes the module's
# call. `Module.compile` sets ``_compiled_call_impl``.
CHANGES = (
    "forward", "_compiled_call_impl",
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


def make_leaf(module: nn.Module) -> None:
    """Makes torch.fx trace a call of ``module``, including its hooks, as one node.

    torch.fx does the same with torch's layers. `torch.fx.Tracer.is_leaf_module` reads
    ``__module__`` from the instance. The ``__module__`` of the class does not change, because
    pickle needs it.
    """
    module.__module__ = "torch.nn"


def hooked(*modules: nn.Module | None) -> bool:
    """Whether one of the modules has a hook, or an instance attribute that replaces its call.

    A fused call would run neither the hook nor the replaced call.
    """
    return has_global_hooks() or any(
        module is not None and any(map(vars(module).get, CHANGES)) for module in modules
    )

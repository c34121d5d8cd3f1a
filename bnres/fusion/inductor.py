"""The Inductor pass that fuses batch norms."""

import glob
from contextlib import AbstractContextManager
from typing import Any

from torch import fx
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

import bnres
from bnres.fusion.rewrite import fuse_graph
from bnres.recipes import recomputes
from bnres.routes import conv_route


class FusePass(CustomGraphPass):
    """A ``pre_grad_custom_pass`` that runs the passes in ``before``, and then fuses batch norms."""

    def __init__(self, before: Any) -> None:
        self.before = before if isinstance(before, list | tuple) else [before] if before else []

    def __call__(self, graph: fx.Graph) -> None:
        for each in self.before:
            each(graph)
        fuse_graph(graph.owning_module)  # type: ignore[arg-type]

    def uuid(self) -> Any:
        """Returns the key of this pass in torch's caches of compiled code.

        If one of the passes in ``before`` has no key, the result is None, and torch uses no cache.
        """
        others = [each.uuid() if hasattr(each, "uuid") else None for each in self.before]
        if None in others:
            return None
        # Path.rglob would leave out bnres/kernels, which is a symbolic link in a checkout.
        sources = glob.glob(f"{glob.escape(bnres.__path__[0])}/**/*.py", recursive=True)
        return (
            get_hash_for_files(tuple(sorted(sources))),
            bnres.backend(),
            conv_route(),
            recomputes(),
            *others,
        )


def with_pass() -> AbstractContextManager[None]:
    """Returns a context in which Inductor runs a `FusePass` after the user's passes."""
    return config.patch(pre_grad_custom_pass=FusePass(config.pre_grad_custom_pass))

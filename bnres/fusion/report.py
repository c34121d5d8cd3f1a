"""The report of what is fused, what is not fused, and why."""

import re
from dataclasses import dataclass

# The meaning of each part of a pattern.
MEANINGS = {
    "conv": "the convolution before the batch norm; in a pattern with +bn or pool, only its bias",
    "bn": "batch norm",
    "+bn": "batch norm of the residual",
    "add": "addition",
    "act": "activation",
    "pool": "the max-pool of a ResNet's stem",
    "-": "not fused: the model's own batch norm runs",
}


@dataclass(frozen=True)
class Site:
    """One batch norm of a model.

    Attributes:
        name: the qualified name of the batch norm's module.
        pattern: the operations that are fused, such as ``conv-bn-act``. ``bn`` means that our
            operation computes only the batch norm. ``-`` means that the batch norm is not fused.
        reason: why the batch norm is not fused, or not with more operations. It may be empty.
        fused: whether one of our operations computes the batch norm.
    """

    name: str
    pattern: str
    reason: str = ""
    fused: bool = True


@dataclass(frozen=True)
class FusionReport:
    """A report with a row for each batch norm of a model, in the order of the model's modules."""

    sites: list[Site]

    @property
    def fused(self) -> list[Site]:
        return [site for site in self.sites if site.fused]

    def __str__(self) -> str:
        width = max([len(site.name) for site in self.sites], default=0)
        depth = max([len(site.pattern) for site in self.sites], default=0)
        rows = [
            f"{site.name:<{width}}  {site.pattern:<{depth}}  {site.reason}".rstrip()
            for site in self.sites
        ]
        found = {p for site in self.sites for p in re.findall(r"\+?\w+|^-$", site.pattern)}
        legend = [f"{part:<4}  {meaning}" for part, meaning in MEANINGS.items() if part in found]
        if self.fused:
            legend.insert(0, "One operation computes everything in a pattern:")
        count = f"{len(self.fused)} of {len(self.sites)} batch norms are fused"
        return "\n".join([*rows, "", *legend, "", count] if rows else [count])

"""What is fused, what is not, and why."""

import re
from dataclasses import dataclass

# What the parts of a pattern stand for.
MEANINGS = {
    "conv": "the convolution before it; in a pattern with +bn or pool only its bias",
    "bn": "batch norm",
    "+bn": "the batch norm of what is added",
    "add": "addition",
    "act": "activation",
    "pool": "the max-pool of a ResNet's stem",
    "-": "not fused: the model's own batch norm runs",
}


@dataclass(frozen=True)
class Site:
    """One batch norm of a model.

    Attributes:
        name: its qualified name.
        pattern: what it is fused with, such as ``conv-bn-act``; ``bn`` runs as our operation with
            nothing else in it.
        reason: why it is not fused, or not with more; may be empty.
        fused: whether one of our operations runs it.
    """

    name: str
    pattern: str
    reason: str = ""
    fused: bool = True


@dataclass(frozen=True)
class FusionReport:
    """A row for each batch norm of a model, in the order of its modules."""

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
            legend.insert(0, "One operation runs all that a pattern names:")
        count = f"{len(self.fused)} fused sites of {len(self.sites)}"
        return "\n".join([*rows, "", *legend, "", count] if rows else [count])

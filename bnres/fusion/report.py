"""What is fused, what is not, and why."""

from dataclasses import dataclass


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
        return "\n".join([*rows, f"{len(self.fused)} fused sites of {len(self.sites)}"])

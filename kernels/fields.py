"""Dataclasses of numbers, which operators take as tuples."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Numbers:
    """A dataclass whose fields are whole numbers."""

    def as_tuple(self) -> tuple[int, ...]:
        """The fields in order."""
        # torch.compile cannot trace dataclasses.astuple everywhere: it copies deeply.
        return tuple([getattr(self, field.name) for field in fields(self)])

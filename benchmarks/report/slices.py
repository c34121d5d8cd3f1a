"""Groups the results that are compared with each other."""

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.cases import BASELINE, PROVIDERS
from benchmarks.store import Record

OPERATION_TITLES = {
    "bn": "BN",
    "bn_relu": "BN+ReLU",
    "bn_add_relu": "BN+add+ReLU",
    "bn_add_relu_fork": "BN+add+ReLU, two gradients",
    "dual_bn_add_relu": "BN+BN+add+ReLU",
    "bn_relu_pool": "BN+ReLU+max-pool",
    "conv_bn_relu": "conv+BN+ReLU",
    "conv_bn_add_relu": "conv+BN+add+ReLU",
}


@dataclass(frozen=True)
class Subject:
    """Results of cases that differ only in the provider, which is the measured implementation.

    Attributes:
        name: the cases' common id, without the provider. See `benchmarks.cases.OpCase.subject`.
        records: the measured records by provider.
    """

    name: str
    records: dict[str, Record]

    @property
    def any(self) -> Record:
        """The first record. It is used for fields that are equal in all records."""
        return next(iter(self.records.values()))

    def ratio(self, provider: str, other: str = BASELINE) -> float | None:
        """Returns the speed-up of a provider over ``other``, or None if either has no record."""
        ours, theirs = self.records.get(provider), self.records.get(other)
        return theirs["median"] / ours["median"] if ours and theirs else None


def subjects(records: Iterable[Record], suite: str) -> list[Subject]:
    """Groups a suite's measured records into subjects, ordered by each subject's first record."""
    found: dict[str, dict[str, Record]] = {}
    for record in records:
        if record["suite"] == suite and record["status"] == "measured":
            found.setdefault(record["subject"], {})[record["provider"]] = record
    return [Subject(name, by_provider) for name, by_provider in found.items()]


def providers_in(found: Iterable[Subject]) -> list[str]:
    """Returns the providers that have results, in the order of `PROVIDERS`."""
    present = {name for subject in found for name in subject.records}
    return [name for name in PROVIDERS if name in present]


def setting(subject: Subject) -> tuple[str, str, int]:
    """Returns a subject's layout, dtype and batch size. All rows of a table share them."""
    record = subject.any
    return record["layout"], record["dtype"], record["batch"]


def main_setting(found: list[Subject]) -> list[Subject]:
    """Returns the subjects that have the most common `setting`."""
    settings = [setting(subject) for subject in found]
    best = max(settings, key=settings.count)
    return [subject for subject in found if setting(subject) == best]

"""Groups results into the sets that are compared with each other."""

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
    """Results of several providers for the same subject.

    Attributes:
        name: the subject, see `benchmarks.cases.OpCase.subject`.
        records: the measured records by provider.
    """

    name: str
    records: dict[str, Record]

    @property
    def any(self) -> Record:
        """Any one of the records, for fields that are the same in all."""
        return next(iter(self.records.values()))

    def ratio(self, provider: str, other: str = BASELINE) -> float | None:
        """Returns the speed-up of a provider over ``other``, or None if either has no record."""
        ours, theirs = self.records.get(provider), self.records.get(other)
        return theirs["median"] / ours["median"] if ours and theirs else None


def subjects(records: Iterable[Record], suite: str) -> list[Subject]:
    """Returns the measured subjects of a suite, in the order of their first record."""
    found: dict[str, dict[str, Record]] = {}
    for record in records:
        if record["suite"] == suite and record["status"] == "measured":
            found.setdefault(record["subject"], {})[record["provider"]] = record
    return [Subject(name, by_provider) for name, by_provider in found.items()]


def steps_with_groups(records: Iterable[Record]) -> list[Record]:
    """Returns the records of steps with their kernel time by group, as ``groups``.

    The kernel times come from the suite ``groups``; in older runs the record of a step has them.
    Steps without kernel times are omitted.
    """
    shared = ("net", "image", "batch", "layout", "dtype", "provider", "smoke")
    records = [record for record in records if record["status"] == "measured"]
    groups = {
        tuple(record[name] for name in shared): record["groups"]
        for record in records
        if record["suite"] == "groups"
    }
    found = []
    for record in records:
        if record["suite"] == "step":
            of_step = record.get("groups") or groups.get(tuple(record[name] for name in shared))
            if of_step:
                found.append(record | {"groups": of_step})
    return found


def providers_in(found: Iterable[Subject]) -> list[str]:
    """Returns the providers that have results, in the order of `PROVIDERS`."""
    present = {name for subject in found for name in subject.records}
    return [name for name in PROVIDERS if name in present]


def setting(subject: Subject) -> tuple[str, str, int]:
    """Returns the layout, dtype and batch, which are the same for all operations of one table."""
    record = subject.any
    return record["layout"], record["dtype"], record["batch"]


def main_setting(found: list[Subject]) -> list[Subject]:
    """Returns the subjects that have the most frequent setting."""
    settings = [setting(subject) for subject in found]
    best = max(settings, key=settings.count)
    return [subject for subject in found if setting(subject) == best]

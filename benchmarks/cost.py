"""Estimates how long a case takes to measure, from earlier similar cases or from a table."""

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from benchmarks.cases import Case, ModelCase
from benchmarks.measure import fields_of
from benchmarks.store import Record

# The seconds in this file are estimates, not measured.
# Seconds for the inputs, checks, warm-up and rounds of a case.
CALLS = {"ops": 1.0, "step": 8.0, "infer": 5.0, "memory": 8.0, "groups": 10.0, "augment": 3.0}
# Seconds for a case of augmentation that loops over the images in Python.
IMAGE_LOOP = 60.0
# Seconds to compile an operation, and to compile a net, by provider.
COMPILES = {
    "bnres": (1.5, 20.0),
    "bnres-recompute": (0.0, 20.0),
    "bnres-conv-kernel": (5.0, 0.0),
    "bnres-kernel": (5.0, 0.0),
    "compile": (5.0, 40.0),
    "compile-max-autotune": (40.0, 400.0),
    "cudnn-frontend": (2.0, 0.0),
    "flag_gems": (3.0, 0.0),
}
# Fraction of a net's compile time that remains if its kernels are in the compilers' caches on disk.
# They are in the caches for an eager step, because the same step in a CUDA graph is measured
# earlier.
CACHED = 0.25
# A ResNet-50 has about 2.5 times the layers of a ResNet-18.
LARGE_NET = 2.5
# The estimates of the table are too low on a busy host, so they are multiplied by this factor when
# it is decided whether there is time for a group of cases.
MARGIN = 2.0
# A case is stopped after LIMIT_FACTOR times its estimate, but not before LEAST_LIMIT seconds.
LIMIT_FACTOR, LEAST_LIMIT = 4.0, 45.0


def kind(fields: Mapping[str, object]) -> str:
    """Returns a key that is the same for cases that take about the same time to measure.

    Args:
        fields: fields of a case (`benchmarks.measure.fields_of`), or its record.
    """
    what = fields.get("operation") or fields.get("net") or fields["name"]
    names = [fields["suite"], what, fields.get("launch", ""), fields["provider"]]
    return "/".join(map(str, [*names, "smoke" if fields["smoke"] else ""]))


def table_seconds(case: Case) -> float:
    """Returns the estimated seconds of a case, without regard to earlier measurements."""
    if case.provider == "torchvision-image":
        return IMAGE_LOOP
    compiles = COMPILES.get(case.provider, (0.0, 0.0))[isinstance(case, ModelCase)]
    if not isinstance(case, ModelCase):
        return CALLS[case.suite] + compiles
    if case.suite != "infer" and case.launch == "eager":
        compiles *= CACHED
    return (CALLS[case.suite] + compiles) * (LARGE_NET if case.net == "resnet50" else 1.0)


class Costs:
    """Estimates the time of cases, and learns from the cases that are measured.

    Args:
        records: records of earlier cases.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self._seen: dict[str, list[float]] = {}
        for record in records:
            self.note(record)

    def note(self, record: Record) -> None:
        """Learns from how long a case took; ignores failed cases."""
        if "wall_seconds" in record and record["status"] != "failed":
            self._seen.setdefault(kind(record), []).append(record["wall_seconds"])

    def seconds(self, case: Case) -> float:
        """Returns the median seconds of earlier cases of the same `kind`, else `table_seconds`."""
        seen = self._seen.get(kind(fields_of(case)))
        return statistics.median(seen) if seen else table_seconds(case)

    def fitting(
        self, groups: Iterable[Sequence[Case]], left: Callable[[], float]
    ) -> Iterator[Case]:
        """Yields the cases for which enough time remains.

        The remaining time is checked when the next case is requested.

        Args:
            groups: groups of cases. A group is skipped unless the time is enough for all its cases.
            left: returns the remaining seconds.
        """
        for group in groups:
            if self.most_seconds(group) <= left():
                yield from (case for case in group if self.seconds(case) <= left())

    def most_seconds(self, cases: Iterable[Case]) -> float:
        """Returns the estimated seconds of some cases, with `MARGIN` for `table_seconds`."""
        return sum(
            self.seconds(case) * (1.0 if kind(fields_of(case)) in self._seen else MARGIN)
            for case in cases
        )


def limit(case: Case) -> float:
    """Returns the time limit of a case in seconds."""
    return max(LIMIT_FACTOR * table_seconds(case), LEAST_LIMIT)

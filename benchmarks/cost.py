"""Estimates how long a case takes to measure, from earlier similar cases or from a table."""

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from benchmarks.cases import Case, ModelCase
from benchmarks.measure import fields_of
from benchmarks.store import Record

# For each suite: the seconds of a case without compiling. All seconds in this file are estimates
# and were not measured.
CALLS = {"ops": 1.0, "step": 8.0, "infer": 5.0, "memory": 8.0, "augment": 3.0}
# A case of ``torchvision-image``, which loops over the images in Python, takes this many seconds.
IMAGE_LOOP = 60.0
# For each provider: the seconds to compile an operation, and the seconds to compile a net.
COMPILES = {
    "bnres": (1.5, 20.0),
    "bnres-recompute": (0.0, 20.0),
    "bnres-conv-kernel": (5.0, 0.0),
    "bnres-kernel": (5.0, 0.0),
    "compile": (5.0, 40.0),
    "compile-max-autotune": (40.0, 400.0),
    "cudnn-frontend": (2.0, 0.0),
}
# If a net's kernels are in the compilers' caches on disk, compiling the net takes this fraction of
# its usual time. This is so for a step whose kernels the host launches, because this step has been
# measured in a CUDA graph before.
CACHED = 0.25
# A ResNet-50 has about 2.5 times as many layers as a ResNet-18.
LARGE_NET = 2.5
# On a busy host the estimates of `table_seconds` are too low. `Costs.most_seconds` multiplies them
# by this factor.
MARGIN = 2.0
# A case is stopped after LIMIT_FACTOR times its estimate, but not before LEAST_LIMIT seconds.
LIMIT_FACTOR, LEAST_LIMIT = 4.0, 45.0


def kind(fields: Mapping[str, object]) -> str:
    """Returns a key that is equal for cases that take about the same time to measure.

    Args:
        fields: fields of a case (`benchmarks.measure.fields_of`), or its record.
    """
    what = fields.get("operation") or fields.get("net") or fields["name"]
    names = [fields["suite"], what, fields.get("launch", ""), fields["provider"]]
    return "/".join(map(str, [*names, "smoke" if fields["smoke"] else ""]))


def table_seconds(case: Case) -> float:
    """Estimates, from the constants above, how many seconds it takes to measure a case."""
    if case.provider == "torchvision-image":
        return IMAGE_LOOP
    compiles = COMPILES.get(case.provider, (0.0, 0.0))[isinstance(case, ModelCase)]
    if not isinstance(case, ModelCase):
        return CALLS[case.suite] + compiles
    if case.suite != "infer" and case.launch == "eager":
        compiles *= CACHED
    return (CALLS[case.suite] + compiles) * (LARGE_NET if case.net == "resnet50" else 1.0)


class Costs:
    """Estimates how long cases take to measure, from the records of earlier cases."""

    def __init__(self, records: Iterable[Record]) -> None:
        self._seen: dict[str, list[float]] = {}
        for record in records:
            self.note(record)

    def note(self, record: Record) -> None:
        """Records how long a case took, for later estimates. Failed cases are ignored."""
        if "wall_seconds" in record and record["status"] != "failed":
            self._seen.setdefault(kind(record), []).append(record["wall_seconds"])

    def seconds(self, case: Case) -> float:
        """Returns the median seconds of earlier cases of the same `kind`, else `table_seconds`."""
        seen = self._seen.get(kind(fields_of(case)))
        return statistics.median(seen) if seen else table_seconds(case)

    def fitting(
        self, groups: Iterable[Sequence[Case]], left: Callable[[], float]
    ) -> Iterator[Case]:
        """Yields the cases for which there is enough time.

        A group is skipped if there is not enough time for all of it. Before each case of the other
        groups, the remaining time is checked again. ``left`` returns it in seconds.
        """
        for group in groups:
            if self.most_seconds(group) <= left():
                yield from (case for case in group if self.seconds(case) <= left())

    def most_seconds(self, cases: Iterable[Case]) -> float:
        """Returns the sum of the cases' estimates, those of `table_seconds` times `MARGIN`."""
        return sum(
            self.seconds(case) * (1.0 if kind(fields_of(case)) in self._seen else MARGIN)
            for case in cases
        )


def limit(case: Case) -> float:
    """Returns the time limit of a case in seconds."""
    return max(LIMIT_FACTOR * table_seconds(case), LEAST_LIMIT)

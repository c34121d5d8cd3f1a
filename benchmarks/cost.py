"""How long a case takes to measure: estimated first, then from the cases of its kind on record."""

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from benchmarks.cases import Case, ModelCase
from benchmarks.measure import fields_of
from benchmarks.store import Record

# Estimated seconds, not measured ones. Of calls: inputs, checks, warm-up and rounds.
CALLS = {"ops": 1.0, "step": 8.0, "infer": 5.0, "memory": 8.0, "groups": 10.0, "augment": 3.0}
IMAGE_LOOP = 60.0  # of augmentation that loops over the images in Python
# Seconds to compile an operation, and a net.
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
# Share of a net's compile time that remains once its kernels are in the compilers' caches on disk,
# because its step inside a CUDA graph was compiled before.
CACHED = 0.25
# A ResNet-50 has about 2.5 times the layers of a ResNet-18.
LARGE_NET = 2.5
# Before a group is begun, cases without a record of their kind count this many times their estimate,
# which is too low on a busy host.
MARGIN = 2.0
# A case is given up after LIMIT_FACTOR times its estimate, but not before LEAST_LIMIT seconds.
LIMIT_FACTOR, LEAST_LIMIT = 4.0, 45.0


def kind(fields: Mapping[str, object]) -> str:
    """A name that cases of about the same cost share.

    Args:
        fields: of a case (`benchmarks.measure.fields_of`), or a record.
    """
    what = fields.get("operation") or fields.get("net") or fields["name"]
    names = [fields["suite"], what, fields.get("launch", ""), fields["provider"]]
    return "/".join(map(str, [*names, "smoke" if fields["smoke"] else ""]))


def table_seconds(case: Case) -> float:
    """The estimate for a case without a record of its kind."""
    if case.provider == "torchvision-image":
        return IMAGE_LOOP
    compiles = COMPILES.get(case.provider, (0.0, 0.0))[isinstance(case, ModelCase)]
    if not isinstance(case, ModelCase):
        return CALLS[case.suite] + compiles
    if case.suite != "infer" and case.launch == "eager":
        compiles *= CACHED
    return (CALLS[case.suite] + compiles) * (LARGE_NET if case.net == "resnet50" else 1.0)


class Costs:
    """Seconds by kind of case.

    Args:
        records: of cases that were measured before.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self._seen: dict[str, list[float]] = {}
        for record in records:
            self.note(record)

    def note(self, record: Record) -> None:
        """Notes how long a case took; failed ones are ignored."""
        if "wall_seconds" in record and record["status"] != "failed":
            self._seen.setdefault(kind(record), []).append(record["wall_seconds"])

    def seconds(self, case: Case) -> float:
        """The median of its kind, else the estimate."""
        seen = self._seen.get(kind(fields_of(case)))
        return statistics.median(seen) if seen else table_seconds(case)

    def fitting(
        self, groups: Iterable[Sequence[Case]], left: Callable[[], float]
    ) -> Iterator[Case]:
        """The cases for which there is time at the moment they are asked for.

        Args:
            groups: of cases that are compared with each other; a group is begun only if all of it fits.
            left: seconds that are left.
        """
        for group in groups:
            if self.most_seconds(group) <= left():
                yield from (case for case in group if self.seconds(case) <= left())

    def most_seconds(self, cases: Iterable[Case]) -> float:
        """Seconds that some cases take, with a margin for those without a record of their kind."""
        return sum(
            self.seconds(case) * (1.0 if kind(fields_of(case)) in self._seen else MARGIN)
            for case in cases
        )


def limit(case: Case) -> float:
    """Seconds after which a case is given up."""
    return max(LIMIT_FACTOR * table_seconds(case), LEAST_LIMIT)

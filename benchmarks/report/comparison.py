"""Compares the results of two runs, case by case."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.store import Record

Run = tuple[Record, Sequence[Record]]
# If the ratio of two results differs from 1 by at most this number, the difference counts as noise.
LEAST_NOISE = 0.03
# The difference also counts as noise if it is at most SPREADS * sqrt(old_spread² + new_spread²). A
# run's spread is (q3 - q1) / 2 / median of its times. For a normal distribution the spread is two
# thirds of the standard deviation relative to the median. Medians vary less than single times. So
# noise rarely exceeds this limit.
SPREADS = 3


# The verdicts, in the order of the table. These need an explanation:
# - lost: only the old run measured the case. In the new run it failed, was refused or was skipped.
# - slower, faster: for a case that measures memory, its peak bytes grew or shrank.
# - other method: the runs timed the case by different methods, so the times are not compared.
# - absent: only the old run measured the case. The new run has no record of it.
# - new: only the new run measured the case.
VERDICTS = ("lost", "slower", "faster", "same", "other method", "absent", "new")


@dataclass(frozen=True)
class Change:
    """The change of one case.

    Attributes:
        id: id of the case.
        verdict: one of `VERDICTS`.
        ratio: new time divided by the old time, or new peak bytes divided by the old peak bytes. It
            is 0 if the results are not compared.
        noise: the greatest difference between the ratio and 1 that counts as noise.
    """

    id: str
    verdict: str
    ratio: float = 0.0
    noise: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """The changes of all cases, and the differences between the environments."""

    changes: list[Change]
    differences: list[str]

    @property
    def regressions(self) -> list[Change]:
        """The cases whose verdict is ``slower`` or ``lost``."""
        return [c for c in self.changes if c.verdict in ("slower", "lost")]

    def table(self) -> str:
        """Formats the differences, the changes (regressions first), and the counts of verdicts."""
        lines = list(self.differences)
        for change in sorted(self.changes, key=lambda c: (VERDICTS.index(c.verdict), -c.ratio)):
            ratio = f"{change.ratio:6.3f}× ±{change.noise:.1%}" if change.ratio else ""
            lines.append(f"{change.verdict:12} {ratio:14}  {change.id}")
        counts = [f"{sum(c.verdict == v for c in self.changes)} {v}" for v in VERDICTS]
        return "\n".join([*lines, ", ".join(counts)])


def compare(old: Run, new: Run) -> Comparison:
    """Compares the cases of two runs. A case that neither run measured is left out.

    A case that measures memory is compared by its peak bytes, and any other case by its median
    time.
    """
    (old_about, old_records), (new_about, new_records) = old, new
    before = {r["id"]: r for r in old_records if r["status"] == "measured"}
    after = {r["id"]: r for r in new_records}
    changes = []
    for name in {**before, **after}:
        previous, record = before.get(name), after.get(name)
        if record is None:
            changes.append(Change(name, "absent"))
        elif previous is not None:
            changes.append(_judge(previous, record))
        elif record["status"] == "measured":
            changes.append(Change(name, "new"))
    differences = [
        f"{key}: {old_about.get(key)} -> {new_about.get(key)}"
        for key in ("device", "driver", "torch", "triton", "cudnn", "commit")
        if old_about.get(key) != new_about.get(key)
    ]
    return Comparison(changes, differences)


def _judge(previous: Record, record: Record) -> Change:
    if record["status"] != "measured":
        return Change(record["id"], "lost")
    if record.get("method") != previous.get("method"):
        return Change(record["id"], "other method")
    if "peak_bytes" not in record:
        ratio = record["median"] / previous["median"]
        spread = sum(((r["q3"] - r["q1"]) / 2 / r["median"]) ** 2 for r in (previous, record))
        noise = max(LEAST_NOISE, SPREADS * spread**0.5)
    else:
        ratio, noise = record["peak_bytes"] / previous["peak_bytes"], LEAST_NOISE
    verdict = "slower" if ratio > 1 + noise else "faster" if ratio < 1 / (1 + noise) else "same"
    return Change(record["id"], verdict, ratio, noise)

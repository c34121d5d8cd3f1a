"""Compares two runs case by case."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.store import Record

Run = tuple[Record, Sequence[Record]]
# A ratio of two times that differs from 1 by at most this number is noise, however close the
# quartiles of the times are.
LEAST_NOISE = 0.03
# The spread of a run is half the distance between its quartiles, which for a normal distribution is
# two thirds of the standard deviation. A difference of at most this many times the combined spreads
# of both runs is noise. Medians vary less than single times, so this is more than enough.
SPREADS = 3


@dataclass(frozen=True)
class Change:
    """The change of one case.

    Attributes:
        id: id of the case.
        verdict: ``slower``, ``faster``, ``same``, ``lost`` (measured in the old run; failed,
            refused or skipped in the new run), ``new`` (only the new run measured the case) or
            ``recast`` (the two runs used different methods, so the times are not compared).
        ratio: new time divided by the old time, or 0 if the times are not compared.
        noise: greatest difference of the ratio from 1 that counts as noise.
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
        """The cases that became slower by more than noise, or are not measured any more."""
        return [c for c in self.changes if c.verdict in ("slower", "lost")]

    def table(self) -> str:
        """Formats the differences, the changes (regressions first), and counts of the verdicts."""
        lines = [f"{what}" for what in self.differences]
        order = ("lost", "slower", "faster", "same", "recast", "new")
        for change in sorted(self.changes, key=lambda c: (order.index(c.verdict), -c.ratio)):
            ratio = f"{change.ratio:6.3f}× ±{change.noise:.1%}" if change.ratio else " " * 14
            lines.append(f"{change.verdict:6} {ratio}  {change.id}")
        counts = [f"{sum(c.verdict == v for c in self.changes)} {v}" for v in order]
        return "\n".join([*lines, ", ".join(counts)])


def compare(old: Run, new: Run) -> Comparison:
    """Compares the median times of two runs, and the peak bytes of cases that measure memory."""
    old_about, new_about = old[0], new[0]
    # Cases of the suite "groups" are not compared: their times come from a profiler, and only show
    # which kernels a step's time consists of.
    old_records, new_records = ([r for r in run[1] if r["suite"] != "groups"] for run in (old, new))
    before = {r["id"]: r for r in old_records}
    changes = []
    for record in new_records:
        previous = before.get(record["id"])
        if previous is None or previous["status"] != "measured":
            if record["status"] == "measured":
                changes.append(Change(record["id"], "new"))
        elif record["status"] != "measured":
            changes.append(Change(record["id"], "lost"))
        else:
            changes.append(_judge(previous, record))
    differences = [
        f"{key}: {old_about.get(key)} -> {new_about.get(key)}"
        for key in ("device", "driver", "torch", "triton", "cudnn", "commit")
        if old_about.get(key) != new_about.get(key)
    ]
    absent = before.keys() - {r["id"] for r in new_records}
    if absent:
        differences.append(f"{len(absent)} cases of the old run are not in the new one")
    return Comparison(changes, differences)


def _judge(previous: Record, record: Record) -> Change:
    if record.get("method") != previous.get("method"):
        return Change(record["id"], "recast")
    if "peak_bytes" not in record:
        ratio = record["median"] / previous["median"]
        spread = sum(((r["q3"] - r["q1"]) / 2 / r["median"]) ** 2 for r in (previous, record))
        noise = max(LEAST_NOISE, SPREADS * spread**0.5)
    else:
        ratio, noise = record["peak_bytes"] / previous["peak_bytes"], LEAST_NOISE
    verdict = "slower" if ratio > 1 + noise else "faster" if ratio < 1 / (1 + noise) else "same"
    return Change(record["id"], verdict, ratio, noise)

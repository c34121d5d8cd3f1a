"""Compares two runs case by case."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.store import Record

Run = tuple[Record, Sequence[Record]]
# If a ratio of two times differs from 1 by at most this number, the difference is noise, even if
# the quartiles of the times are very close.
LEAST_NOISE = 0.03
# The spread of a run is half the distance between its quartiles. For a normal distribution this is
# two thirds of the standard deviation. A difference is noise if it is at most this many times the
# combined spreads of both runs. Medians vary less than single times, so this number is large
# enough.
SPREADS = 3


@dataclass(frozen=True)
class Change:
    """The change of one case.

    Attributes:
        id: id of the case.
        verdict: ``slower``, ``faster``, ``same``, ``lost``, ``new`` or ``recast``. ``lost`` is a
            case that was measured in the old run, but failed, was refused or was skipped in the new
            run. ``new`` is a case that only the new run measured. ``recast`` is a case for which
            the two runs used different methods, so that the times are not compared.
        ratio: new time divided by the old time. It is 0 if the times are not compared.
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
        """The cases that became slower by more than noise, or that are no longer measured."""
        return [c for c in self.changes if c.verdict in ("slower", "lost")]

    def table(self) -> str:
        """Formats the differences, the changes (regressions first), and the counts of verdicts."""
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
    # Cases of the suite "groups" are not compared. Their times come from a profiler, and only show
    # how a step's time is divided among its kernels.
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

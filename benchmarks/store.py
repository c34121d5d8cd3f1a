"""A folder of results: ``environment.json`` and ``results.jsonl``, a line a case.

A line is on the disk before the next case begins, so a run that was stopped goes on where it was.
"""

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.environment import IDENTITY
from bnres.files import write_text

# The device of results that nobody measured.
MADE_UP = "made-up timings"
ENVIRONMENT, RESULTS = "environment.json", "results.jsonl"
Record = dict[str, Any]


class ResultStore:
    """Results by the id of their case, in ``records``.

    Args:
        folder: made if it is not there.
        environment: what is being measured on.

    Raises:
        ValueError: if the folder holds results of another environment, or is not readable.
    """

    def __init__(self, folder: Path, environment: Record) -> None:
        self.folder = folder
        if (folder / ENVIRONMENT).exists():
            self.environment, records = load(folder)
            for name in IDENTITY:
                if self.environment.get(name) != environment.get(name):
                    raise ValueError(
                        f"{folder} holds results of {name} {self.environment.get(name)!r}, but "
                        f"this is {environment.get(name)!r}: choose another folder"
                    )
            _drop_torn_line(folder / RESULTS)
        else:
            records = []
            self.environment = environment
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / ENVIRONMENT, json.dumps(environment, indent=1) + "\n")
        self.records = {record["id"]: record for record in records}

    def add(self, record: Record) -> None:
        """Appends a result."""
        with (self.folder / RESULTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records[record["id"]] = record


def load(folder: Path) -> tuple[Record, list[Record]]:
    """Environment and results of a folder; a line that was cut off is left out.

    Raises:
        ValueError: if it is no folder of results.
    """
    try:
        environment = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
        path = folder / RESULTS
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        records = [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is no folder of results: {error}") from error
    return environment, records


def _drop_torn_line(path: Path) -> None:
    content = path.read_bytes() if path.exists() else b""
    if content and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)

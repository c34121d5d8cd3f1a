"""Reads and writes a folder of results.

The folder contains ``environment.json`` and ``results.jsonl``, which has a line for each measured
case. A line is on disk before the next case starts, so an interrupted run can be continued.
"""

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.environment import IDENTITY
from bnres.files import write_text

ENVIRONMENT, RESULTS = "environment.json", "results.jsonl"
Record = dict[str, Any]


class ResultStore:
    """A folder of results. ``records`` maps the id of a case to its record.

    Args:
        folder: folder of the results. It is created if it does not exist.
        environment: result of `benchmarks.environment.describe`.

    Raises:
        ValueError: if the folder's results are from a different environment, or if the folder can't
            be read.
    """

    def __init__(self, folder: Path, environment: Record) -> None:
        self.folder = folder
        if (folder / ENVIRONMENT).exists():
            self.environment, records = load(folder)
            for name in IDENTITY:
                if self.environment.get(name) != environment.get(name):
                    raise ValueError(
                        f"{folder} has results of {name} {self.environment.get(name)!r}, but "
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
        """Appends a record, and writes it to disk immediately."""
        with (self.folder / RESULTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records[record["id"]] = record


def load(folder: Path) -> tuple[Record, list[Record]]:
    """Returns the environment and the records of a folder. An incomplete last line is ignored.

    Raises:
        ValueError: if the folder has no environment, or a file can't be parsed.
    """
    try:
        environment = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
        path = folder / RESULTS
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        records = [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is not a folder of results: {error}") from error
    return environment, records


def _drop_torn_line(path: Path) -> None:
    content = path.read_bytes() if path.exists() else b""
    if content and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)

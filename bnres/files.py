"""Writes files completely or not at all."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

TEMPORARY = ".bnres-tmp"  # ending of a file that is being written


def write_bytes(path: Path, data: Any) -> None:
    """Replaces a file's content; after a failure or a kill it still has the old content.

    An existing file keeps its permissions, a link still points to its target, and a pipe or a
    device is written directly.

    Raises:
        OSError: if it can't be written; it names ``path``.
    """
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)
        else:
            _replace(path.resolve(), data)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _replace(path: Path, data: Any) -> None:
    temporary = path.with_name(f".{path.name}{TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            if path.exists():
                os.fchmod(file.fileno(), path.stat().st_mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # on a read-only file system, unlinking a missing file fails too
            temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replaces a file's content by text in UTF-8, as `write_bytes` does; newlines are kept."""
    write_bytes(path, text.encode())


def check_out(path: Path, name: str = "out") -> None:
    """Raises a ValueError if a file can't be written at ``path``; it calls the argument ``name``."""
    if path.is_dir():
        raise ValueError(f"{name} must be a file, got the folder {str(path)!r}")
    if not path.parent.is_dir():
        raise ValueError(f"{name}: there is no folder {str(path.parent)!r}")

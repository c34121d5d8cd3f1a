"""Writes files completely or not at all."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

TEMPORARY = ".bnres-tmp"  # a file that is being written has this suffix


def write_bytes(path: Path, data: Any) -> None:
    """Replaces a file's content completely or not at all.

    If the file can't be written or the process is killed, the file keeps the old content. An
    existing file keeps its permissions. If ``path`` is a link, the content of the link's target is
    replaced. A pipe or a device is written directly.

    Raises:
        OSError: if the file can't be written; the error names ``path``.
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
        # On a read-only file system, unlink raises an error even if the file is missing.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replaces a file's content with ``text``, completely or not at all (see `write_bytes`).

    The text is encoded as UTF-8, and its newlines are not changed.
    """
    write_bytes(path, text.encode())


def check_out(path: Path, name: str = "out") -> None:
    """Raises a ValueError if ``path`` is a folder, or is in a folder that does not exist.

    Args:
        path: the file to write.
        name: name of the argument, for the error message.
    """
    if path.is_dir():
        raise ValueError(f"{name} must be a file, got the folder {str(path)!r}")
    if not path.parent.is_dir():
        raise ValueError(f"{name}: there is no folder {str(path.parent)!r}")

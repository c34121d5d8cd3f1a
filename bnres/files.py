"""Files that are written whole or not at all."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any


def write_bytes(path: Path, data: Any) -> None:
    """Writes a file by way of a temporary one, so that a failure or a kill leaves the old one.

    Raises:
        OSError: if it can't be written; it names ``path``, and the temporary file is removed.
    """
    path = path.resolve()  # a link stays, and its target is written
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):  # unlinking nothing fails too where the file system is read-only
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_text(path: Path, text: str) -> None:
    """As `write_bytes`, of text in UTF-8, as it is."""
    write_bytes(path, text.encode())

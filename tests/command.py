"""Runs the command ``bnres`` in the test's own process."""

from typing import Any

from typer.testing import CliRunner

from bnres import cli


def run(*arguments: Any, code: int = 0) -> str:
    """Returns what the command prints, or its one-line error message if ``code`` is not 0.

    Args:
        arguments: the words of the command line after ``bnres``.
        code: the exit code that the command must have.
    """
    result = CliRunner().invoke(cli.app, [*map(str, arguments)])
    assert result.exit_code == code, result.output
    if code:
        assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr if code else result.output

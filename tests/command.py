"""Runs the command ``bnres`` in the process of the test."""

from typing import Any

from typer.testing import CliRunner

from bnres import cli


def run(*arguments: Any, code: int = 0) -> str:
    """Returns what the command prints. If its exit code is not 0, returns its line of error.

    Args:
        arguments: the command line.
        code: the exit code that the command must have.
    """
    result = CliRunner().invoke(cli.app, [*map(str, arguments)])
    assert result.exit_code == code, result.output
    if code:
        assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr if code else result.output

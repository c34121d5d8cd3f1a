"""Makes each command of ``bnres`` print an error as one line."""

import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from bnres.errors import report

TRACEBACK = "--traceback"


class Commands(TyperGroup):
    """A group of commands. If a command raises an error, the process prints one line and exits.

    With ``--traceback`` anywhere on the command line, the error is raised instead.
    """

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        try:
            return super().main([a for a in given if a != TRACEBACK], *rest, **options)
        except Exception as error:
            if TRACEBACK in given:
                raise
            line, code = report(error)
            typer.echo(line, err=True)
            sys.exit(code)

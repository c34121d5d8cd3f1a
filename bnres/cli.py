"""The command ``bnres``."""

import math
import sys
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from rich.console import Console
except ModuleNotFoundError as error:
    sys.exit(f"bnres: {error.name} is missing; install it with: pip install 'bnres[train]'")

import bnres
from bnres.commands import TRACEBACK, Commands
from bnres.files import check_out
from bnres.train.config import TrainConfig
from bnres.train.options import with_config_options
from bnres.train.outputs import LAST, has_no_checkpoint
from bnres.train.presets import PRESETS

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train and examine residual networks with fused batch norms.",
)


def run_folder(out: Path | None, config: TrainConfig) -> Path:
    """Returns the folder to which a training run writes.

    By default, a run that resumes a file last.pt writes to the folder of this file, and any other
    run writes to a new folder in ``runs``.

    Args:
        out: the folder that the user asked for, or None for the default.
        config: the options of the run.

    Raises:
        ValueError: if the parent of ``out`` does not exist, or if ``out`` exists and is neither an
            empty folder nor the folder of a run that ended before its first checkpoint.
    """
    if out is None:
        if config.resume is not None and config.resume.name == LAST:
            return config.resume.parent
        model = config.model.replace(":", "-")
        return Path("runs") / f"{config.dataset}-{model}-{datetime.now():%Y%m%d-%H%M%S}"
    if not out.parent.is_dir():
        raise ValueError(f"out: there is no folder {str(out.parent)!r}")
    if out.exists() and not (out.is_dir() and has_no_checkpoint(out)):
        raise ValueError(f"out must be a new folder, but {str(out)!r} exists")
    return out


def show_version(value: bool) -> None:
    if value:
        typer.echo(f"bnres {bnres.__version__}, backend {bnres.backend()}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=show_version, is_eager=True, help="Show version and backend."
        ),
    ] = False,
    traceback: Annotated[
        bool,
        typer.Option(TRACEBACK, help="Show an error's traceback. Also allowed after a command."),
    ] = False,
) -> None:
    pass


@app.command()
@with_config_options
def train(
    *,
    options: dict[str, Any],
    preset: Annotated[
        str | None, typer.Option(help=f"Set of options: {', '.join(PRESETS)}.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file that sets options.")] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the options as a TOML file and exit.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the run's files. Default: a new folder in runs. With --resume "
            "FOLDER/last.pt, the default is FOLDER."
        ),
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Download cifar10 into --data before training.")
    ] = False,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Train with fused and with torch's (stock) layers, and compare them."
        ),
    ] = False,
) -> None:
    """Train a model. By default, a ResNet-18 is trained on 4,000 images of MNIST."""
    from dataclasses import replace

    from bnres.data.download import download_cifar10
    from bnres.train import distributed
    from bnres.train.compare import compare as run_comparison
    from bnres.train.interrupt import Stopped
    from bnres.train.options import make_config
    from bnres.train.run import fit, prepare

    distributed.choose_gpu()
    if distributed.may_be_restarted() and out is not None and (out / LAST).exists():
        options, preset, config, out = {"resume": out / LAST}, None, None, None
    asked = make_config(options, preset, config)
    if print_config:
        typer.echo(asked.as_toml(), nl=False)
        return
    if download and (asked.dataset != "cifar10" or asked.data is None):
        raise ValueError("download needs --dataset cifar10 and --data FOLDER")
    world, device = distributed.join(asked.device)
    console = Console(quiet=not world.is_first)
    try:
        if download and asked.data is not None:
            if world.is_first:
                download_cifar10(asked.data)
            world.wait()
        if compare:
            if out is not None or not asked.fused or world.size > 1:
                raise ValueError(
                    "compare trains fused and stock layers in one process and writes no files; "
                    "it can't be combined with out, no-fused or torchrun"
                )
            run_comparison(asked, console)
            return
        folder = world.from_first(lambda: run_folder(out, asked))
        fit(prepare(replace(asked, device=device), world), folder, console)
    except Stopped:
        console.print(
            f"stopped; continue with: bnres train --resume {folder / LAST}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
        raise typer.Exit(130) from None
    finally:
        distributed.leave()


Checkpoint = Annotated[Path, typer.Argument(help="A checkpoint of bnres train.")]


@app.command("eval")
def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the data. Default: the same as in training.")
    ] = None,
    device: Annotated[str, typer.Option(help="Device. Default: the GPU if there is one.")] = "",
    eval_flip: Annotated[
        bool | None,
        typer.Option(
            help="Average the outputs for an image and its mirror image. "
            "Default: the same as in training."
        ),
    ] = None,
) -> None:
    """Print the loss and the accuracy of a checkpoint on the held-out images."""
    from bnres.train.trained import evaluate_checkpoint

    changes: dict[str, Any] = {"device": device}
    if data is not None:
        changes["data"] = data
    if eval_flip is not None:
        changes["eval_flip"] = eval_flip
    config, loss, accuracy = evaluate_checkpoint(checkpoint, **changes)
    typer.echo(f"{config.model} on {config.dataset}: loss {loss:.4f}, accuracy {accuracy:.2%}")


@app.command()
def export(
    checkpoint: Checkpoint,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File to write. Default: the checkpoint's path with the format as suffix."
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            help="Height and width of the images. Default: the same as in training.", min=1
        ),
    ] = None,
    folded: Annotated[
        bool, typer.Option(help="Fold batch norms into convolutions. No effect on safetensors.")
    ] = True,
    format: Annotated[
        str,
        typer.Option(help="pt2 (read by torch.export.load), onnx, or safetensors (only weights)."),
    ] = "pt2",
) -> None:
    """Export the model or the weights of a checkpoint for other programs."""
    from bnres.train.export import export_checkpoint

    square = (size, size) if size else None
    typer.echo(export_checkpoint(checkpoint, out, square, folded=folded, format=format))


NAMES = (
    "A model of bnres, torchvision:NAME, timm:NAME, or PACKAGE.MODULE:FACTORY. A factory is a "
    "function that returns a model."
)
Model = Annotated[str, typer.Argument(help=NAMES)]
Input = Annotated[str | None, typer.Option(help="Input shape NxCxHxW, such as 1x3x224x224.")]


@app.command()
def summary(model: Model, input: Input = None) -> None:
    """Print the class, output shape and number of parameters of each stage of a model."""
    from bnres.models import create_model, is_factory, summarize

    shape = input_shape(model, input)
    # A factory's model is not fused, because bnres.fuse would not change the summary.
    net = create_model(model, in_channels=shape[1], fused=not is_factory(model))
    typer.echo(summarize(net, shape))


@app.command()
def explain(model: Model, input: Input = None) -> None:
    """Print what bnres.fuse fuses with each batch norm of a model, or why it fuses nothing."""
    import torch

    from bnres.models import create_model
    from bnres.models.trial import try_call

    shape = input_shape(model, input, batch=2)
    net = create_model(model, in_channels=shape[1], fused=False)
    try_call(net, torch.zeros(shape))
    typer.echo(bnres.explain(net, torch.zeros(shape)))


@app.command()
def doctor(
    model: Annotated[str | None, typer.Argument(help=f"Model to examine too. {NAMES}")] = None,
    input: Input = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print what is wrong on this machine and how to fix it.

    If a model is named, also print how much memory traffic fusing it saves. The exit code is 1 if
    something is wrong.
    """
    from bnres.doctor import diagnose

    if model is None and input is not None:
        raise ValueError("input can be given only with a model")
    found = diagnose(model, None if model is None else input_shape(model, input, batch=2))
    typer.echo(found.as_json() if as_json else found)
    raise typer.Exit(int(bool(found.findings)))


@app.command()
def tune(
    model: Annotated[str, typer.Option(help="Model whose convolutions are measured.")] = "resnet18",
    batch_size: Annotated[int, typer.Option(help="Number of images in a batch.")] = 256,
    size: Annotated[int, typer.Option(help="Height and width of an image.")] = 224,
    dtype: Annotated[str, typer.Option(help="Data type: fp32, bf16 or fp16.")] = "bf16",
    match: Annotated[
        str, typer.Option(help="Measure only convolutions with this text in their name, e.g. 3x3.")
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option(
            help="File of the table. Default: $BNRES_ROUTES, or a file in the cache folder."
        ),
    ] = None,
    minutes: Annotated[
        float,
        typer.Option(
            help="Start no measurement after this many minutes. Slow convolutions come first."
        ),
    ] = math.inf,
) -> None:
    """Measure bnres's convolution kernel and torch's convolution on this GPU.

    The times are saved in a table. For each shape in the table, bnres then uses the faster of the
    two convolutions.
    """
    import torch

    from bnres.models import create_model
    from bnres.routes import gpu_name, read_table, table_path
    from bnres.train.config import DTYPES
    from bnres.tune import conv_calls, device_timer
    from bnres.tune import tune as tune_calls

    console = Console()
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if not minutes > 0:
        raise ValueError(f"minutes must be above 0, got {minutes}")
    if out is not None:
        check_out(out)
    if not torch.cuda.is_available():
        raise ValueError("tune needs a GPU, but torch finds none")
    device = torch.device("cuda")
    path = out or table_path(gpu_name(device))
    read_table(path)
    channels = input_shape(model, None)[1]
    net = create_model(model, in_channels=channels, fused=False)
    calls = conv_calls(net, (batch_size, channels, size, size), DTYPES[dtype])
    chosen = [call for call in calls if match in call.key]
    if not chosen:
        names = ", ".join(call.key for call in calls)
        raise ValueError(f"match must be part of a name, got {match!r}; the names are {names}")
    about = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": f"{datetime.now():%Y-%m-%d}",
    }
    torch.backends.cudnn.benchmark = True  # fast training scripts set this too
    tune_calls(
        chosen, path, about, device, device_timer(), minutes=minutes,
        say=partial(console.print, highlight=False, markup=False, soft_wrap=True),
    )  # fmt: skip
    console.print(f"the table is in {path}", highlight=False, soft_wrap=True)
    if out is not None:
        console.print(f"set BNRES_ROUTES={out} to use it", highlight=False, soft_wrap=True)


@app.command()
def augment(
    image: Annotated[str, typer.Argument(help="Image file, or name of a data set.")],
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("grid.png"),
    seed: Annotated[
        int, typer.Option(help="Seed of the random parameters.", min=0, max=2**63 - 1)
    ] = 0,
) -> None:
    """Apply each augmentation to an image, and draw eight random results of each."""
    from bnres.augment.grid import LARGEST_SIDE, draw_grid
    from bnres.data import PACKAGED
    from bnres.data.images import read_image

    check_out(out)
    if image in PACKAGED:
        picture = PACKAGED[image]().train_images[0]
    elif Path(image).is_file():
        picture = read_image(Path(image), LARGEST_SIDE)
    else:
        raise ValueError(f"image must be a file or one of {', '.join(PACKAGED)}, got {image!r}")
    draw_grid(out, picture, seed)
    typer.echo(out)


def input_shape(model: str, asked: str | None, batch: int = 1) -> tuple[int, int, int, int]:
    """Returns the input shape that the user asked for, or the model's usual input shape.

    Args:
        model: name of the model.
        asked: the shape as text, such as ``"1x3x224x224"``, or None.
        batch: number of images in the usual shape.

    Raises:
        ValueError: if ``asked`` is not four positive integers separated by x.
    """
    from bnres.models import DEFAULT_INPUT_SHAPE, INPUT_SHAPES

    if asked is None:
        _, channels, height, width = INPUT_SHAPES.get(model, DEFAULT_INPUT_SHAPE)
        return batch, channels, height, width
    parts = asked.split("x")
    if len(parts) != 4 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"input must be four sizes such as 1x3x224x224, got {asked!r}")
    n, channels, height, width = map(int, parts)
    return n, channels, height, width


if __name__ == "__main__":  # torchrun -m bnres.cli runs this file
    app()

"""The command line of the benchmarks: ``python -m benchmarks``."""

import re
import time
from datetime import date
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.cases import MODEL_PROVIDERS, ModelCase, default_cases
from benchmarks.operations import DTYPES, LAYOUTS
from bnres.commands import TRACEBACK, Commands
from bnres.files import check_out, write_text

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Compare bnres with torch's own layers, torch.compile and other libraries.",
)


@app.callback()
def main(
    traceback: Annotated[
        bool,
        typer.Option(
            TRACEBACK, help="Show the traceback of an error. Also allowed after a command."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def run(
    minutes: Annotated[float, typer.Option(help="Time to spend.", min=0.0)] = 9.0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results. An earlier run is continued.")
    ] = None,
    only: Annotated[
        str, typer.Option(help="Measure only the cases whose id matches this regular expression.")
    ] = "",
) -> None:
    """Measure the most important cases first, then the others until the time is up.

    Cases that are compared with each other are a group. In a group, torch's own layers or
    torchvision are measured first. A group is skipped if its cases need more than the time left.

    Examples of ids are ops/bn_relu/resnet18.stem/forward/channels_last/bf16/b256/eager and
    step/resnet18/224px/b256/graph/channels_last/bf16/bnres. The first part of an id is ops, step,
    infer, memory or augment. The expression of --only may match any part of an id.

    Cases run in a child process. If the child hangs or dies, a new child runs the next case.
    Without a GPU, a shorter list of cases runs on the CPU with small inputs.
    """
    from benchmarks import busy, campaign, environment
    from benchmarks.child import Child

    deadline = time.monotonic() + 60 * minutes
    device = environment.default_device()
    folder = out or Path("runs") / f"benchmarks-{date.today():%Y-%m-%d}"
    try:
        pattern = re.compile(only)
    except re.error as error:
        raise ValueError(f"--only must be a regular expression, got {only!r}: {error}") from error
    cases = [case for case in default_cases() if pattern.search(case.id)]
    if not cases:
        raise ValueError(f"--only must match the id of a case, got {only!r}")
    warning = busy.warning(busy.spread())
    if warning is not None:
        typer.echo(warning, err=True)
    try:
        with Child() as child:
            store = campaign.open_store(folder, device, child)
            ceilings = store.environment["ceilings"]
            typer.echo(
                f"{store.environment['device']}: copy {ceilings['copy'] / 1e9:,.0f} GB/s, product "
                f"{ceilings['product'] / 1e12:,.2f} TFLOP/s"
            )
            done = campaign.run(store, cases, deadline, device, typer.echo, child)
    except KeyboardInterrupt:
        typer.echo(f"stopped; to continue, run the same command with --out {folder}")
        raise typer.Exit(130) from None
    typer.echo(f"{done} cases measured, {campaign.left_out(cases, store)}; results in {folder}")


@app.command()
def report(
    folders: Annotated[list[Path] | None, typer.Argument(help="Folders of results.")] = None,
    page: Annotated[
        bool,
        typer.Option(help="Write docs/performance.md and README.md from the committed results."),
    ] = False,
) -> None:
    """Write report.md and its pictures into each folder of results."""
    from benchmarks.report import performance_page, pictures, tables
    from benchmarks.store import load

    if not folders and not page:
        raise ValueError("folders must name at least one folder unless --page is given, got none")
    for folder in folders or []:
        about, records = load(folder)
        drawn = pictures.draw(folder, about, records)
        text = tables.report(about, records, drawn)
        write_text(folder / "report.md", text)
        typer.echo(folder / "report.md")
    if page:
        for path in performance_page.write():
            typer.echo(path)


@app.command()
def compare(
    old: Annotated[Path, typer.Argument(help="Folder of the earlier run's results.")],
    new: Annotated[Path, typer.Argument(help="Folder of the later run's results.")],
) -> None:
    """Compare two runs case by case.

    The exit code is 1 if a case takes longer or needs more memory, and the difference exceeds the
    noise. It is also 1 if a case can no longer be measured.
    """
    from benchmarks.report import comparison
    from benchmarks.store import load

    found = comparison.compare(load(old), load(new))
    typer.echo(found.table())
    raise typer.Exit(int(bool(found.regressions)))


@app.command()
def profile(
    net: Annotated[str, typer.Option(help="resnet18 or resnet50.")] = "resnet18",
    provider: Annotated[str, typer.Option(help="Provider of the layers.")] = "bnres",
    batch: Annotated[int, typer.Option(help="Images per step.", min=2)] = 256,
    image: Annotated[
        int,
        typer.Option(help="Height and width of images. If at most 32, the net has CIFAR's stem."),
    ] = 224,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    layout: Annotated[str, typer.Option(help="channels_last or contiguous.")] = "channels_last",
    trace: Annotated[Path | None, typer.Option(help="File for a Chrome trace.")] = None,
) -> None:
    """Profile a training step: time and launches of each group of kernels, and idle time."""
    from benchmarks import environment, models, profiling
    from benchmarks.providers.base import Unavailable
    from benchmarks.sites import NETS

    if trace is not None:
        check_out(trace, "trace")
    device = environment.default_device()
    for option, value, known in (
        ("net", net, NETS),
        ("provider", provider, MODEL_PROVIDERS),
        ("dtype", dtype, tuple(DTYPES)),
        ("layout", layout, tuple(LAYOUTS)),
    ):
        if value not in known:
            raise ValueError(f"{option} must be one of {', '.join(known)}, got {value!r}")
    case = ModelCase("step", net, image, batch, "eager", dtype, layout, provider)
    try:
        work = models.prepare(case, device)
    except Unavailable as error:
        raise ValueError(f"provider {provider!r}: {error}") from error
    found = profiling.profile(work.run, device, trace)
    typer.echo(profiling.format_profile(found, device))


@app.command()
def audit(
    record: Annotated[bool, typer.Option(help="Store the counts as the new budget.")] = False,
) -> None:
    """Count the kernels' memory traffic and analyse their machine code, without a GPU.

    The exit code is 1 if a count exceeds its budget.
    """
    from benchmarks.audit import command

    raise typer.Exit(command.run(record))


@app.command()
def host() -> None:
    """Time what the CPU does in calls of fused layers and nets, without a GPU.

    Each time is divided by the time of torch's batch norm and ReLU. The exit code is 1 if one of
    these ratios exceeds its limit.
    """
    from benchmarks.audit.host import run

    over = run()
    for message in over:
        typer.echo(f"error: {message}", err=True)
    raise typer.Exit(int(bool(over)))


@app.command()
def compile() -> None:
    """Compile the kernels into triton's cache, on all cores.

    A specialisation is a combination of dtypes, constants and alignments for which triton compiles
    a kernel. All specialisations are compiled for sm_90, and one specialisation of each kernel for
    each other GPU. On a machine without a GPU, the launches for sm_90 are also tested, with a
    stand-in for CUDA's driver that runs no kernel.
    """
    import os

    from benchmarks.audit import specialisations

    found = specialisations.run(os.cpu_count() or 1)
    typer.echo("\n".join(found.failures))
    typer.echo(
        f"{found.compiled} compiled, {found.launched} launched, {len(found.failures)} failed"
    )
    raise typer.Exit(int(bool(found.failures)))


@app.command()
def models(
    out: Annotated[
        Path | None, typer.Option(help="File for the table; by default it is printed.")
    ] = None,
) -> None:
    """Tabulate what is fused in the models of installed libraries, such as timm."""
    from benchmarks.libraries import run

    if out is not None:
        check_out(out)
    run(out, typer.echo)


@app.command()
def variants(
    out: Annotated[Path, typer.Option(help="File for the results. An earlier run is continued.")],
    minutes: Annotated[float, typer.Option(help="Time to spend.", min=0.0)] = 3.0,
) -> None:
    """Time the kernels with their current launch configurations and with others."""
    from benchmarks import environment
    from benchmarks.variants import run

    typer.echo(f"{run(out, minutes, environment.default_device())} configurations left")


@app.command()
def once() -> None:
    """Run each fused operation of ResNet-18's stem and layer1, for use under a profiler."""
    from benchmarks import environment
    from benchmarks.once import run

    typer.echo(f"{run(environment.default_device())} operations")


@app.command()
def scaling(
    picture: Annotated[Path | None, typer.Option(help="File for a picture of the model.")] = None,
    gloo: Annotated[
        bool, typer.Option(help="Also measure gloo on this CPU, and compare it with the model.")
    ] = False,
    nvlink_gbs: Annotated[
        float, typer.Option(help="GB/s that a GPU sends inside its node.", min=0.1)
    ] = 450,
    network_gbs: Annotated[
        float, typer.Option(help="GB/s that a node sends to other nodes.", min=0.1)
    ] = 400,
    latency_scale: Annotated[
        float, typer.Option(help="Factor by which NCCL's latencies are multiplied.", min=0.0)
    ] = 1,
) -> None:
    """Predict the speed of training on many GPUs, with and without synchronised batch norm."""
    from benchmarks import scaling as model

    cluster = model.Cluster(
        nvlink=nvlink_gbs * 1e9, network=network_gbs * 1e9, latency=latency_scale
    )
    if picture is not None:
        check_out(picture, "picture")
        model.draw(picture, cluster)
    typer.echo(model.table(cluster))
    if gloo:
        typer.echo(model.gloo_table())


@app.command(name="first-contact")
def first_contact(
    out: Annotated[Path, typer.Option(help="Folder for the results. An earlier run is continued.")],
    minutes: Annotated[float, typer.Option(help="Time to spend in this call.", min=0.0)] = 9.0,
    again: Annotated[
        list[str] | None, typer.Option(help="Stage to run again. This option may be repeated.")
    ] = None,
) -> None:
    """Test and measure everything on a new GPU, in stages. Run it again to continue."""
    from benchmarks.environment import default_device
    from benchmarks.first_contact import run

    if default_device().type != "cuda":
        raise RuntimeError("first-contact needs a GPU; without one, run rehearse instead")
    left = run(out, minutes, typer.echo, again)
    typer.echo(
        f"{left} stages left: run this command again"
        if left
        else f"all stages are done; results in {out}"
    )


@app.command()
def rehearse() -> None:
    """Check, without a GPU, that first-contact will run on a GPU.

    The exit code is 1 if a check fails.
    """
    from benchmarks.rehearse import run

    raise typer.Exit(int(bool(run(typer.echo))))

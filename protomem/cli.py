"""The command line: `protomem train|plan|preflight|evaluate|templates|embed|report|data|recipes`. Heavy modules are
imported by the command that needs them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from protomem.data.commands import app as data_app
from protomem.elastic import end_with_agent, starting
from protomem.errors import UserError
from protomem.recipe_commands import app as recipes_app
from protomem.redact import hide, printable

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train face embeddings on millions of identities, with prototypes sharded over ranks.",
)
app.add_typer(data_app, name="data", help="Look at, check, convert and make training data and verification pairs.")
app.add_typer(recipes_app, name="recipes", help="List the methods, with their parts; `recipes show NAME` explains one.")


@app.command()
def train(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="CONFIG.yaml... key=value...", help="Config files, merged in order, then single values."),
    ],
):
    """Train from a config; goes on from the last checkpoint in its output folder.

    One process: protomem train configs/quickstart.yaml. Several: launch/local.sh 2 configs/quickstart.yaml, or
    torchrun --nproc-per-node=8 -m protomem train CONFIG, or srun -n8 protomem train CONFIG, or sbatch launch/slurm.sbatch
    CONFIG. All keys with their meaning: configs/default.yaml.

    SIGTERM, SIGINT and SIGUSR1 end it after the step at hand, with everything saved; the same command goes on from there.
    Exit codes: 0 finished; 75 stopped by a signal, saved, to be started again; 2 an error of config, data or machine, told in
    a line (78 where it refuses the first start by torchrun); anything else an unexpected end. Ranks that torchrun or srun
    started end with 0 also when stopped, since those take any other code for a failure; the file `stopped` in the output
    folder tells, and is gone once the run goes on.
    """
    from protomem.signals import STOPPED, StopRequest

    with StopRequest() as stop:  # before torch is imported: a signal to a run that just starts is not lost
        from protomem import config

        with starting():
            loaded = config.load(*config.split_arguments(arguments))
        from protomem import trainer

        finished = trainer.train(loaded, stop)
        from protomem.launcher import detect_launcher
    if not finished and detect_launcher()[0] == "single":
        raise typer.Exit(STOPPED)


@app.command()
def plan(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="CONFIG.yaml... key=value...", help="As for train; the data need not be here."),
    ],
    world_size: Annotated[int, typer.Option(help="Ranks, one GPU each.")] = 1,
    gpu: Annotated[str, typer.Option(help="h200, h100, a100, b200, a6000 or cpu")] = "h100",
    fabric: Annotated[Optional[str], typer.Option(help="ib800, ib400, ib200, eth100, eth25, gloo; else the usual one.")] = None,
    identities: Annotated[Optional[int], typer.Option(help="How many; else those of data.train.")] = None,
    images: Annotated[Optional[int], typer.Option(help="Images of the whole set; else those of data.train.")] = None,
    table: Annotated[bool, typer.Option(help="Also over 1 to 1024 ranks and 10^5 to 10^9 identities.")] = False,
    plot: Annotated[Optional[Path], typer.Option(metavar="FILE.png", help="Draw that table.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
):
    """A dry run: bytes of a rank, FLOPs, collectives, an estimate of images/s, the most identities that fit. Needs no GPU."""
    from protomem.plan import plan as make_plan

    options = dict(world_size=world_size, gpu=gpu, fabric=fabric, identities=identities, images=images)
    make_plan(arguments, **options, table=table, plot=plot, json_output=json_output)


@app.command()
def preflight(
    arguments: Annotated[
        Optional[list[str]],
        typer.Argument(metavar="[CONFIG.yaml... key=value...]", help="As for train: its data, output and device are checked."),
    ] = None,
    output: Annotated[
        Optional[Path],
        typer.Option(metavar="DIR", help="Check this folder instead of the config's, and write DIR/preflight.json."),
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds until a rank that does not answer ends the check.")] = 120.0,
    clock_limit: Annotated[float, typer.Option(min=0, help="Seconds by which clocks of hosts may differ.")] = 0.5,
    slow_factor: Annotated[
        Optional[float],
        typer.Option(min=1, help="A rank or link is slow at so many times the median; else 1.3 on GPUs, 3 on CPUs."),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
):
    """Check machines, fabric, folders and data on all ranks before training; names the rank or link at fault by host.

    Start it as training will be started: torchrun ... -m protomem preflight CONFIG, or srun, or alone. Exit code 0: all is
    well; 1: it is not, a line for each reason; 2: the command itself is wrong.
    """
    from protomem.preflight import preflight as check

    options = dict(timeout_s=timeout, clock_limit_s=clock_limit, slow_factor=slow_factor, json_output=json_output)
    raise typer.Exit(check(arguments or [], output=output, **options))


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run's output folder (its last checkpoint) or a checkpoint folder.")],
    pairs: Annotated[list[Path], typer.Argument(metavar="PAIRS.bin...", help="Verification sets in insightface's form.")],
    flip: Annotated[bool, typer.Option(help="Add the embedding of the mirrored image (the field's flip-sum).")] = False,
    batch_size: Annotated[int, typer.Option(min=1)] = 128,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
):
    """Verify pairs with a trained encoder: 10-fold accuracy, TAR@FAR, AUC, EER. Works under torchrun, too."""
    from protomem import commands

    commands.evaluate(run, pairs, flip=flip, batch_size=batch_size, device=device, json_output=json_output)


@app.command()
def templates(
    run: Annotated[Path, typer.Argument(help="A run's output folder (its last checkpoint) or a checkpoint folder.")],
    data: Annotated[str, typer.Argument(help="A labelled set; with --lists: the folder of the aligned images.")],
    lists: Annotated[
        Optional[tuple[Path, Path]],
        typer.Option(help="An IJB protocol's two lists: `image template medium` and `template template same`."),
    ] = None,
    images_per_template: Annotated[int, typer.Option(min=1, help="Without lists: images of each template.")] = 4,
    pairs: Annotated[int, typer.Option(min=1, help="Without lists: most genuine and most impostor pairs.")] = 10_000,
    pooling: Annotated[
        list[str], typer.Option(help="mean, norm (magnitude-weighted, as MagFace pools) or quality; may be repeated.")
    ] = ["mean", "norm"],
    flip: Annotated[bool, typer.Option(help="Add the embedding of the mirrored image (the field's flip-sum).")] = False,
    batch_size: Annotated[int, typer.Option(min=1)] = 128,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
):
    """Verify templates: the images of each pooled into one embedding, by their norm among others. TAR@FAR, AUC, EER."""
    from protomem import commands
    from protomem.evaluate.templates import POOLINGS

    if wrong := [p for p in pooling if p not in POOLINGS]:
        raise UserError(f"--pooling {wrong[0]} is not one of {', '.join(POOLINGS)}")
    options = dict(flip=flip, batch_size=batch_size, device=device, json_output=json_output)
    commands.templates(run, data, lists=lists, images=images_per_template, pairs=pairs, poolings=pooling, **options)


@app.command()
def embed(
    run: Annotated[Path, typer.Argument(help="A run's output folder (its last checkpoint) or a checkpoint folder.")],
    data: Annotated[str, typer.Argument(help="RecordIO set, class folders or tar shards.")],
    output: Annotated[Path, typer.Argument(help="An .npz file: embeddings [n, D] float32, labels [n].")],
    flip: Annotated[bool, typer.Option(help="Add the embedding of the mirrored image.")] = False,
    batch_size: Annotated[int, typer.Option(min=1)] = 128,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
):
    """Write the embeddings (not normalised: the norm carries quality) and labels of a whole set."""
    from protomem import commands

    commands.embed(run, data, output, flip=flip, batch_size=batch_size, device=device)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run's output folder.")]):
    """Write report.html of a run again, also while it is training."""
    from protomem.report import write_report

    print(write_report(run))


@app.command()
def version(
    full: Annotated[Optional[bool], typer.Option("--full", help="Also versions of torch, DALI, the machine.")] = False,
):
    """Print protomem's version."""
    import protomem

    print(protomem.__version__)
    if full:
        from protomem.environment import environment

        for key, value in environment().items():
            print(f"{key}: {value}")


def main() -> None:
    end_with_agent()
    try:
        app()
    except (UserError, OSError) as error:
        print(f"error: {printable(hide(str(error)))}", file=sys.stderr, flush=True)
        sys.exit(getattr(error, "code", 2))

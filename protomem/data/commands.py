"""`protomem data ...`: look at, check, convert and make data sets."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from protomem.errors import UserError
from protomem.redact import printable

app = typer.Typer(
    no_args_is_help=True,
    help="Look at, check, convert and make data sets: insightface RecordIO, class folders, tar shards, .bin pairs.",
)

_SHOWN = 40  # lines about single records on the console
_SPREAD = ("min", "median", "mean", "max")
_SOURCE = "Folder with train.rec, a .rec file, a folder of class folders, or .tar shards (folder, file or pattern)."
Source = Annotated[str, typer.Argument(help=_SOURCE, show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same pictures.")]


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help=_SOURCE + " Or a verification .bin file.", show_default=False)],
    sample: Annotated[int, typer.Option(min=1, help="Images looked at for sizes, spread evenly over the set.")] = 2000,
    json: AsJson = False,
) -> None:
    """Show what is in a set: images, identities, images per identity, sizes."""
    from protomem.data.inspect import bin_statistics, statistics
    from protomem.data.records import open_records

    facts = bin_statistics(path) if path.endswith(".bin") else statistics(open_records(path, strict=False), sample)
    if json:
        typer.echo(json_module.dumps(facts, indent=1))
        return
    spreads = {name: value for name, value in facts.items() if isinstance(value, dict) and "median" in value}
    histogram = facts.get("images_per_identity_histogram", {})
    notes = facts.get("notes", [])
    plain = {k: v for k, v in facts.items() if not isinstance(v, (dict, list)) and v is not None}
    _table(
        str(facts["path"]),
        ("", ""),
        [(_title(name), _number(value)) for name, value in plain.items() if name != "path"],
    )
    if spreads:
        rows = [(_title(name), *(_number(spread[key]) for key in _SPREAD)) for name, spread in spreads.items()]
        _table("per image or identity", ("", *_SPREAD), rows)
    if histogram:
        _table("images per identity", ("images", "identities"), [(k, _number(v)) for k, v in histogram.items()])
    for note in notes[:_SHOWN]:
        typer.echo(printable(f"note: {note}"))
    if len(notes) > _SHOWN:
        typer.echo(f"... and {len(notes) - _SHOWN:,} more (--json lists up to 1,000)")


@app.command()
def verify(
    path: Source,
    workers: Annotated[Optional[int], typer.Option(min=1, help="Threads; by default one per CPU core.")] = None,
    output: Annotated[
        Optional[Path], typer.Option(help="Where the report goes instead of <stem>.verified.json beside the data.")
    ] = None,
    decode: Annotated[bool, typer.Option(help="Decode every image, not only check its structure.")] = True,
    json: AsJson = False,
) -> None:
    """List every record that cannot be used, by position, and remember the list for training.

    Found: truncated and broken records, empty, corrupt or oversized images, labels out of range, labels above 2**24
    that were stored as float32 only, identities without images. Exit code 1 if a record cannot be used.
    """
    from dataclasses import asdict

    from protomem.data.inspect import save_report
    from protomem.data.inspect import verify as verify_records
    from protomem.data.records import open_records

    records = open_records(path, strict=False)
    if not hasattr(records, "stem"):
        raise UserError(f"{path} is generated; there is nothing to verify")
    report = verify_records(records, workers, decode_all=decode)
    written = save_report(records, report, output)
    if json:
        typer.echo(json_module.dumps({**asdict(report), "report": str(written)}, indent=1))
    else:
        folder = str(Path(report.path).absolute()) + "/"
        for position, where, reason in report.bad[:_SHOWN]:
            typer.echo(printable(f"position {position:,} ({where.replace(folder, '')}): {reason}"))
        if len(report.bad) > _SHOWN:
            typer.echo(f"... and {len(report.bad) - _SHOWN:,} more in the report")
        for note in report.notes:
            typer.echo(f"note: {note}")
        if report.missing_identities:
            some = ", ".join(map(str, report.first_missing[:8])) + (", ..." if report.missing_identities > 8 else "")
            typer.echo(f"{report.missing_identities:,} of {report.num_classes:,} identities have no image: {some}")
        typer.echo(printable(f"{len(report.bad):,} of {report.images:,} records cannot be used; report: {written}"))
    if report.bad:
        raise typer.Exit(1)


@app.command()
def index(
    path: Annotated[Path, typer.Argument(help="A .rec file, or a folder with train.rec.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Replace an .idx that is there.")] = False,
) -> None:
    """Rebuild a missing .idx by scanning the .rec file from its beginning to its end."""
    from protomem.data.rec_index import rebuild_idx

    rec = path / "train.rec" if path.is_dir() else path
    idx = rec.with_suffix(".idx")
    if not rec.exists():
        raise UserError(f"{rec} does not exist")
    if idx.exists() and not force:
        raise UserError(f"{idx} exists; --force replaces it")
    lines, broken = rebuild_idx(rec, idx)
    typer.echo(f"{idx}: {lines:,} records")
    for offset in broken[:_SHOWN]:
        typer.echo(
            f"warning: the chain of records is broken at byte {offset:,}; what could not be read there is left out"
        )


@app.command()
def pack(
    source: Source,
    output: Annotated[Path, typer.Argument(help="Folder for train.rec, train.idx and property.", show_default=False)],
    skip_corrupt: Annotated[
        bool, typer.Option("--skip-corrupt", help="Leave unusable images out and count them.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a set that is there.")] = False,
) -> None:
    """Pack a folder of class folders, or tar shards, into insightface RecordIO. Images are stored as they are."""
    from protomem.data.images import check_image
    from protomem.data.index_cache import progress_bar
    from protomem.data.inspect import known_bad
    from protomem.data.recordio import RecordWriter
    from protomem.data.records import open_records

    records = open_records(source, strict=not skip_corrupt)
    if (output / "train.rec").exists() and not force:
        raise UserError(f"{output / 'train.rec'} exists; --force replaces it")
    bad, skipped = set(known_bad(records).tolist()), 0
    with RecordWriter(output) as writer, progress_bar("packing", len(records)) as advance:
        for position in range(len(records)):
            data = records.bytes(position)
            reason = check_image(data) or ("listed as unusable by `protomem data verify`" if position in bad else None)
            if reason is None:
                writer.add(data, records.label(position))
            elif skip_corrupt:
                skipped += 1
            else:
                raise UserError(f"{records.where(position)}: {reason}; --skip-corrupt leaves such images out")
            advance(1)
    typer.echo(f"{output}: {len(records) - skipped:,} images, {skipped:,} left out")


@app.command()
def clean(
    run: Annotated[
        Path, typer.Argument(help="A run's output folder (its last checkpoint) or a checkpoint folder.", show_default=False)
    ],
    output: Annotated[Path, typer.Argument(help="Folder for the cleaned set, the list and the pictures.", show_default=False)],
    data: Annotated[
        Optional[str], typer.Option(help="Where the run's data are, if no longer at its data.train.", show_default=False)
    ] = None,
    angle: Annotated[
        float, typer.Option(min=0, max=180, help="Degrees above which an image is dropped (75: the paper's).")
    ] = 75.0,
    list_only: Annotated[
        bool, typer.Option("--list-only", help="Write no set: the list, the summary and the pictures alone.")
    ] = False,
    skip_corrupt: Annotated[
        bool, typer.Option("--skip-corrupt", help="Leave unusable images out and count them, as data.on_corrupt=skip does.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what this command has written there.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of a rank in one forward pass.")] = 128,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    json: AsJson = False,
) -> None:
    """Drop images that are probably labelled wrongly: far from their identity's dominant prototype in a trained run.

    The second stage of Sub-center ArcFace: train with prototypes.sub_centers=3, clean, then train anew on OUTPUT with
    prototypes.sub_centers=1. The dominant prototype is the one that is nearest to most images of the identity; a run with a
    single prototype of each will do, too. OUTPUT gets train.rec, train.idx, property (images as they are stored, identities
    with the same numbers, also those that have no image left), the columns beside the data, dropped.csv, clean.json,
    angles.png and dropped.png: look at these before you train. Which angle parts the two humps of angles.png depends on the
    run; --list-only --angle 0 lists the angle of every image. Works under torchrun, too.
    """
    from protomem import cleaning

    options = dict(data=data, angle=angle, list_only=list_only, skip_corrupt=skip_corrupt, force=force)
    cleaning.clean(run, output, **options, batch_size=batch_size, device=device, json_output=json)


@app.command()
def synth(
    path: Annotated[Path, typer.Argument(help="Folder for train.rec, train.idx and property.", show_default=False)],
    identities: Annotated[int, typer.Option(min=1, help="Number of people.")] = 600,
    images: Annotated[int, typer.Option(min=1, help="Images per person (the mean, with --long-tail).")] = 20,
    long_tail: Annotated[bool, typer.Option("--long-tail", help="Few people with many images, many with few.")] = False,
    first_identity: Annotated[
        int, typer.Option(min=0, help="Number of the first person: other people, other faces.")
    ] = 0,
    degrade: Annotated[float, typer.Option(min=0, max=1, help="Share of the images whose quality is lowered.")] = 0.3,
    quality: Annotated[int, typer.Option(min=1, max=100, help="JPEG quality.")] = 92,
    seed: Seed = 0,
    device: Annotated[str, typer.Option(help="Where to render: cpu, cuda, cuda:1, ...")] = "cpu",
    sheet: Annotated[
        Optional[Path], typer.Option(help="Also draw a contact sheet of some of the people (PNG).")
    ] = None,
    json: AsJson = False,
) -> None:
    """Render a training set of faces. A set that is there already, made with the same options, is kept."""
    from protomem.data.faces import ImageOptions, contact_sheet, write_face_set

    options = ImageOptions(degrade=degrade)
    facts = write_face_set(
        path,
        identities=identities,
        images_per_identity=images,
        seed=seed,
        long_tail=long_tail,
        first_identity=first_identity,
        options=options,
        quality=quality,
        device=device,
    )
    if sheet is not None:
        shown = {"identities": min(identities, 8), "images": min(images, 10), "first_identity": first_identity}
        contact_sheet(sheet, **shown, seed=seed, options=options, device=device)
        facts["sheet"] = str(sheet)
    if json:
        typer.echo(json_module.dumps(facts, indent=1))
    else:
        _table(
            str(path), ("", ""), [(_title(k), _number(v)) for k, v in facts.items() if not isinstance(v, (dict, list))]
        )


@app.command()
def pairs(
    output: Annotated[
        Path,
        typer.Argument(
            help="The .bin file to write; with --synth the folder for <kind>.bin files.", show_default=False
        ),
    ],
    list_file: Annotated[
        Optional[Path], typer.Option("--list", help="Pairs, one a line: 'fileA fileB 0|1', or LFW's pairs.txt.")
    ] = None,
    images: Annotated[Optional[Path], typer.Option(help="Folder that the names in the list refer to.")] = None,
    synth: Annotated[bool, typer.Option("--synth", help="Render pairs of unseen people instead.")] = False,
    kinds: Annotated[
        str, typer.Option(help="With --synth, which sets, parted by commas.")
    ] = "clean,cross_pose,low_quality,look_alike",
    patterns: Annotated[
        Optional[str],
        typer.Option(
            help="Pairs of these generated pictures: patterns:identities=2000,images=4,first=50000000,size=48. Give `first` "
            "so that nobody is in the training set.",
            show_default=False,
        ),
    ] = None,
    count: Annotated[
        int, typer.Option(min=20, help="With --synth or --patterns, pairs in each set, half of them genuine.")
    ] = 2000,
    identities: Annotated[int, typer.Option(min=2, help="With --synth, number of people.")] = 200,
    first_identity: Annotated[int, typer.Option(min=0, help="With --synth, the first person.")] = 10_000_000,
    seed: Seed = 0,
) -> None:
    """Make verification sets (.bin, the form of insightface) from a list and images, rendered, or of generated patterns."""
    from protomem.data.pairs import pairs_from_folder

    if synth + (list_file is not None) + (patterns is not None) != 1 or (list_file is None) != (images is None):
        raise UserError("give either --list FILE with --images FOLDER, or --synth, or --patterns patterns:...")
    if patterns is not None:
        from protomem.data.patterns import write_pattern_pairs
        from protomem.data.records import open_records

        if not patterns.startswith("patterns:"):
            raise UserError(f"--patterns {patterns}: write patterns:identities=2000,images=4,first=50000000,size=48")
        genuine = write_pattern_pairs(output, open_records(patterns), count, seed)
        typer.echo(f"{output}: {count:,} pairs, {genuine:,} of them genuine")
        return
    if list_file is not None and images is not None:
        total, genuine = pairs_from_folder(images, list_file, output)
        typer.echo(f"{output}: {total:,} pairs, {genuine:,} of them genuine")
        return
    from protomem.data.faces import write_face_pairs

    wanted = tuple(kind.strip() for kind in kinds.split(","))
    written = write_face_pairs(
        output, kinds=wanted, pairs=count, identities=identities, first_identity=first_identity, seed=seed
    )
    for kind, path in written.items():
        typer.echo(f"{kind}: {path}")


def _title(name: str) -> str:
    return name.replace("_", " ")


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _table(title: str, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(printable(title)), title_justify="left", show_header=any(head), title_style="bold")
    for number, name in enumerate(head):
        table.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(escape(printable(cell)) for cell in row))
    Console().print(table)

"""A dry run: what a config needs and how fast it could be, before a GPU hour is spent. Nothing is allocated, nothing runs."""

from __future__ import annotations

from pathlib import Path

from protomem import config


def plan(
    arguments: list[str],
    *,
    world_size: int,
    gpu: str,
    fabric: str | None = None,
    identities: int | None = None,
    images: int | None = None,
    table: bool = False,
    plot: Path | None = None,
    json_output: bool = False,
) -> None:
    """Print the plan of a config (files and key=value) on `world_size` ranks. Raises UserError, before torch is imported where
    that is possible."""
    from protomem.plan import hardware

    device = hardware.device(gpu)
    via = hardware.fabric(fabric, device)
    loaded = config.load(*config.split_arguments(arguments), optional=config.RUN_KEYS)
    from protomem.plan import scale, show
    from protomem.plan.case import make_case

    case = make_case(loaded, world_size, device, via, identities, images)
    cells = scale.table(case) if table or plot else []
    if json_output:
        show.print_json(case, cells)
    else:
        show.print_plan(case)
        if table:
            show.print_table(case, cells)
    if plot:
        scale.plot(case, cells, plot)

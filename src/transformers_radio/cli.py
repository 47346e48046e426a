"""The command line: parses, calls, prints. Training knobs are recipe fields (`key=value`), never flags."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

RecipePath = Annotated[Path, typer.Argument(help="A recipe (YAML), see the folder recipes/.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Recipe fields as key=value, e.g. stages.main.steps=100.")]


@app.command()
def train(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Distil a student. The same command continues a run that was stopped or killed."""
    from transformers_radio.training.__main__ import main

    raise typer.Exit(main([str(recipe), *(overrides or [])]))


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    processes: Annotated[
        int, typer.Option("--processes", "--gpus", help="Number of processes the run will have, one a GPU.")
    ] = 1,
    gpu: Annotated[
        str | None,
        typer.Option(help="Also show time and memory on these: a100-40, a100-80, h100, h200, l40s, rtx4090, ..."),
    ] = None,
    utilisation: Annotated[float, typer.Option(help="Share of the GPU's peak FLOP/s that is reached.")] = 0.4,
) -> None:
    """Show teachers, dims, resolutions, parameters, FLOPs, memory, samples seen; GPU-hours. Downloads nothing."""
    from transformers_radio.training.plan import print_plan
    from transformers_radio.training.recipe import load_recipe

    print_plan(load_recipe(recipe, overrides), processes, gpu, utilisation)


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option(help="Folder for the made images, the run and the results.")] = Path(
        "runs/quickstart"
    ),
    overrides: Overrides = None,
) -> None:
    """Distil a small student from three small teachers, evaluate all four, show the table (about 6 minutes)."""
    from transformers_radio.quickstart.run import run_quickstart

    if run_quickstart(output, overrides or []) is None:
        raise typer.Exit(130)  # stopped by a signal, and saved


def main() -> None:
    """User errors are one line; anything else keeps its traceback."""
    try:
        app()
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()

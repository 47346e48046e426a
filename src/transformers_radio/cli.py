"""The command line: parses, calls, prints."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from .data import USER_ERRORS, one_line


class Commands(TyperGroup):
    """Ctrl-C is one line; also while libraries are imported."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            raise typer.Exit(130) from None


HELP = "One vision encoder in place of several: train, evaluate, convert, export and publish students of AM-RADIO."
app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=HELP)

RecipePath = Annotated[Path, typer.Argument(help="A recipe (YAML), see the folder recipes/.")]
TrustCode = Annotated[
    bool,
    typer.Option("--trust-code", help="The recipe's teachers may run code: type python, option trust_remote_code."),
]
Overrides = Annotated[list[str] | None, typer.Argument(help="Recipe fields as key=value, e.g. stages.main.steps=100.")]


def print_fields(asked: bool) -> None:
    if asked:
        from transformers_radio.settings import describe_fields
        from transformers_radio.training.recipe import Recipe

        typer.echo(describe_fields(Recipe))
        raise typer.Exit()


def pairs(option: str, form: str, values: list[str] | None) -> dict[str, str]:
    """The NAME=VALUE of a repeated option as a dictionary."""
    found = dict(value.split("=", 1) for value in values or [] if "=" in value)
    if len(found) < len(values or []):
        raise ValueError(f"{option} {' '.join(values or [])}: write {form}, each name once.")
    return found


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    trust_code: TrustCode = False,
    fields: Annotated[
        bool, typer.Option("--fields", help="Print all fields of a recipe.", is_eager=True, callback=print_fields)
    ] = False,
) -> None:
    """Distill a student. The same command continues a run that was stopped or killed."""
    from transformers_radio.training.__main__ import TRUST_CODE, main

    raise typer.Exit(main([str(recipe), *(overrides or []), *([TRUST_CODE] if trust_code else [])]))


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
    utilization: Annotated[
        float, typer.Option("--utilization", "--utilisation", help="Share of the GPU's peak FLOP/s that is reached.")
    ] = 0.4,
    trust_code: TrustCode = False,
) -> None:
    """Show teachers, dims, resolutions, parameters, FLOPs, memory, samples seen; GPU-hours. Downloads nothing."""
    from transformers_radio.training.plan.gpus import find_gpu
    from transformers_radio.training.recipe import load_recipe

    if gpu is not None:
        find_gpu(gpu)
    loaded = load_recipe(recipe, overrides, trust_code)
    from transformers_radio.training.plan.tables import (
        print_plan,  # torch comes with it: what is mistyped has been named
    )

    print_plan(loaded, processes, gpu, utilization)


class EvalCommand(TyperCommand):
    """Its help ends with the names of the tasks, or with the settings of the task that it is asked about."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # an option's value is not an argument
        is_value = [False, *(arg.startswith("--") and "=" not in arg and arg != "--help" for arg in args)]
        ctx.meta["arguments"] = [
            arg for arg, skipped in zip(args, is_value, strict=False) if not skipped and not arg.startswith("-")
        ]
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from transformers_radio.evaluation.run import TASKS, load_task
        from transformers_radio.settings import describe_fields

        super().format_help(ctx, formatter)
        arguments = ctx.meta["arguments"]
        task = next((arg for arg in arguments if arg in TASKS), arguments[0] if arguments else None)
        if task is None:
            typer.echo(f"Tasks: {', '.join(TASKS)}.\nThe settings of a task: transformers-radio eval TASK --help")
        else:
            typer.echo(f"Settings of {task}:\n\n{describe_fields(load_task(task).config_class)}")


@app.command("eval", cls=EvalCommand)
def evaluate(
    task: Annotated[str, typer.Argument(help="What to measure, see below.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="The task's settings as key=value.")] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder or Hub id, or TYPE:CHECKPOINT of a teacher; TITLE= before it, @SIZE (pixels) after it. "
            "May be repeated."
        ),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Folder, or anything datasets.load_dataset opens.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="Settings as YAML, see recipes/evaluation/.")] = None,
    output: Annotated[Path, typer.Option(help="Results are OUTPUT/<model>/<task>.<data>.json.")] = Path("runs/eval"),
    models: Annotated[
        Path | None,
        typer.Option(help="YAML of TITLE: MODEL, see recipes/evaluation/table1.yaml; --model then chooses by TITLE."),
    ] = None,
) -> None:
    """Measure one thing for one or more models: students, teachers, or vision models of transformers."""
    from transformers_radio.evaluation.run import named_models, run_task

    chosen = (model or []) if models is None else named_models(models, model or [])
    results = run_task(task, chosen, data, recipe, output, overrides)
    from accelerate import PartialState
    from rich.console import Console
    from rich.text import Text

    from transformers_radio.publishing.card import update_card  # torch comes with it, which run_task needed as well

    if not PartialState().is_main_process:
        return
    for student in dict.fromkeys(result.spec for result in results if result.kind == "student"):
        update_card(Path(student), [output])
    console = Console()
    for result in results:
        figures = "  ".join(f"{name} {value:.2f}" for name, value in result.metrics.items())
        # Text, as names and paths may look like markup
        line = Text.assemble((result.model, "bold"), f"  {figures}\n  {result.data}: {result.protocol}")
        console.print(line, soft_wrap=True)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of results, such as runs/eval.")],
    output: Annotated[Path | None, typer.Option(help="Where the report goes; the first folder unless given.")] = None,
    title: Annotated[str, typer.Option(help="The table's heading.")] = "Students and teachers",
) -> None:
    """One table of all results, like the paper's Table 1: Markdown, JSON, a picture, and entries for model cards."""
    from rich.console import Console

    from transformers_radio.evaluation.report.run import write_report

    table, files = write_report(folders, output, title)
    console = Console(markup=False, emoji=False)
    console.print(table.to_rich(console.width))
    console.print("\n".join(map(str, files)), highlight=False, soft_wrap=True)


@app.command()
def visualize(
    kind: Annotated[str, typer.Argument(help="features, attention, positions, heat-map, masks, or all.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings as key=value, e.g. basis=models.")] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="As for eval; students and teachers side by side. May be repeated.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="An image, a folder, or what datasets.load_dataset opens.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="Settings as YAML.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of the PNG files.")] = Path("runs/visualize"),
) -> None:
    """Pictures of what models see: features, attention, position tables, words, masks."""
    from transformers_radio.evaluation.run import check_pictures

    check_pictures(kind, model or [], recipe, overrides)
    from transformers_radio.visualization.run import visualize  # torch comes with it

    for path in visualize(kind, model or [], data, recipe, output, overrides):
        typer.echo(path)


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="A released RADIO: a .pth.tar file, a folder with config.json and safetensors, a Hub id, or "
            "OWNER/NAME:FILE. With --for also a folder of this package.",
        ),
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The new folder.")],
    target: Annotated[
        str,
        typer.Option(
            "--for",
            help="Who is to read it: radio (this package), native (transformers), nvidia, vllm, sglang, tensorrt-llm, "
            "or timm.",
        ),
    ] = "radio",
    adaptors: Annotated[
        str | None, typer.Option(help="The adaptors to take, as a,b; all if not given, none with ''.")
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="Side in pixels, for timm.")] = None,
    version: Annotated[
        str | None, typer.Option(help="Such as radio_v2.5-h, where neither config nor file name says it.")
    ] = None,
) -> None:
    """Bring in a released RADIO, C-RADIO or E-RADIO, or write a student for another library."""
    from transformers_radio.hub.folder import convert  # torch comes with it

    names = None if adaptors is None else [name.strip() for name in adaptors.split(",") if name.strip()]
    lines = convert(source, destination, target, names, image_size, version)
    if target == "radio":
        from .publishing.card import write_described_card

        write_described_card(destination)
    for line in lines:
        typer.echo(line)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A student's folder or Hub id.")],
    format: Annotated[str, typer.Option(help="onnx, torch-export, executorch or openvino.")] = "onnx",
    dtype: Annotated[str, typer.Option(help="fp32, fp16, bf16, or q8 (int8; onnx, torch-export).")] = "fp32",
    output: Annotated[
        Path | None, typer.Option(help="The program's folder; onnx/ goes into it. The student's folder unless given.")
    ] = None,
    adaptor: Annotated[list[str] | None, typer.Option(help="Keep this adaptor; may be repeated.")] = None,
    no_adaptors: Annotated[bool, typer.Option("--no-adaptors", help="Leave all adaptors out.")] = False,
    window_size: Annotated[int | None, typer.Option(help="Attention windows, as config.window_size.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a program that is there.")] = False,
) -> None:
    """Write a student for another runtime; the file is compared with the student.

    The program takes any batch and any sides. That of an E-RADIO without --window-size takes squares of its preferred
    resolution, as its windows follow the image.
    """
    if no_adaptors and adaptor:
        raise ValueError(f"--no-adaptors leaves out --adaptor {adaptor[0]} too; give one of the two.")
    if output is None and not Path(model).is_dir():
        raise ValueError(
            f"There is no folder {model}; if it is a Hub id, say where the program goes: --output FOLDER."
        )
    from transformers_radio.export.parity import format_parity
    from transformers_radio.export.run import export_student

    adaptors = [] if no_adaptors else adaptor or None
    path, rows = export_student(model, output or Path(model), format, dtype, adaptors, window_size, overwrite)
    if rows:
        typer.echo(format_parity(rows))
        if len(sizes := {(row.height, row.width) for row in rows}) == 1:
            typer.echo("for images of {}x{} pixels only".format(*sizes.pop()))
    else:
        typer.echo(f"not compared: onnxruntime has {dtype} kernels for GPUs only")
    typer.echo(path)


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option(help="Folder for the synthetic images, the run and the results.")] = Path(
        "runs/quickstart"
    ),
    overrides: Overrides = None,
) -> None:
    """Distill a small student from three small teachers, evaluate all four, show the table (about 8 minutes)."""
    from transformers_radio.quickstart.run import run_quickstart

    if run_quickstart(output, overrides or []) is None:
        raise typer.Exit(130)  # stopped by a signal, and saved


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="A student's folder, such as runs/mine/student.")],
    repo_id: Annotated[str, typer.Option(help="ORG/NAME on the Hub.")],
    results: Annotated[
        list[Path] | None, typer.Option(help="Folder of results, such as runs/eval. May be repeated.")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Check everything and show what would go; send nothing.")] = False,
    private: Annotated[bool, typer.Option(help="Make a new repository private.")] = False,
    license_override: Annotated[
        str | None, typer.Option(help="Why a teacher's license does not apply; it goes into the card.")
    ] = None,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="The folder's code may be another than this version's; it runs.")
    ] = False,
    eval_results: Annotated[
        list[str] | None,
        typer.Option(
            help="DATA=DATASET: write the results on DATA for the leaderboard of this data set on the Hub too, as "
            ".eval_results/*.yaml. May be repeated."
        ),
    ] = None,
) -> None:
    """Publish a student on the Hub in one commit: weights, code, processor, model card, results, recipe."""
    from transformers_radio.publishing.publish import describe, prepare, upload

    benchmarks = pairs("--eval-results", "DATA=DATASET", eval_results)
    publication = prepare(folder, repo_id, results or [], license_override, benchmarks, trust_code)
    for line in describe(publication):
        typer.echo(line)
    if dry_run:
        typer.echo("dry run: nothing was sent")
    else:
        commit = upload(publication, private)
        typer.echo(f"published: {commit.commit_url}\nrevision: {commit.oid}")


Host = Annotated[str, typer.Option(help="Whom to listen to: this machine alone, or 0.0.0.0 for everybody.")]
Port = Annotated[int | None, typer.Option(help="The first free one from 7860 on unless given.")]


def check_gradio() -> None:
    """ImportError that names the extra, unless gradio is installed."""
    from importlib.util import find_spec

    if find_spec("gradio") is None:
        raise ImportError('The pages need gradio: pip install "transformers_radio[demo]"')


@app.command()
def demo(
    student: Annotated[str, typer.Argument(metavar="DIR", help="A student's folder, such as runs/mine/student.")],
    teacher: Annotated[
        list[str] | None,
        typer.Option(help="ADAPTOR=TYPE:CHECKPOINT, instead of what the student records. May be repeated."),
    ] = None,
    no_teachers: Annotated[bool, typer.Option("--no-teachers", help="Show the student's features alone.")] = False,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch from the Hub what is not in its cache: teachers, or the student.")
    ] = False,
    space: Annotated[Path | None, typer.Option(help="Write a Space for the Hub into this new folder instead.")] = None,
    host: Host = "127.0.0.1",
    port: Port = None,
) -> None:
    """A page for a student: drop an image, compare its features with the teachers', type labels, click masks."""
    if not download:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read by the Hub's client when it is imported, below
    given = pairs("--teacher", "ADAPTOR=TYPE:CHECKPOINT", teacher)
    if space is not None:
        check_gradio()
        from transformers_radio.demo.space import write_space

        for path in write_space(student, space, given):
            typer.echo(path)
        return
    from transformers_radio.evaluation.models.specs import check_model

    check_model(student)  # before torch is loaded
    check_gradio()
    from transformers_radio.demo.page import serve

    serve(student, given, not no_teachers, host, port)


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(help="The output_dir of a run, while it trains or later.")],
    data: Annotated[
        str | None, typer.Option(help="Images to show features of, as for visualize; those it trains on unless given.")
    ] = None,
    images: Annotated[int, typer.Option(min=0, max=16, help="How many; 0 for no features.")] = 4,
    host: Host = "127.0.0.1",
    port: Port = None,
) -> None:
    """A live view of a run as a page: losses, speed, time left, features at each checkpoint. Only reads the run."""
    if not (run / "run.yaml").is_file():
        raise FileNotFoundError(f"{run} holds no run, as it has no run.yaml: name the output_dir of a recipe.")
    check_gradio()
    from transformers_radio.demo.run_page import watch

    watch(run, data, images, host, port)


def main() -> None:
    """User errors are one line; anything else keeps its traceback."""
    # Read when torch is loaded. Else its threads spin for a core after every small product, also while others use it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except USER_ERRORS as error:
        raise SystemExit(f"error: {one_line(error)}") from error


if __name__ == "__main__":
    main()

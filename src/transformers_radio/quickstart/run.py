"""`transformers-radio quickstart`: synthetic images, distillation, evaluation with the teachers, table, picture."""

import glob
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from transformers_radio.disk import write_text
from transformers_radio.training import Recipe, load_recipe

from .world import INDEX_FILE, make_world

if TYPE_CHECKING:  # torch comes with it
    from transformers_radio.evaluation import Table
    from transformers_radio.evaluation.models.encoder import VisionEncoder

FOLDER = Path(str(resources.files("transformers_radio.quickstart")))
VIT_RECIPE = FOLDER / "recipe_vit.yaml"
# the recipe of each student, and the folder of its run
STUDENTS = {
    "eradio": (FOLDER / "recipe_eradio.yaml", "run"),
    "vit": (VIT_RECIPE, "run-vit"),
    "convnext": (FOLDER / "recipe_convnext.yaml", "run-convnext"),
}
DEFAULT = "eradio"
TITLES = {"clip": "CLIP", "dinov2": "DINOv2", "sam": "SAM"}
STUDENT = "RADIO student"
PICTURED, PICTURED_SIDE = 6, 256  # images, and pixels of the student's side


def run_quickstart(output: Path, overrides: list[str] | None = None) -> "Table | None":
    """Does what is not done yet in `output` and returns the table; None if a signal stopped the training.

    Writes output/world (the images), output/teachers (the teachers' outputs for these images, for this run and later
    ones) and output/run: the recipe, checkpoints and metrics, student/ (the model that AutoModel loads), table.md,
    table.json and features.png. `overrides` are those of the recipe, and `student=NAME` for another of `STUDENTS`,
    whose run has a folder of its own (output/run-NAME). They may name another `output_dir`.

    Raises:
        ValueError: an unknown student, or what `load_recipe` refuses.
        FileExistsError: the run's folder holds the run of another type of student.
    """
    output = output.expanduser()
    path, run, overrides = _choose_student(overrides or [])
    scenes = f"{glob.escape(str(output / 'world'))}/train-*.tar"
    paths = {"output_dir": output / run, "data.path": scenes, "teacher_cache": output / "teachers"}
    recipe = load_recipe(path, [*(f"{field}={path}" for field, path in paths.items()), *overrides])
    _check_run(recipe, output)
    world = make_world(output / "world")
    from rich.console import Console  # imported after mistakes in the overrides have been named

    from transformers_radio.evaluation import Table
    from transformers_radio.training import train

    result = train(recipe)
    if result.student_dir is None:
        return None
    run_dir = Path(recipe.output_dir)
    table_path, picture_path = run_dir / "table.json", run_dir / "features.png"
    student_written = (result.student_dir / "config.json").stat().st_mtime
    if table_path.exists() and table_path.stat().st_mtime > student_written:
        table = Table.from_json(table_path.read_text(encoding="utf-8"))
    else:
        encoders = load_encoders(recipe, result.student_dir)
        table = evaluate(encoders, world.directory, recipe)
        picture(encoders, world.directory, picture_path)
        write_text(run_dir / "table.md", table.to_markdown())
        describe(result.student_dir, table)
        write_text(table_path, table.to_json())  # last: it says that the evaluation is done
    console = Console(markup=False, emoji=False)
    console.print(table.to_rich(console.width))
    console.print(f"student: {result.student_dir}\npicture: {picture_path}", highlight=False, soft_wrap=True)
    return table


def describe(student_dir: Path, table: "Table") -> None:
    """Puts the table into the student's model card, if its author has not removed the card."""
    from transformers_radio.publishing.card import CARD, read_card

    from .card import add_quickstart

    if (student_dir / CARD).is_file():
        card = read_card(student_dir)
        add_quickstart(card, table.to_markdown(), table.rows[-1].metrics)
        write_text(student_dir / CARD, str(card))


def _choose_student(overrides: list[str]) -> tuple[Path, str, list[str]]:
    """The recipe and the run's folder that `student=NAME` stands for, and the other overrides."""
    names = [override.partition("=")[2] for override in overrides if override.startswith("student=")]
    name = names[-1] if names else DEFAULT
    if name not in STUDENTS:
        raise ValueError(
            f"student is {name!r}, expected one of {', '.join(STUDENTS)}; student.size=... and the other fields of "
            "student change a part of it"
        )
    return *STUDENTS[name], [override for override in overrides if not override.startswith("student=")]


def _check_run(recipe: Recipe, output: Path) -> None:
    """Names before the images are drawn, which takes a minute, what training would refuse after that."""
    import torch

    from transformers_radio.data import list_files
    from transformers_radio.training.plan.count import check_recipe
    from transformers_radio.training.run.folder import find_run, recorded_recipe

    before = recorded_recipe(recipe)
    if before is not None and before.student.type != recipe.student.type and not recipe.overwrite:
        raise FileExistsError(
            f"{recipe.output_dir} holds a run whose student is of type {before.student.type}, and this one's is of "
            f"type {recipe.student.type}: move that folder away, give another --output than {output}, or set "
            "overwrite=true to delete the run"
        )
    if (output / "world" / INDEX_FILE).exists():
        return
    settled, *_ = check_recipe(recipe, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    find_run(settled)
    if str(output / "world") not in str(recipe.data.path):  # the user's own images
        list_files(recipe.data)


def load_encoders(recipe: Recipe, student_dir: Path) -> "list[VisionEncoder]":
    """The rows of the table: the recipe's teachers, then the student; all in float32."""
    from transformers_radio.evaluation.models.encoder import load_encoder

    teachers = [
        load_encoder(f"{TITLES.get(name, name)}={spec.type}:{spec.checkpoint}", spec.image_size)
        for name, spec in recipe.teachers.items()
    ]
    return [*teachers, load_encoder(f"{STUDENT}={student_dir}", adaptor="clip")]


def evaluate(encoders: "list[VisionEncoder]", world: Path, recipe: Recipe) -> "Table":
    """One row per model: what `measure` gives, and throughput, interleaved in one run."""
    import torch

    from transformers_radio.evaluation import Row, Table, throughput, throughput_conditions

    from .measure import Yardstick, measure

    yardstick = Yardstick(world, recipe)
    inputs = {encoder.name: torch.rand(32, 3, encoder.image_size, encoder.image_size) for encoder in encoders}
    speed = throughput({encoder.name: encoder.model for encoder in encoders}, inputs, repeats=8)
    rows = [
        Row(encoder.name, encoder.params, encoder.image_size, speed[encoder.name], measure(encoder, yardstick))
        for encoder in encoders
    ]
    conditions = throughput_conditions(encoders[-1].model, inputs[encoders[-1].name])
    return Table(
        "Quickstart: a student and its three teachers",
        rows,
        notes=[
            *yardstick.notes,
            f"Throughput in images/s, {conditions}; each teacher at its own resolution.",
        ],
    )


def _pictured_side(encoder: "VisionEncoder") -> int:
    """A network that is built for one size has no other."""
    if not encoder.is_student:
        return encoder.image_size
    return encoder.model.get_nearest_supported_resolution(PICTURED_SIDE, PICTURED_SIDE)[0]


def picture(encoders: "list[VisionEncoder]", world: Path, path: Path) -> None:
    """Input, PCA of each teacher's features, PCA of the student's at 256 pixels, for a few validation images.

    Teachers see their own sizes. The student takes any: at twice the largest of its training, there are enough places
    to see outlines.
    """
    import torch

    from transformers_radio.evaluation import load_labelled_images
    from transformers_radio.visualization import teacher_student_figure

    from .measure import resize_images

    images = load_labelled_images(world / "validation-*.tar", "validation", 128, limit=PICTURED).images
    columns = {}
    with torch.no_grad():
        for encoder in encoders:
            side = _pictured_side(encoder)
            columns[encoder.name] = encoder.features(resize_images(images, side).float() / 255)
    teacher_student_figure(images, columns, path)

"""The commands and settings of every page: options, tasks, recipes, fields, scripts and targets are there."""

import re
import shlex
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from typer.main import get_command

from helpers.documents import PAGES, blocks
from helpers.paths import ROOT
from transformers_radio import cli
from transformers_radio.evaluation.run import PICTURES, TASKS, load_config, load_task
from transformers_radio.evaluation.segmentation.task import SegmentationTaskConfig
from transformers_radio.export.formats import FORMATS
from transformers_radio.quickstart.run import _choose_student
from transformers_radio.training import Recipe, load_recipe
from transformers_radio.visualization.run import VisualizeConfig

# Programs of others: their options are theirs.
FOREIGN = ("pip install", "npm install", "cp", "hf", "ssh", "python -m http.server", "python -c")
PLACEHOLDERS = {
    "R": "0",
    "mine.yaml": "recipes/one_gpu_vit_s16.yaml",
    "RECIPE": "recipes/one_gpu_vit_s16.yaml",
    "FSDP.yaml": "recipes/accelerate/fsdp2.yaml",
}


def commands(page):
    """(place, words) of each command: comments, continued lines and [optional parts ...] resolved."""
    for block in blocks(page, "bash"):
        text = re.sub(r"\\\n", " ", block.code)
        for number, line in enumerate(text.splitlines()):
            line = re.sub(r"\[[^\]]*\.\.\.\]", "", line)  # [key=value ...]
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # of the environment
                    words = words[1:]
                if words:
                    yield f"{block.page}:{block.line + number}", [PLACEHOLDERS.get(w, w) for w in words if w != "..."]


def check(words):
    """Raises an error unless a command of this project could be run with these words."""
    if words[0] == "transformers-radio":
        check_own(words[1], words[2:])
    elif words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(word for word in words[1:] if "=" not in word) <= set(targets), words
    elif words[:2] == ["accelerate", "launch"]:
        arguments = launch_command_parser().parse_args(words[2:])
        assert (ROOT / arguments.config_file).is_file(), words
        check_launched(arguments)
    elif words[0] == "python" and words[1].endswith(".py"):
        check_script(ROOT / words[1], words[2:])
    elif words[:3] == ["python", "-m", "torch.distributed.run"]:
        recipe = words.index("transformers_radio.training") + 1
        load_recipe(ROOT / words[recipe], words[recipe + 1 :])
    elif words[:2] == ["python", "-m"] and words[2].startswith("transformers_radio"):
        assert (ROOT / "src" / Path(*words[2].split("."))).with_suffix(".py").is_file(), words
    else:
        assert " ".join(words).startswith(FOREIGN), words
    if words[:2] == ["pip", "install"]:
        check_extras(words[2:])


def check_own(name, words):
    """A command of transformers-radio: its options as click parses them, and what its arguments name."""
    command = get_command(cli.app).commands[name]
    given = command.make_context(name, list(words), resilient_parsing="--help" in words or "--fields" in words).params
    overrides = given.get("overrides") or []
    if name in ("train", "plan") and given["recipe"]:
        load_recipe(ROOT / given["recipe"], overrides)
    elif name == "quickstart":
        recipe, _, overrides = _choose_student(overrides)
        load_recipe(recipe, ["data.path=images", *overrides])
    elif name == "eval" and given["task"] != "TASK":
        task = load_task(given["task"])
        recipe = given["recipe"] and ROOT / given["recipe"]
        load_config(task.config_class, given["data"], recipe, overrides, task.passed_over)
    elif name == "visualize":
        assert given["kind"] in (*PICTURES, "all")
        load_config(VisualizeConfig, given["data"], given["recipe"], overrides)
    elif name == "export":
        assert given["format"] in FORMATS
    for field in ("models", "recipe"):
        if given.get(field):
            assert (ROOT / given[field]).is_file(), given[field]


def check_launched(arguments):
    if arguments.module:
        assert arguments.training_script == "transformers_radio.training"
        load_recipe(ROOT / arguments.training_script_args[0], arguments.training_script_args[1:])
    else:  # $(which transformers-radio) eval TASK
        rest = arguments.training_script_args
        assert rest[rest.index("eval") + 1] in TASKS


def check_script(path, words):
    """A script of this repository has the options."""
    source = path.read_text(encoding="utf-8")
    for option in (word.partition("=")[0] for word in words if word.startswith("--")):
        assert f'"{option}"' in source, f"{path.name} has no option {option}"


def check_extras(words):
    known = re.search(r"extras_require=\{(.*?)\}", (ROOT / "setup.py").read_text(), re.DOTALL)[1]
    for extra in re.findall(r"\[([\w,]+)\]", " ".join(words)):
        assert set(extra.split(",")) <= set(re.findall(r'"(\w+)":', known)), words


def problem_of(words):
    """What is wrong with a command, or None."""
    try:
        check(words)
    except (Exception, SystemExit) as error:  # of the command line's parsers, and of what reads recipes and settings
        return f"{' '.join(words)}\n{type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")])
def test_the_commands_of_a_page_could_be_run(page):
    found = list(commands(page))
    assert found
    for place, words in found:
        problem = problem_of(words)
        assert problem is None, f"{place}: {problem}"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")])
def test_the_settings_of_a_page_have_fields(page):
    for block in blocks(page, "yaml"):
        written = OmegaConf.create(block.code.replace("[...]", "[]"))
        problems = []
        for schema in (Recipe, SegmentationTaskConfig):
            try:
                OmegaConf.merge(OmegaConf.structured(schema), written)
            except OmegaConfBaseException as error:
                problems.append(f"{schema.__name__}: {str(error).splitlines()[0]}")
        assert len(problems) < 2, f"{block.place}: {problems}"


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("transformers-radio train recipes/radio_vit_b16.yaml --steps 3", "--steps"),
        ("transformers-radio train recipes/radio_vit_b16.yaml teachers.sam.weight=3", "teachers.sam.weight"),
        ("transformers-radio train recipes/radio_vit_c16.yaml", "radio_vit_c16.yaml"),
        ("transformers-radio eval speed --model x", "speed"),
        ("transformers-radio eval knn --model x neighbours=3", "neighbours"),
        ("transformers-radio visualize pca --model x", "pca"),
        ("transformers-radio share x", "share"),
        ("make everything", "everything"),
        ("python examples/finetune_lora.py x y --depth 3", "--depth"),
        ("python -m transformers_radio.nothing", "nothing"),
        ("pip install 'transformers_radio[everything]'", "everything"),
        ("nvidia-smi", "nvidia-smi"),
    ],
)
def test_what_is_not_there_is_found(words, found):
    problem = problem_of(shlex.split(words))
    assert problem is not None and found in problem

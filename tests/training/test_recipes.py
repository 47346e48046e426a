"""The recipes that the project ships: each loads, its plan works without a network, and it fits its GPUs."""

import re
import shlex
import socket

import pytest
import timm
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env

from helpers.groups_of_processes import FSDP
from helpers.paths import ROOT
from transformers_radio import ERadioConfig
from transformers_radio.training import load_recipe
from transformers_radio.training.groups import stage_groups
from transformers_radio.training.plan import tables as plan
from transformers_radio.training.plan.cost import stage_time
from transformers_radio.training.plan.gpus import find_gpu

FOLDER = ROOT / "recipes"
OTHERS = ("accelerate", "evaluation")  # folders of files that are no training recipes
RECIPES = sorted(path for path in FOLDER.rglob("*.yaml") if path.parent.name not in OTHERS)
NAMES = [str(path.relative_to(FOLDER)) for path in RECIPES]


def header(path):
    """(processes, gpu, rows): what the comment at a recipe's head states."""
    comment = re.match(r"(#.*\n)+", path.read_text(encoding="utf-8")).group()
    processes, gpu = re.search(r"^# processes: (\d+), gpu: (\S+)$", comment, re.MULTILINE).groups()
    rows = re.search(r"^# rows:\n((#   \S.*: .*\n)+)", comment, re.MULTILINE)
    lines = rows.group(1).splitlines() if rows else []
    return int(processes), gpu, {line[4:].split(": ")[0]: shlex.split(line.split(": ", 1)[1]) for line in lines}


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a plan must not use the network")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def spied(monkeypatch):
    """What a plan counts, (stage, group) -> StepCost, and what it makes of it, stage -> loads."""
    costs, loads = {}, {}

    def make_plan(*arguments):
        made = original[0](*arguments)
        costs.update({(stage, group): cost for stage, steps in made.steps.items() for group, cost in steps.items()})
        return made

    def stage_loads(plan, stage):
        loads[stage] = load = original[1](plan, stage)
        return load

    original = plan.make_plan, plan.stage_loads
    monkeypatch.setattr(plan, "make_plan", make_plan)
    monkeypatch.setattr(plan, "stage_loads", stage_loads)
    return costs, loads


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_every_recipe_has_a_plan_that_fits_its_gpus(path, no_network, spied, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    processes, gpu, _ = header(path)
    recipe = load_recipe(path)
    plan.print_plan(recipe, processes, gpu)
    counted, loads = spied
    text = capsys.readouterr().out
    assert f"{processes} x {gpu}" in text
    assert "does not fit" not in text
    assert "for shares of" not in text
    assert len(counted) == sum(len(stage.groups) or 1 for stage in recipe.stages.values())
    if path.name == "radio_vit_h16.yaml":
        check_the_papers_student(counted, text)
    elif "high" in recipe.stages:  # the second stage's layout is ours: nobody waits for long
        assert min(stage_time(loads["high"], 100, find_gpu(gpu), 0.4).busy.values()) > 0.8


def check_the_papers_student(counted, text):
    """ViT-H/16 of four real teachers in one shape-checked step at 256, 432 and 1024 pixels, against closed forms."""
    width, mlp, layers = 1280, 5120, 32
    hidden = 1536  # the widest teacher
    widths = {"clip": (1024, 1280), "openai_clip": (768, 1024), "dinov2": (1536, 1536), "sam": (None, 1280)}
    low = ("clip", "openai_clip", "dinov2")
    for key, side, teachers in (
        (("base", "all"), 16, low),
        (("high", "low"), 27, low),
        (("high", "high"), 64, ("sam",)),
    ):
        tokens = side**2 + 3  # one CLS token for each teacher with a summary
        layer = tokens * (4 * width**2 + 2 * width * mlp) + 2 * tokens**2 * width
        heads = sum(
            (summary is not None) * (width * hidden + hidden * (summary or 0))
            + side**2 * (width * hidden + hidden * features)
            for summary, features in (widths[name] for name in teachers)
        )
        assert counted[key].forward_flops == 2 * (side**2 * 768 * width + layers * layer + heads)
    # Paper, Table 1: 653 M, with a classifier of 1000 that distillation does not have
    assert "651.72 M parameters" in text
    assert "low 1,024 + high 64 = 1,088 images per step" in text  # the paper says 1,152
    assert "32 x 1 x 32" in text and "2 x 1 x 32" in text  # its layout
    assert "samples seen: 633,600,000" in text  # 600k steps of 1024 are its 614 M; SAM's come on top
    for name, size in (("clip", "632.68"), ("openai_clip", "304.29"), ("dinov2", "1136.49"), ("sam", "637.03")):
        assert re.search(rf"{name} .* {size} ", text), name


def test_the_rows_of_the_ablations_load():
    tables = [path for path in RECIPES if path.parent.name == "ablations"]
    assert [path.stem for path in tables] == ["table2", "table3", "table4", "table5", "table6"]
    loaded = {path.stem: {row: load_recipe(path, keys) for row, keys in header(path)[2].items()} for path in tables}
    assert list(loaded["table2"]) == ["ImageNet-1K", "ImageNet-21K", "LAION-400M", "DataComp-1B"]
    assert len({recipe.data.path for recipe in loaded["table2"].values()}) == 4
    weights = {row: [t.feature_weight for t in recipe.teachers.values()] for row, recipe in loaded["table3"].items()}
    assert weights == {"None": [0, 0], "CLIP": [1, 0], "DINOv2": [0, 1], "Both": [1, 1]}
    schemes = [recipe.loss.balancing for recipe in loaded["table4"].values()]
    assert schemes == ["naive", "uncertainty", "adaloss", "amtml_kd"]
    assert [recipe.student.summary for recipe in loaded["table5"].values()] == ["cls", "cls_per_teacher", "mean"]
    networks = {row: recipe.student for row, recipe in loaded["table6"].items()}
    assert [student.type for student in networks.values()] == ["radio_timm"] * 10 + ["eradio"] * 3 + ["radio_timm"]
    assert all(timm.is_model(student.size) for student in networks.values() if student.type == "radio_timm")
    assert {student.size for student in networks.values() if student.type == "eradio"} <= set(ERadioConfig.sizes())


def test_every_term_of_the_papers_second_stage_weighs_the_same():
    """Equations 1 and 3 have one weight for all teachers, whatever the share of the processes that serve them."""
    for name in ("radio_vit_h16", "radio_vit_l16", "radio_vit_b16"):
        path = FOLDER / f"{name}.yaml"
        recipe, processes = load_recipe(path), header(path)[0]
        groups = stage_groups("high", recipe.stages["high"], list(recipe.teachers), world_size=processes)
        weights = {
            teacher: recipe.teachers[teacher].feature_weight * group.batch_size * group.image_weight
            for group in groups
            for teacher in group.teachers
        }
        assert list(weights.values()) == pytest.approx([weights["sam"]] * len(weights)), name


def launch_environment(name, *options):
    """(arguments, environment) as `accelerate launch` makes them of one of our files."""
    command = ["--config_file", str(FOLDER / "accelerate" / name), *options]
    arguments = launch_command_parser().parse_args([*command, "-m", "transformers_radio.training", "recipe.yaml"])
    arguments, _, _ = _validate_launch_command(arguments)
    return arguments, prepare_multi_gpu_env(arguments)


def test_accelerate_reads_our_launch_files():
    files = sorted((FOLDER / "accelerate").glob("*.yaml"))
    loaded = {path.name: load_config_from_file(str(path)) for path in files}
    assert {name: (config.distributed_type, config.num_processes) for name, config in loaded.items()} == {
        "one_gpu.yaml": (DistributedType.NO, 1),
        "ddp_8gpu.yaml": (DistributedType.MULTI_GPU, 8),
        "ddp_nodes.yaml": (DistributedType.MULTI_GPU, 64),
        "fsdp2.yaml": (DistributedType.FSDP, 8),
    }
    for config in loaded.values():
        assert config.mixed_precision == "no"  # the recipe says it, to the Accelerator itself


def test_the_launch_environment_of_fsdp2_is_the_one_that_is_tested_on_cpus():
    arguments, environment = launch_environment("fsdp2.yaml")
    assert {key: environment[key] for key in FSDP} == FSDP
    assert environment["FSDP_OFFLOAD_PARAMS"] == environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    assert arguments.nproc_per_node == "8"


def test_nodes_divide_the_processes():
    arguments, environment = launch_environment(
        "ddp_nodes.yaml", "--machine_rank", "3", "--main_process_ip", "10.0.0.1"
    )
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("8", "8", 3)
    assert (arguments.rdzv_backend, arguments.rdzv_endpoint) == ("static", "10.0.0.1:29500")
    assert environment.get("ACCELERATE_USE_FSDP") is None
    arguments, _ = launch_environment("ddp_8gpu.yaml", "--num_processes", "4")
    assert arguments.nproc_per_node == "4"

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from helpers.tiny_teachers import PatchTeacher
from transformers_radio.cli import app
from transformers_radio.modeling import RadioConfig, RadioModel
from transformers_radio.teachers import TeacherOutput
from transformers_radio.training import load_recipe
from transformers_radio.training.distill import build_distillation
from transformers_radio.training.groups import stage_groups
from transformers_radio.training.plan.cost import GPU, stage_loads, stage_time, uneven_shares
from transformers_radio.training.plan.count import Plan, describe_student, describe_teacher
from transformers_radio.training.plan.dry_run import StepCost, TeacherCost, run_stage, run_teacher
from transformers_radio.training.plan.tables import print_plan

GROUPS = (
    "stages.main={steps: 12, resolution: 0, groups: {low: {teachers: [clip], resolution: 32, batch_size: 12, "
    "micro_batch_size: 1, share: 2}, high: {teachers: [sam], resolution: 48, batch_size: 4, micro_batch_size: 1, "
    "rate: 0.5}}}"
)


def parts(recipe, processes=1):
    """What print_plan puts together."""
    teachers = {name: describe_teacher(name, spec) for name, spec in recipe.teachers.items()}
    groups = {
        name: stage_groups(name, stage, list(recipe.teachers), world_size=processes)
        for name, stage in recipe.stages.items()
    }
    return teachers, describe_student(recipe, teachers), groups


def step(recipe):
    """The cost of the only group's pass."""
    teachers, student, groups = parts(recipe)
    outputs = {name: run_teacher(teacher).output for name, teacher in teachers.items()}
    return run_stage(recipe, "main", groups["main"], student, outputs)["all"]


def test_flops_are_those_counted_by_hand(make_recipe):
    width, mlp, layers, patches, tokens = 32, 64, 2, 16, 16 + 1 + 1
    linear = tokens * (4 * width * width + 2 * width * mlp)  # q, k, v, out; fc1, fc2
    attention = 2 * tokens * tokens * width
    hidden = 20  # the widest teacher
    clip = (1 + patches) * (width * hidden + hidden * 16)
    sam = patches * (width * hidden + hidden * 20)
    expected = 2 * (patches * 3 * 8 * 8 * width + layers * (linear + attention) + clip + sam)
    for overrides in ([], ["mixed_precision=bf16", "stages.main.micro_batch_size=2"]):
        cost = step(load_recipe(make_recipe(), overrides))
        assert cost.forward_flops == expected
        # Each product has two in the backward pass; not so the patch embedding, whose input needs no gradient, and
        # attention, whose fused kernel computes its first product again.
        by_hand = 2 * expected - 2 * patches * 3 * 8 * 8 * width + layers * 2 * tokens * tokens * width
        assert cost.backward_flops == by_hand
        assert cost.attention_flops == layers * (2 + 5) * 2 * tokens * tokens * width
    teacher = PatchTeacher("", image_size=24).to("meta")
    assert run_teacher(teacher).flops == 2 * 9 * 3 * 8 * 8 * 24


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_memory_is_what_a_real_step_holds_between_forward_and_backward(make_recipe, precision):
    options = [
        f"mixed_precision='{precision}'",
        "student.config={hidden_size: 96, num_hidden_layers: 6, num_attention_heads: 2, mlp_ratio: 4.0, "
        "patch_size: 8, max_img_size: 64}",
        "stages.main={steps: 1, warmup_steps: 0, resolution: 48, batch_size: 16}",
    ]
    recipe = load_recipe(make_recipe(), options)
    cost = step(recipe)
    _, shapes, _ = parts(recipe)
    distillation = build_distillation(recipe, "main", RadioModel(shapes.config)).train()  # with memory
    with torch.profiler.profile(profile_memory=True) as profile:  # what is allocated in it, less what is freed in it
        pixels = torch.rand(16, 3, 48, 48)
        targets = {
            "clip": TeacherOutput(torch.rand(16, 16), torch.rand(16, 9, 16), (3, 3)),
            "sam": TeacherOutput(None, torch.rand(16, 36, 20), (6, 6)),
        }
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            totals, _ = distillation(pixels, targets, window_size=0)
    assert totals.requires_grad
    held = sum(event.self_cpu_memory_usage for event in profile.key_averages())
    assert cost.activation_bytes == pytest.approx(held, rel=0.05)


def test_gradient_checkpointing_keeps_less_and_computes_the_layers_again(make_recipe):
    options = ["student.config.num_hidden_layers=8", "stages.main.batch_size=8"]
    plain = step(load_recipe(make_recipe(), options))
    less = step(load_recipe(make_recipe(), [*options, "student.gradient_checkpointing=true"]))
    width, tokens = 32, 18
    layer = 2 * tokens * (4 * width * width + 2 * width * 64) + 4 * tokens * tokens * width
    assert less.backward_flops - plain.backward_flops == 8 * layer
    assert plain.activation_bytes / 8 < less.activation_bytes < plain.activation_bytes / 2


def test_windows_save_what_they_save():
    """Against counting passes with each window."""
    config = RadioConfig.from_size(
        "vit-ti-16", num_hidden_layers=8, max_img_size=512, num_registers=0, num_cls_tokens=1, summary_idxs=[0],
        window_num_global=2, train_window_sizes=[3, 4, 8, 32], train_window_probability=0.75,
    )  # fmt: skip
    with torch.device("meta"):
        model = RadioModel(config).train()

    def flops(window):
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 512, 512, device="meta"), window_size=window)
        return counter.get_total_flops()

    attention = 8 * 4 * (32 * 32 + 1) ** 2 * 192
    average = 0.25 * flops(0) + 0.75 * (flops(4) + flops(8)) / 2  # 3 does not divide the grid of 32, and 32 covers it
    assert flops(0) - attention * model.attention_saving(512, 512) == pytest.approx(average, rel=1e-3)
    assert model.attention_saving(512, 512) > 0.5
    assert model.attention_saving(32, 32) == 0
    model.config.train_window_sizes = None
    assert model.attention_saving(512, 512) == 0


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_shapes_that_do_not_fit_are_found(make_recipe):
    recipe = load_recipe(make_recipe())
    teachers, student, groups = parts(recipe)
    outputs = {name: run_teacher(teacher).output for name, teacher in teachers.items()}
    wrong = dataclasses.replace(outputs["sam"], features=torch.empty(1, 36, 21, device="meta"))
    with pytest.raises(RuntimeError, match="20.*21"):
        run_stage(recipe, "main", groups["main"], student, {**outputs, "sam": wrong})
    teachers["clip"].feature_dim = 17
    with pytest.raises(RuntimeError, match="promised summary"):
        run_teacher(teachers["clip"])


def test_no_header_is_cut_in_a_pipe(make_recipe, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    print_plan(load_recipe(make_recipe(), [GROUPS]), gpu="h100")
    text = capsys.readouterr().out
    for header in ("GFLOPs/image", "activations", "samples seen", "all with FSDP2", "TFLOPs/step"):
        assert header in text
    assert "…" not in text


def test_the_plan_says_what_the_run_will_be(make_recipe, tmp_path, capsys):
    recipe = load_recipe(make_recipe(), ["stages.main.micro_batch_size=1"])
    print_plan(recipe, processes=2)
    text = capsys.readouterr().out
    for fact in (
        "clip",
        "24",
        "3x3",
        "sam",
        "48",
        "6x6",
        "1 x 2 x 2",
        "samples seen: 48",
        "2 blocks, summary 32 wide, features 32 wide",
    ):
        assert fact in text, (fact, text)
    assert "GPU-hours" not in text
    assert not (tmp_path / "run").exists()


def test_the_plan_refuses_what_training_would_refuse(make_recipe):
    def refused(*overrides, match, **options):
        with pytest.raises(ValueError, match=match):
            print_plan(load_recipe(make_recipe(), list(overrides)), **options)

    refused(match="make it a multiple of 3", processes=3)
    refused("data.lanes=3", match="data.lanes is 3, .* in stages.main it has 2 processes x 1", processes=2)
    refused("data.crop_scale=[0.9, 0.1]", match="crop_scale")
    refused("stages.main.resolution=36", match="the nearest is")
    refused("teachers.sam.type=segment_anything", match="teachers.sam .*known of the type segment_anything")
    refused("teachers.sam.options.depth=3", match="depth")
    refused("student.checkpoint=somebody/student", match="not on the disk")
    refused("stages.main.teachers=[clip]", match="teachers.sam teaches in no stage")
    refused(match="gpu 'abacus' is unknown; choose one of a100-40", gpu="abacus")
    refused(match="utilization is 0", gpu="h100", utilization=0)
    refused(match="processes is 0", processes=0)


def loads_and_shapes(recipe, processes, flops=1e12):
    """Loads with round numbers in place of counted ones: every pass and every teacher takes `flops` an image."""
    teachers, student, groups = parts(recipe, processes)
    costs = {name: TeacherCost(int(flops), run_teacher(teacher).output) for name, teacher in teachers.items()}
    steps = {group.name: StepCost(int(flops), 0, 0, 5_000, 1_000) for group in groups["main"]}
    plan = Plan(recipe, processes, groups, teachers, student, costs, {"main": steps})
    return stage_loads(plan, "main"), teachers


def test_a_step_lasts_as_long_as_its_slowest_process(make_recipe):
    recipe = load_recipe(make_recipe(), [GROUPS, "mixed_precision=bf16", "teachers.clip.dtype=bfloat16"])
    gpu = GPU(half_tflops=10, float32_tflops=2, memory_gb=1)
    loads, _ = loads_and_shapes(recipe, processes=3)
    assert [(load.ranks, [group.name for group in load.groups]) for load in loads] == [
        ((0, 1), ["low"]),
        ((2,), ["high"]),
    ]
    # low: 6 images x (student + clip) in bf16; high: 4 images, the student in bf16 and SAM in float32
    low, high = 12 / 10 / 0.5, (4 / 10 + 4 / 2) / 0.5
    time = stage_time(loads, 12, gpu, utilization=0.5)
    assert time.seconds == pytest.approx((low + high) / 2)  # high takes part in every second step
    assert low < high
    assert time.bound_by == ("high",)
    assert time.busy[0, 1] == pytest.approx(2 * low / (low + high))
    assert time.busy[2,] == pytest.approx(high / (low + high))
    # one process runs both in turn
    loads, _ = loads_and_shapes(recipe, processes=1)
    assert stage_time(loads, 12, gpu, 0.5).seconds == pytest.approx(2 * low + high / 2)
    # without mixed precision the student is slow too
    loads, _ = loads_and_shapes(load_recipe(make_recipe(), [GROUPS]), processes=3)
    assert loads[0].float32_flops == {"low": 12e12}
    assert loads[0].half_flops == {"low": 0}


def test_memory_is_shared_out_as_the_engine_does(make_recipe):
    recipe = load_recipe(make_recipe(), [GROUPS])
    (low, high), teachers = loads_and_shapes(recipe, processes=3)
    clip, sam = (sum(4 * p.numel() for p in teacher.parameters()) for teacher in teachers.values())
    # float32 weights, gradients and two moments; DDP's buckets; one pass; teachers
    assert low.memory(3, fsdp=False) == 16_000 + 4_000 + 5_000 + clip
    assert high.memory(3, fsdp=False) == 16_000 + 4_000 + 5_000 + sam
    assert low.memory(3, fsdp=True) == pytest.approx(16_000 / 3 + 5_000 + clip)
    (alone,), _ = loads_and_shapes(recipe, processes=1)
    assert alone.memory(1, fsdp=False) == 16_000 + 5_000 + clip + sam
    placed = ["ema_decay=0.99", "teachers.clip.placement=sharded", "teachers.sam.placement=offloaded"]
    (low, high), _ = loads_and_shapes(load_recipe(make_recipe(), [GROUPS, *placed]), processes=3)
    # a teacher of one block: its part, and the whole while it computes; or the whole alone
    assert low.memory(3, fsdp=False) == 20_000 + 4_000 + 5_000 + clip / 2 + clip
    assert high.memory(3, fsdp=False) == 20_000 + 4_000 + 5_000 + sam


def test_uneven_shares(make_recipe):
    stage = load_recipe(make_recipe(), [GROUPS]).stages["main"]
    shares = {"low": 2, "high": 1}
    for processes, uneven in ((3, False), (6, False), (2, True), (4, True)):
        groups = stage_groups("main", stage, ["clip", "sam"], world_size=processes)
        assert uneven_shares(groups, shares, processes) == uneven


def test_the_command_line_shows_clusters(make_recipe, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    options = [GROUPS, "stages.main.groups.high.batch_size=60", "mixed_precision=bf16"]
    options += ["student.config={hidden_size: 5120, num_attention_heads: 40, mlp_ratio: 4.0}"]
    command = ["plan", str(make_recipe()), "--gpus", "6", "--gpu", "rtx4090", "--utilization", "0.3"]
    result = CliRunner().invoke(app, [*command, *options])
    assert result.exit_code == 0, result.output
    for fact in ("memory on 6 x rtx4090 (24 GB)", "30% of 165 TFLOP/s", "0-3", "4-5", "GPU-hours", "bound by high"):
        assert fact in result.output, (fact, result.output)
    assert "note: stages.main: low 12 + high 30 = 42 images per step on average" in result.output
    assert "does not fit" not in result.output
    result = CliRunner().invoke(app, [*command, *options, "student.config.num_hidden_layers=5"])
    assert "does not fit on processes 0-3 with DDP: lower micro_batch_size" in result.output
    result = CliRunner().invoke(app, ["plan", str(make_recipe()), GROUPS, "--gpus", "1"])
    assert "its 2 groups run in turn" in result.output
    result = CliRunner().invoke(app, ["plan", str(make_recipe()), GROUPS, "--gpus", "4"])
    assert "its groups have 3 : 1 processes, for shares of 2 : 1" in result.output

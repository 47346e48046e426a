from dataclasses import fields, replace

import pytest

from transformers_radio.training.partition import micro_batch
from transformers_radio.training.recipe import StudentRecipe, expand_paths, load_recipe, save_recipe
from transformers_radio.training.validate import STUDENT_CONFIG_FIELDS, STUDENT_SIZES

MINIMAL = """
output_dir: {output}
teachers:
  clip: {{type: open_clip, checkpoint: some/clip}}
  sam: {{type: segment_anything, checkpoint: some/sam.pth, summary_weight: 0}}
stages:
  main: {{steps: 10, resolution: 64, batch_size: 8}}
data: {{path: some/images}}
"""


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL.format(output=tmp_path / "run"))
    return path


def test_a_tilde_is_the_home_folder_in_every_path(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = ["output_dir=~/run", "teacher_cache=~/cache", "student.checkpoint=~/student", "data.frozen_crops=true"]
    recipe = load_recipe("~/recipe.yaml", paths)
    found = (recipe.output_dir, recipe.teacher_cache, recipe.student.checkpoint)
    assert found == tuple(f"{tmp_path}/{name}" for name in ("run", "cache", "student"))
    made = replace(recipe, output_dir="~/other", teacher_cache=None, student=StudentRecipe())  # in Python
    assert expand_paths(made) == replace(made, output_dir=f"{tmp_path}/other")


def test_overrides_reach_teachers_and_stages_by_name(recipe_file):
    recipe = load_recipe(
        recipe_file,
        [
            "teachers.clip.feature_weight=0.5",
            "stages.main.steps=3",
            "student.config.num_registers=2",
            "data.num_workers=0",
        ],
    )
    assert recipe.teachers["clip"].feature_weight == 0.5
    assert recipe.stages["main"].steps == 3
    assert recipe.student.config == {"num_registers": 2}
    assert recipe.data.num_workers == 0
    assert recipe.loss.cosine_weight == 0.9 and recipe.loss.smooth_l1_weight == 0.1  # the paper's alpha and beta


def test_a_saved_recipe_reads_back_the_same(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file)
    save_recipe(recipe, tmp_path / "again.yaml")
    assert load_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teachers.clip.sumary_weight=1", "did you mean teachers.clip.summary_weight"),
        ("stage.main.steps=1", "did you mean stages"),
        ("stages.main.steps=many", "stages.main.steps"),
        ("stages.main.steps=0", "stages.main.steps is 0; expected"),
        ("stages.main.teachers=[dino]", "one of clip, sam"),
        ("stages.main.warmup_steps=10", "stages.main.warmup_steps is 10"),
        ("teachers.clip.summary_weight=-1", "teachers.clip.summary_weight is -1"),
        ("teachers.clip.dtype=int8", "one of float32, bfloat16, float16"),
        ("student.size=vit-b-17", "vit-b-16"),
        ("student.config.num_regsters=5", "num_registers"),
        ("student.config.adaptors={}", "a field of student.config is 'adaptors'"),
        ("stages.main.teachers=[]", "stages.main.teachers is"),
        ("stages.main.micro_batch_size=0", "stages.main.micro_batch_size is 0"),
        ("optimizer.max_grad_norm=0", "optimizer.max_grad_norm is 0"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay is -1"),
        ("optimizer.beta1=1.5", "optimizer.beta1 is 1.5"),
        ("optimizer.beta2=1", "optimizer.beta2 is 1"),
        ("seed=-1", "seed is -1; expected 0 or more"),
        ("student.head_hidden_dim=0", "student.head_hidden_dim is 0; expected a number > 0"),
        ("teachers.values={type: timm, checkpoint: a}", "teachers.values is 'values'; expected another name"),
        ("teachers.training={type: timm, checkpoint: a}", "teachers.training is 'training'; expected another name"),
        ("student.summary=max", "cls_per_teacher, cls, mean"),
        ("mixed_precision=fp8", "one of no, bf16, fp16"),
        ("learning_rate", "not of the form key=value"),
        ("teachers.new.type=timm", "teachers.new.checkpoint unset"),
        ("stages.main.teachers=[clip]", "teachers.sam teaches in no stage"),
    ],
)
def test_a_wrong_field_is_named_with_what_was_expected(recipe_file, override, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        load_recipe(recipe_file, [override])


def test_a_missing_file_is_said_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no recipe at"):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("batch_size", "micro_batch_size", "processes", "expected"),
    [(1024, None, 32, (32, 1)), (1024, 8, 32, (8, 4)), (6, 2, 1, (2, 3))],
)
def test_the_global_batch_splits_into_processes_and_passes(batch_size, micro_batch_size, processes, expected):
    assert micro_batch("stages.main", batch_size, micro_batch_size, processes) == expected


def test_a_batch_that_does_not_split_names_a_multiple():
    with pytest.raises(ValueError, match=r"stages.main.batch_size 10 .* make it a multiple of 6"):
        micro_batch("stages.main", 10, 2, processes=3)


def test_package_paths_resolve(recipe_file):
    recipe = load_recipe(recipe_file, ["teachers.clip.checkpoint=${package:quickstart}"])
    assert recipe.teachers["clip"].checkpoint.endswith("transformers_radio/quickstart")


def test_no_mixed_precision_may_be_written_plainly(recipe_file):
    """YAML reads a bare no as false."""
    assert load_recipe(recipe_file, ["mixed_precision=no"]).mixed_precision == "no"


def test_the_sizes_and_fields_told_without_loading_the_configuration_are_its_own():
    from transformers import PreTrainedConfig

    from transformers_radio import RadioConfig

    assert set(STUDENT_SIZES) == set(RadioConfig.sizes())
    own = {field.name for field in fields(RadioConfig)} - {field.name for field in fields(PreTrainedConfig)}
    followed = {"adaptors", "summary_type", "num_cls_tokens", "summary_idxs", "preferred_resolution"}
    assert own - followed <= set(STUDENT_CONFIG_FIELDS) and not followed & set(STUDENT_CONFIG_FIELDS)

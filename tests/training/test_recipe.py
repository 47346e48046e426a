import math
import re
from dataclasses import fields, is_dataclass, replace
from typing import get_type_hints

import pytest

from transformers_radio.training.groups import micro_batch
from transformers_radio.training.recipe import (
    GroupRecipe,
    StudentRecipe,
    expand_paths,
    load_recipe,
    save_recipe,
    validate,
)
from transformers_radio.training.recipe import fields as recipe_fields
from transformers_radio.training.recipe.validate import STUDENT_CONFIG_FIELDS, STUDENT_SIZES

MINIMAL = """
output_dir: {output}
teachers:
  clip: {{type: open_clip, checkpoint: some/clip}}
  sam: {{type: segment_anything, checkpoint: some/sam.pth, summary_weight: 0}}
stages:
  main: {{steps: 10, resolution: 64, batch_size: 8}}
data: {{path: some/images}}
"""


NUMBERS = (int, float, int | None, float | None)


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
    made = replace(recipe, output_dir="~/other", teacher_cache=None, student=StudentRecipe(summary="cls"))  # in Python
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
        ("seed=-1", "seed is -1; expected a whole number in [0, 2147483648)"),
        ("student.head_hidden_dim=0", "student.head_hidden_dim is 0; expected a whole number in [1, 65536]"),
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
    with pytest.raises(ValueError, match=re.escape(message)):
        load_recipe(recipe_file, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=[", "override 'seed=[': line 2, column 1: did not find expected node content"),
        ("seed=${", r"override 'seed=${': seed: no viable alternative at input '${' (a ${ that stands for itself"),
        ("seed=\t3", "found character that cannot start any token (a tab?"),
        ("seed=*a", "override 'seed=*a': line 1, column 1: found undefined alias"),
        ("data.path=${nope}", "data.path: Interpolation key 'nope' not found"),
        ("teachers=[a]", "teachers is ['a']; expected a mapping"),
        ("teachers.clip=[a]", "teachers.clip is ['a']; expected a mapping with fields of type, checkpoint"),
        ("stages.main.groups=[1]", "stages.main.groups is [1]; expected a mapping"),
        ("student.config=[1]", "student.config is [1]; expected a mapping"),
        ("student=5", "student is 5; expected a mapping with fields of type, size, config"),
        ("data=null", "data is null; expected a mapping with fields of path"),
        ("seed=null", "seed is null; expected a whole number"),
        ("seed=true", "seed is True; expected a whole number"),
        ("seed=1.5", "seed is 1.5; expected a whole number"),
        ("seed=???", "leaves seed unset"),
        ("loss.grid=null", "loss.grid is null; expected a text"),
        ("overwrite=2", "overwrite is 2; expected true or false"),
        ("data.crop_scale={a: 1}", "data.crop_scale is {'a': 1}; expected a list of 2 numbers"),
        ("data.crop_scale=[0.5]", "data.crop_scale is [0.5]; expected a list of 2 numbers"),
        ("data.crop_scale=[a, b]", "data.crop_scale is 'a'; expected a number"),
        ("stages.main.teachers=clip", "stages.main.teachers is 'clip'; expected a list"),
        (
            "teachers.clop.dtype=bfloat16",
            "teachers.clop.type unset; did you mean teachers.clip?",
        ),
        (
            "stages.mian.steps=3",
            "input side in pixels; did you mean stages.main?",
        ),
        ("student.config.return_dict=false", "a field of student.config is 'return_dict'"),
        ("data.crop_ratio=[1, inf]", "data.crop_ratio=(1.0, inf): expected"),
        ("data.lanes=1000000000000", "data.lanes=1000000000000: expected"),
        ("data.num_workers=9223372036854775808", "data.num_workers=9223372036854775808: expected"),
        ("stages.main.steps=100000000", "stages.main.steps is 100000000; expected a whole number in [1, 100000000)"),
    ],
)
def test_a_value_of_another_form_is_one_line_that_names_the_field(recipe_file, override, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_recipe(recipe_file, [override])
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text + "seed: [1,", r"line \d+, column \d+: did not find"),
        (lambda text: text.replace("  clip", "\tclip"), "line 4, column 1: found character .*a tab"),
        (lambda text: text + "seed: 1\nseed: 2\n", "line 10, column 1: found duplicate key seed"),
        (lambda text: text.encode("utf-16"), "it is not UTF-8 text"),
        (lambda text: text + "tracker: ${", "tracker: no viable alternative"),
        (lambda text: text + "? [1]\n: 2", "found unhashable key"),
        (lambda text: text + "null: 2", "Incompatible key type 'NoneType'"),
        (lambda text: text + f"seed: {'9' * 5000}", "Exceeds the limit"),
        (lambda text: text + f"student: {{config: {'{a: ' * 400}1{'}' * 400}}}", "nested too deeply"),
        (lambda text: text.replace("sam:", "5:"), "a name in teachers is 5; expected a text"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_line(recipe_file, change, message):
    text = change(recipe_file.read_text())
    recipe_file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as error:
        load_recipe(recipe_file)
    assert len(str(error.value).splitlines()) == 1


def test_a_byte_order_mark_and_numbers_in_quotes_are_read(recipe_file):
    recipe_file.write_text("\ufeff" + recipe_file.read_text())
    assert load_recipe(recipe_file, ["seed='3'", "optimizer.learning_rate='1e-4'"]).seed == 3


def numeric_fields(section, where=()):
    """(the section's path, field, type, default) of every number of a recipe but for its data."""
    for name, kind in get_type_hints(type(section)).items():
        value = getattr(section, name)
        if is_dataclass(value) and name != "data":
            yield from numeric_fields(value, (*where, name))
        elif isinstance(value, dict) and value and is_dataclass(next(iter(value.values()))):
            yield from numeric_fields(next(iter(value.values())), (*where, name, next(iter(value))))
        elif kind in NUMBERS:
            yield where, name, kind, value


def at(recipe, path):
    for part in path:
        recipe = recipe[part] if isinstance(recipe, dict) else getattr(recipe, part)
    return recipe


@pytest.mark.parametrize("grouped", [False, True])
def test_no_number_may_be_nonsense(recipe_file, grouped):
    """Every numeric field has a range, which leaves out what is no number and what no machine can do."""
    recipe = load_recipe(recipe_file)
    if grouped:
        recipe.stages["main"].resolution = 0
        recipe.stages["main"].groups = {"one": GroupRecipe(resolution=64, batch_size=8)}
    found = list(numeric_fields(recipe))
    for path, name, kind, value in found:
        section, whole = at(recipe, path), kind in (int, int | None)
        for wrong in (True, "3", math.nan, -math.inf, -1, *((1.5, 2**63) if whole else ()), [3]):
            setattr(section, name, wrong)
            with pytest.raises(ValueError, match=re.escape(f"{'.'.join((*path, name))} is {wrong!r}; expected a")):
                validate(recipe)
        setattr(section, name, value)
        validate(recipe)
    for kind in (kind for name, kind in vars(recipe_fields).items() if name.endswith("Recipe")):
        numbers = {name for name, type_ in get_type_hints(kind).items() if type_ in NUMBERS}
        assert {field.name for field in fields(kind) if "range" in field.metadata} == numbers


@pytest.mark.parametrize(
    "field", ["num_workers", "shuffle_window", "min_side", "lanes", "max_skipped_share", "retry_seconds"]
)
def test_no_number_of_the_data_may_be_nonsense(recipe_file, field):
    recipe = load_recipe(recipe_file)
    for wrong in (True, "3", math.nan, math.inf, -1, 2**63):
        setattr(recipe.data, field, wrong)
        with pytest.raises(ValueError, match=re.escape(f"data.{field}={wrong!r}: expected")):
            validate(recipe)


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
    followed |= {"converted_from", "feature_normalizer", "intermediate_normalizer"}  # of converted releases
    assert own - followed <= set(STUDENT_CONFIG_FIELDS) and not followed & set(STUDENT_CONFIG_FIELDS)


def test_a_summary_left_open_is_the_one_that_earlier_runs_have_recorded(make_recipe):
    path = make_recipe()
    assert load_recipe(path) == load_recipe(path, ["student.summary=cls_per_teacher"])
    assert load_recipe(path, ["student.type=eradio", "student.config={}"]).student.summary is None

"""A stranger's recipe or file of settings runs no code, reads no secret, and names no file outside of its run."""

import ast
import itertools
import json
import socket
import sys

import pytest
from typer.testing import CliRunner

from helpers.paths import ROOT
from helpers.sample_images import picture
from transformers_radio.cli import app
from transformers_radio.evaluation.run import load_config, named_models
from transformers_radio.evaluation.segmentation.config import SegmentationConfig
from transformers_radio.training import load_recipe
from transformers_radio.training.__main__ import main
from transformers_radio.training.recipe import recipe_to_dict, save_recipe

RECIPE = """
output_dir: {folder}/run
student: {{size: vit-ti-16, config: {{num_hidden_layers: 1, hidden_size: 24, num_attention_heads: 2}}}}
teachers:
  clip: {clip}
data: {{path: {folder}/images, num_workers: 0}}
stages:
  main: {{steps: 1, resolution: 32, batch_size: 2}}
tracker: null
"""
CLIP = "{type: open_clip, checkpoint: '${package:quickstart/teachers/clip}'}"
EVIL = """
from pathlib import Path
Path(__file__).with_name("trace").mkdir()
from helpers.tiny_teachers import PatchTeacher
class Teacher(PatchTeacher): pass
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a recipe; evil.py, beside it, leaves a trace when it is imported."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "a-secret")
    (tmp_path / "evil.py").write_text(EVIL)
    (tmp_path / "images").mkdir()
    for number in range(4):
        picture(number).save(tmp_path / f"images/{number}.png")

    def write(clip=CLIP, more=""):
        (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path, clip=clip) + more)
        return tmp_path / "recipe.yaml"

    yield write
    sys.modules.pop("evil", None)


CODE = {
    "by checkpoint": '{type: python, checkpoint: "evil:Teacher"}',
    "by target": '{type: python, checkpoint: x, options: {target: "evil:Teacher"}}',
    "of a repository": "{type: transformers, checkpoint: evil/model, options: {trust_remote_code: true}}",
    "of a repository, by a class that is loaded": "{type: python, checkpoint: evil/model, options: "
    '{target: "transformers_radio.teachers.base:Teacher", trust_remote_code: yes}}',
}


@pytest.mark.parametrize("clip", CODE.values(), ids=CODE)
def test_teachers_that_are_code_need_the_flag(clip, write, tmp_path):
    path = write(clip)
    with pytest.raises(ValueError, match="^teachers.clip.* if you trust it, start with --trust-code"):
        load_recipe(path)
    with pytest.raises(SystemExit, match="^error: teachers.clip.*--trust-code"):
        main([str(path)])
    for command in ("train", "plan"):
        outcome = CliRunner().invoke(app, [command, str(path)])
        assert "--trust-code" in str(outcome.exception)
    assert not (tmp_path / "trace").exists() and not (tmp_path / "run").exists()


def test_the_flag_is_not_a_field_of_the_recipe(write):
    for more in ("trust_code: true", "teachers.clip.trust_code: true"):
        with pytest.raises(ValueError, match="unknown recipe field"):
            load_recipe(write(CODE["by checkpoint"], more))


def test_with_the_flag_it_trains_and_the_run_is_found_again(write, tmp_path):
    path = write(CODE["by checkpoint"])
    assert main(["--trust-code", str(path), "student.config.patch_size=8"]) == 0
    assert (tmp_path / "trace").is_dir() and (tmp_path / "run/student/config.json").is_file()
    assert main([str(path), "student.config.patch_size=8", "--trust-code"]) == 0  # reads the recipe that it recorded


SECRETS = [
    "${oc.env:HF_TOKEN}",
    "${ oc.env:HF_TOKEN}",
    "${oc.${teachers.clip.dtype}:HF_TOKEN}",
    "${package:${oc.env:HF_TOKEN}}",
    "${oc.decode:'${oc.env:HF_TOKEN}'}",
    "${oc.create:'${oc.env:HF_TOKEN}'}",
    r"\\${oc.env:HF_TOKEN}",
]


@pytest.mark.parametrize("secret", SECRETS)
def test_no_secret_of_the_machine_gets_into_an_address(secret, write, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was used"))
    path = write()
    address = f"https://example.com/{secret}/{{000..999}}.tar"
    for recipe, overrides in (
        (write(more=f"teacher_cache: '{address}'\n"), []),
        (path, [f"data.path={address}"]),
        (path, [f"student.config={{'{address}': 1}}"]),
    ):
        with pytest.raises(ValueError) as refused:
            load_recipe(recipe, overrides)
        assert "a-secret" not in str(refused.value) and "\n" not in str(refused.value)
    settings = path.with_name("settings.yaml")
    settings.write_text(json.dumps({"data": {"path": address}}))
    with pytest.raises(ValueError, match="is not read, as it may tell others"):
        load_config(SegmentationConfig, None, settings, [])


def test_other_settings_of_the_recipe_and_what_is_escaped_may_be_named(write, tmp_path):
    recipe = load_recipe(
        write(more="seed: 7\nlog_every_steps: ${seed}\nteacher_cache: 'a/\\${oc.env:HF_TOKEN}'\n"),
        ["data.frozen_crops=true"],
    )
    assert recipe.log_every_steps == 7 and recipe.teacher_cache == "a/${oc.env:HF_TOKEN}"
    save_recipe(recipe, tmp_path / "again.yaml")
    assert recipe_to_dict(load_recipe(tmp_path / "again.yaml")) == recipe_to_dict(recipe)


TAGS = ["!!python/object/apply:os.mkdir [TRACE]", "!!python/name:os.system", "!!python/object/new:os.mkdir [TRACE]"]


@pytest.mark.parametrize("tag", TAGS)
def test_yaml_builds_plain_values_only(tag, write, tmp_path):
    tag = tag.replace("TRACE", str(tmp_path / "trace"))
    with pytest.raises(ValueError, match="cannot be read as YAML"):
        load_recipe(write(more=f"seed: {tag}\n"))
    with pytest.raises(ValueError):
        load_recipe(write(), [f"student.config={{x: {tag}}}"])
    (tmp_path / "models.yaml").write_text(f"A: {tag}\n")
    with pytest.raises(ValueError, match="cannot be read"):
        named_models(tmp_path / "models.yaml", [])
    assert not (tmp_path / "trace").exists()


def test_yaml_that_grows_without_end_is_refused(write):
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [
        f"{name}: &{name} [{', '.join(['*' + before] * 10)}]" for before, name in itertools.pairwise("abcdefghi")
    ]
    with pytest.raises(ValueError, match="cannot be read as YAML"):
        load_recipe(write(more="\n".join(lines)))


def test_a_file_of_models_names_no_code(tmp_path):
    (tmp_path / "models.yaml").write_text("A: python:evil:Teacher\nB: open_clip:ViT-B-32:openai\n")
    assert named_models(tmp_path / "models.yaml", ["B"]) == ["B=open_clip:ViT-B-32:openai"]
    assert named_models(tmp_path / "models.yaml", ["B", "python:mine:Teacher"])[1] == "python:mine:Teacher"
    with pytest.raises(ValueError, match="names code, A=python:evil:Teacher"):
        named_models(tmp_path / "models.yaml", [])


@pytest.mark.parametrize("name", ["../../x", "/x", "a/b", "..", "a b"])
def test_names_of_teachers_and_data_are_no_paths(name, write):
    path = write()
    path.write_text(path.read_text().replace("  clip:", f"  {json.dumps(name)}:"))
    with pytest.raises(ValueError, match="expected a name of letters"):
        load_recipe(path)
    with pytest.raises(ValueError, match="is not a name"):
        load_recipe(
            write(more="").rename(path.with_name("b.yaml")),
            ["data.path=null", f"data.sources={{{json.dumps(name)}: {{path: x}}}}"],
        )


RUN_CODE = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads"}
RUN_CODE |= {"yaml.load", "torch.jit.load"}


def test_nothing_of_the_package_calls_eval_or_loads_pickles():
    """By the syntax tree of every file; torch.load always says weights_only=True."""
    for file in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called, where = ast.unparse(node.func), (file.name, node.lineno)
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert called not in RUN_CODE, where
                assert given.get("allow_pickle") in (None, "False") and given.get("shell") in (None, "False"), where
                if called == "torch.load":  # or passes on a dict with it, as nvidia_checkpoint.py does
                    assert given.get("weights_only") == "True" or None in given, where

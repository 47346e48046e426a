"""A stranger's folder of a student: its code does not run unasked, and publishing it gives no secrets away."""

import json
import shutil
import sys
from importlib import resources

import pytest
from huggingface_hub import ModelCard
from transformers import modeling_utils

from helpers.published_student import make_student
from helpers.tiny_radio import build_with_adaptors
from transformers_radio import RadioImageProcessor, RadioModel
from transformers_radio.evaluation.models.encoder import load_encoder
from transformers_radio.publishing import publish
from transformers_radio.teachers import build_teacher, load_text_encoder
from transformers_radio.training.run.card import student_card

REPO = "someone/tiny"
TRACE = "from pathlib import Path\nPath({trace!r}).mkdir(exist_ok=True)\n"


@pytest.fixture
def student(tmp_path):
    """A folder whose code leaves a trace, and refers to more in another repository."""
    folder = tmp_path / "student"
    make_student(folder)
    for code in folder.glob("*.py"):
        code.write_text(TRACE.format(trace=str(tmp_path / "trace")) + code.read_text())
    return folder


def edit(folder, file="config.json", **fields):
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_the_code_of_a_folder_does_not_run_unasked(student, tmp_path):
    edit(student, auto_map={"AutoModel": "evil/repo--modeling.Model", "AutoConfig": "configuration_radio.RadioConfig"})
    RadioModel.from_pretrained(student)
    RadioImageProcessor.from_pretrained(student)
    load_encoder(str(student))
    build_teacher("transformers", str(student))
    assert not (tmp_path / "trace").exists()


def test_publish_runs_and_sends_no_code_that_is_not_this_versions(student, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="adaptors_radio.py in .* is not this version's code"):
        publish.prepare(student, REPO)
    assert not (tmp_path / "trace").exists()
    monkeypatch.setattr(publish, "check_loaders", lambda folder: [])
    assert "adaptors_radio.py" in publish.prepare(student, REPO, trust_code=True).files
    make_student(student)
    (student / "more.py").write_text("")
    with pytest.raises(ValueError, match="more.py in .* is not this version's code"):
        publish.prepare(student, REPO)


@pytest.mark.parametrize("link", ["notes.txt", "inner/notes.txt", "folder"])
def test_publish_follows_no_link_out_of_the_folder(link, tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "check_loaders", lambda folder: [])
    folder = tmp_path / "student"
    make_student(folder)
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets/key").write_text("a-secret")
    (folder / link).parent.mkdir(exist_ok=True)
    (folder / link).symlink_to(tmp_path / "secrets" if link == "folder" else tmp_path / "secrets/key")
    try:
        files = publish.prepare(folder, REPO).files
    except ValueError as refused:
        assert "is a link to" in str(refused) and "outside of" in str(refused)
    else:  # links to folders are not followed at all
        assert link == "folder" and not [name for name in files if name.startswith(link)]
    (folder / link).unlink()
    (folder / "inside.md").symlink_to(folder / "README.md")
    assert "inside.md" in publish.prepare(folder, REPO).files


def test_text_of_a_student_is_no_template():
    adaptors = {"clip": {"summary_dim": 8, "feature_dim": 12, "hidden_dim": 16}}
    model = build_with_adaptors(adaptors=adaptors)
    model.config.adaptors["clip"]["teacher"] = "transformers:{{ 7 * 7 }}/{% for x in [] %}{{ cycler.__init__ }}"
    card = str(student_card(model, None, {}, title="{{ 6 * 7 }}"))
    assert "49" not in card.replace("1249", "") and "{{ 6 * 7 }}" in card and "{{ 7 * 7 }}" in card


def test_the_front_matter_of_a_card_builds_plain_values_only(tmp_path):
    folder = tmp_path / "student"
    make_student(folder)
    text = (folder / "README.md").read_text()
    trace = f"!!python/object/apply:os.mkdir [{tmp_path / 'trace'}]"
    (folder / "README.md").write_text(text.replace("---\n", f"---\nx: {trace}\n", 1))
    with pytest.raises(ValueError, match="README.md is damaged"):
        publish.prepare(folder, REPO)
    assert not (tmp_path / "trace").exists()
    assert ModelCard(text).data.license


@pytest.mark.parametrize("kernel", ["evil/kernel", "kernels-community/evil:main", "evil/kernel@v1:fn"])
@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def test_a_configuration_fetches_no_kernels(field, kernel, tmp_path, monkeypatch):
    """transformers downloads and runs a kernel when an attention of the form OWNER/NAME is chosen."""
    fetched = []
    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", lambda *names, **_: fetched.append(names))
    folder = tmp_path / "student"
    make_student(folder)
    edit(folder, **{field: kernel})
    for load in (RadioModel.from_pretrained, lambda folder: build_teacher("transformers", str(folder))):
        with pytest.raises(ValueError, match=f"{field} '{kernel}', code of the Hub that would run"):
            load(folder)
    assert fetched == []
    edit(folder, **{field: None}, vision_config={field: kernel})
    with pytest.raises(ValueError, match="code of the Hub"):
        build_teacher("transformers", str(folder))


def test_the_tokenizer_of_a_text_tower_runs_no_code(tmp_path, monkeypatch):
    """OpenCLIP hands what its config says to AutoTokenizer."""
    folder = tmp_path / "clip"
    shutil.copytree(str(resources.files("transformers_radio") / "quickstart/teachers/clip"), folder)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(TRACE.format(trace=str(tmp_path / "trace")) + "class Tokenizer: pass\n")
    edit(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]}, tokenizer_class="Evil")
    try:
        load_text_encoder("open_clip", str(folder))
    except ValueError as refused:
        assert "trust_remote_code" in str(refused) or "Evil" in str(refused)
    assert not (tmp_path / "trace").exists() and "evil" not in sys.modules

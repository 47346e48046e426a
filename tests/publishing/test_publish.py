"""Publishing against a Hub on this machine, with the real client; what is refused; what a stranger then loads."""

import json
import os
import signal
import subprocess
import sys

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from helpers.forked import Forked
from helpers.published_student import make_student
from transformers_radio import RadioImageProcessor, RadioModel
from transformers_radio.cli import app
from transformers_radio.evaluation.result import Result
from transformers_radio.export.run import export_student
from transformers_radio.publishing import publish
from transformers_radio.publishing.loaders import check_loaders
from transformers_radio.teachers import digest_weights

REPO = "someone/tiny"
STRANGER = """
import sys
sys.modules["transformers_radio"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel
repo, revision, folder = sys.argv[1:]
model = AutoModel.from_pretrained(repo, trust_remote_code=True, revision=revision).eval()
processor = AutoImageProcessor.from_pretrained(repo, trust_remote_code=True, revision=revision)
assert type(model).__module__.startswith("transformers_modules."), type(model)
assert type(processor).__name__ == "RadioImageProcessor"
with torch.no_grad():
    out = model(load_file(folder + "/images.safetensors")["images"])
save_file({"summary": out.summary, "clip": out.adaptors["clip"].summary}, folder + "/out.safetensors")
"""


@pytest.fixture
def student(tmp_path):
    """A folder that may be published, and its model."""
    return tmp_path / "student", make_student(tmp_path / "student")


@pytest.fixture
def without_loaders(monkeypatch):
    """The check of the loaders takes seconds and has tests of its own."""
    monkeypatch.setattr(publish, "check_loaders", lambda folder: [])


def edit_card(folder, **fields):
    card = ModelCard.load(folder / "README.md")
    for name, value in fields.items():
        setattr(card.data, name, value)
    (folder / "README.md").write_text(str(card))


def measured(model, task="knn", **fields):
    settings = {"model": "/home/me/student", "weights": digest_weights(model), "dtype": "float32"}
    settings |= {"images": {"source": "/home/me/photos"}}
    values = {"model": "mine", "data": "Tiny set", "metrics": {"k-NN": 81.5}, "protocol": "k = 20"}
    return Result(**{"task": task, **values, "settings": settings, "resolution": 64, "kind": "student", **fields})


def test_one_commit_that_a_stranger_loads_by_its_revision(student, hub, tmp_path):
    folder, model = student
    measured(model).write(tmp_path / "results/knn.json")
    arguments = ["publish", str(folder), "--repo-id", REPO, "--results", str(tmp_path / "results"), "--private"]
    outcome = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    assert len(hub.commits[REPO]) == 2 and hub.private[REPO]  # the first is the Hub's own
    revision, files = hub.commits[REPO][-1]
    assert f"revision: {revision}" in outcome.output
    of_folder = {path.name for path in folder.iterdir()}
    assert files.keys() == {*of_folder, ".gitattributes", "evaluation/knn.Tiny-set.json"}
    for name in of_folder - {"README.md"}:
        assert files[name] == (folder / name).read_bytes()
    card = ModelCard(files["README.md"].decode())
    assert card.data.eval_results[0].metric_value == 81.5 and card.data.license == "apache-2.0"
    assert f'from_pretrained("{REPO}"' in card.text and "ORG/NAME" not in card.text
    assert "/home/me" not in "".join(content.decode() for name, content in files.items() if name.endswith("json"))

    with torch.no_grad():
        model.embeddings.cls_register_token += 1  # a second version, which the first revision must not see
    model.save_pretrained(folder)
    again = publish.Publication(REPO, {"model.safetensors": folder / "model.safetensors"}, card)
    again.files |= {name: content for name, content in files.items() if name.endswith((".py", ".json"))}
    assert publish.upload(again).oid == hub.commits[REPO][-1][0] != revision
    images = torch.rand(1, 3, 64, 64)
    save_file({"images": images}, tmp_path / "images.safetensors")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COV"))} | hub.environment
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", STRANGER, REPO, revision, str(tmp_path)]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    (tmp_path / "first").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "first" / name).write_bytes(files[name])
    with torch.no_grad():
        expected = RadioModel.from_pretrained(tmp_path / "first").eval()(images)
    found = load_file(tmp_path / "out.safetensors")
    torch.testing.assert_close(found["summary"], expected.summary)
    torch.testing.assert_close(found["clip"], expected.adaptors["clip"].summary)


def test_a_dry_run_shows_everything_and_asks_nobody(student, tmp_path, monkeypatch, without_loaders):
    folder, _ = student
    monkeypatch.setattr(publish, "HfApi", None)  # nobody is asked
    outcome = CliRunner().invoke(app, ["publish", str(folder), "--repo-id", REPO, "--dry-run"], catch_exceptions=False)
    assert outcome.exit_code == 0
    for path in folder.iterdir():
        if path.name != "README.md":  # which gets the name of the repository
            assert f"{path.stat().st_size:>15,}  {path.name}\n" in outcome.output
    for line in ("license: apache-2.0", "- pixparse/cc12m-wds", "- openai/clip-vit-base-patch16"):
        assert line in outcome.output
    assert "nothing was sent" in outcome.output


# ---------------------------------------------------------------- refusals


def refused(folder, message, **options):
    with pytest.raises((ValueError, OSError), match=message):
        publish.prepare(folder, options.pop("repo_id", REPO), **options)


def test_cards_without_license_or_data_are_refused(student, without_loaders):
    folder, _ = student
    edit_card(folder, datasets=None)
    refused(folder, "README.md names no data: add `datasets:`")
    edit_card(folder, datasets=["photos"], license=None)
    refused(folder, "README.md names no license: add `license:`")
    (folder / "README.md").unlink()
    refused(folder, "has no README.md: `python -m transformers_radio.publishing.card")


def test_teachers_for_research_make_a_student_for_research(tmp_path, without_loaders):
    folder = tmp_path / "student"
    make_student(folder, clip="facebook/metaclip-b16-400m")
    assert ModelCard.load(folder / "README.md").data.license_name == "research-only"
    notes = publish.prepare(folder, REPO).notes
    assert any("clip is licensed for research only (cc-by-nc-4.0)" in note for note in notes)
    edit_card(folder, license="apache-2.0", license_name=None)
    refused(folder, "apache-2.0 allows commercial use, and clip is licensed for research only .cc-by-nc-4.0.")
    published = publish.prepare(folder, REPO, license_override="We bought a license, contract 7.")
    assert "The reason given: We bought a license, contract 7." in published.files["README.md"].decode()


def test_an_agreement_that_is_passed_on_needs_its_text(tmp_path, without_loaders):
    folder = tmp_path / "student"
    make_student(folder, clip="facebook/dinov3-vitl16-pretrain-lvd1689m")
    data = ModelCard.load(folder / "README.md").data
    assert (data.license, data.license_name) == ("other", "dinov3-license")
    refused(folder, "dinov3-license asks for a copy of the agreement")
    (folder / "LICENSE.md").write_text("the agreement")
    assert publish.prepare(folder, REPO).files["LICENSE.md"]
    edit_card(folder, license="mit", license_name=None)
    refused(folder, "the license of clip, dinov3-license, is passed on .* and mit is another")


def test_folders_that_are_no_student_are_refused(student, tmp_path, without_loaders):
    folder, _ = student
    refused(tmp_path / "none", "there is no folder")
    refused(tmp_path, "is a run; the student is in")
    refused(folder, "expected ORG/NAME", repo_id="tiny")
    refused(folder, "is not a name on the Hub", repo_id="me/a b")
    (folder / "optimizer.pt").write_bytes(b"")
    refused(folder, "optimizer.pt in .* may run code")
    (folder / "optimizer.pt").unlink()
    (folder / "preprocessor_config.json").rename(tmp_path / "kept")
    refused(folder, "lacks preprocessor_config.json")
    (tmp_path / "kept").rename(folder / "preprocessor_config.json")
    (folder / "modeling_radio.py").unlink()
    refused(folder, "lacks modeling_radio.py")


def test_results_of_other_weights_do_not_go_along(student, tmp_path, without_loaders):
    folder, model = student
    other = measured(model, "zero-shot", metrics={"Zero-shot": 99.0})
    other.settings["weights"] = "those of another model"
    other.model = "other"
    other.write(tmp_path / "results/zero-shot.json")
    refused(folder, "there are no results of", results=[tmp_path / "results"])
    measured(model).write(tmp_path / "results/knn.json")
    text = publish.prepare(folder, REPO, results=[tmp_path / "results"]).files["README.md"].decode()
    assert "| knn | Tiny set | 64 | k-NN | 81.50 |" in text and "99.0" not in text


def test_results_for_leaderboards_are_what_the_hubs_client_reads(student, tmp_path, without_loaders):
    folder, model = student
    measured(model).write(tmp_path / "results/knn.json")
    two = {"mIoU": 40.25, "pixel accuracy": 70.5}
    measured(model, "segmentation", data="Other set", metrics=two).write(tmp_path / "results/segmentation.json")
    measured(model, "zero-shot", data="Third set").write(tmp_path / "results/zero-shot.json")
    benchmarks = {"Tiny set": "someone/tiny-set", "Other set": "someone/other"}
    files = publish.prepare(folder, REPO, [tmp_path / "results"], benchmarks=benchmarks).files
    found = {name: content for name, content in files.items() if name.startswith(".eval_results/")}
    assert len(found) == 2 and all(name.endswith(".yaml") for name in found)
    from huggingface_hub import parse_eval_result_entries

    entries = [one for content in found.values() for one in parse_eval_result_entries(yaml.safe_load(content))]
    assert {(one.dataset_id, one.task_id, one.value, one.notes) for one in entries} == {
        ("someone/tiny-set", "knn", 81.5, "k = 20"),
        ("someone/other", "segmentation-miou", 40.25, "k = 20"),
        ("someone/other", "segmentation-pixel-accuracy", 70.5, "k = 20"),
    }
    assert not [one for one in publish.prepare(folder, REPO, [tmp_path / "results"]).files if "eval_results" in one]
    results = {"results": [tmp_path / "results"]}
    refused(folder, r"no result on 'Tiny'; they are on \['Other set'", benchmarks={"Tiny": "a/b"}, **results)
    refused(folder, "is no id of a data set", benchmarks={"Tiny set": "a/b/c"}, **results)
    refused(folder, "--eval-results needs results", benchmarks={"Tiny set": "a/b"})


def test_all_three_loaders_agree_on_a_student_and_damaged_code_is_named(student):
    folder, _ = student
    assert [line.partition(":")[2].strip() for line in check_loaders(folder)] == ["loads", "the same", "the same"]
    code = folder / "adaptors_radio.py"
    code.write_text("raise RuntimeError('broken on purpose')\n" + code.read_text())
    with pytest.raises(ValueError, match="without transformers_radio: RuntimeError: broken on purpose"):
        check_loaders(folder)


def test_code_that_computes_something_else_is_refused(student):
    folder, model = student
    code = folder / "adaptors_radio.py"
    model_code = folder / "modeling_radio.py"
    changed = model_code.read_text().replace("summary=summary", "summary=2 * summary")
    assert changed != model_code.read_text(), code
    model_code.write_text(changed)
    with pytest.raises(ValueError, match="summary of another loader differs"):
        check_loaders(folder)


def test_code_beside_an_exported_program_is_compared_as_well(student, without_loaders):
    pytest.importorskip("transformers.exporters")
    folder, _ = student
    export_student(str(folder), folder, "torch-export", adaptors=[])
    code = folder / "torch-export" / "configuration_radio.py"
    files = publish.prepare(folder, REPO).files
    assert {"torch-export/model.pt2", "torch-export/configuration_radio.py"} <= files.keys()
    code.write_text(code.read_text() + "# changed\n")
    refused(folder, "torch-export/configuration_radio.py in .* is not this version's code")
    code.rename(code.with_name("more.py"))
    refused(folder, "torch-export/more.py in .* is not this version's code")


# ---------------------------------------------------------------- interruptions


def send(folder, environment):
    """`upload` in a process of its own."""
    constants = huggingface_hub.constants
    constants.ENDPOINT, constants.HF_HUB_OFFLINE = environment["HF_ENDPOINT"], False
    constants.HF_HUB_DISABLE_XET = True
    os.environ.update(environment)
    files = {path.name: path for path in publish.Path(folder).iterdir()}
    publish.upload(publish.Publication(REPO, files, None))


def send_to(folder, url):
    send(folder, {"HF_ENDPOINT": url, "HF_TOKEN": "hf_of_a_test"})


def test_an_upload_that_is_killed_resumes_with_what_is_missing(tmp_path, hub):
    folder = tmp_path / "student"
    make_student(folder, max_shard_size="60KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    hub.hang_after = 1
    process = Forked(folder, hub.url, target=send_to)
    assert hub.hangs.wait(120)
    while len(hub.stored) < 1:
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(hub.commits[REPO]) == 1 and len(hub.stored) == 1  # nothing to be seen yet
    arrived = set(hub.stored)
    hub.hang_after = None
    hub.uploads.clear()
    process = Forked(folder, hub.url, target=send_to)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert len(hub.commits[REPO]) == 2
    assert not arrived & set(hub.uploads) and len(hub.uploads) == len(shards) - 1
    assert all(hub.files(REPO)[path.name] == path.read_bytes() for path in folder.iterdir())


def test_a_refusal_of_the_hub_is_one_line_and_the_repository_stays_as_it_was(student, hub):
    folder, _ = student
    hub.refuse_commits = "no space left"
    files = {path.name: path for path in folder.iterdir()}
    with pytest.raises(OSError, match="someone/tiny was not published .*run the same command again") as caught:
        publish.upload(publish.Publication(REPO, files, None))
    assert "\n" not in str(caught.value) and len(hub.commits[REPO]) == 1


def test_weights_and_code_of_an_older_version_are_deleted_in_the_same_commit(student, hub, tmp_path):
    folder, model = student
    model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    old = {path.name: path for path in (tmp_path / "sharded").iterdir()}
    publish.upload(publish.Publication(REPO, old | {"notes.txt": b"mine", "gone_radio.py": b""}, None))
    new = {path.name: path for path in folder.iterdir()}
    publish.upload(publish.Publication(REPO, new, None))
    assert hub.files(REPO).keys() == {*new, "notes.txt", ".gitattributes"} and len(hub.commits[REPO]) == 3


# ---------------------------------------------------------------- transformers' own way


def test_push_to_hub_uploads_weights_and_code_that_open(student, hub, tmp_path):
    _, model = student
    model.push_to_hub(REPO)
    RadioImageProcessor(size={"height": 64, "width": 64}).push_to_hub(REPO)
    files = hub.files(REPO)
    assert {"config.json", "model.safetensors", "modeling_radio.py", "preprocessor_config.json"} <= files.keys()
    assert "license" not in files.get("README.md", b"").decode()  # docs/publish.md says so
    (tmp_path / "pushed").mkdir()
    for name, content in files.items():
        (tmp_path / "pushed" / name).write_bytes(content)
    check_loaders(tmp_path / "pushed")
    assert json.loads(files["config.json"])["auto_map"]["AutoModel"] == "modeling_radio.RadioModel"

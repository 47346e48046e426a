"""The Python of every page runs as it stands: its blocks one after the other, on small files of the names they use."""

import sys
from collections import Counter

import pytest

from helpers.documented_world import make_world
from helpers.documents import PAGES, blocks, run

# Pages with tests of their own, which also hold the results to something.
ELSEWHERE = {
    "extending.md": "tests/training/test_extending.py",
    "use_it_in.md": "tests/integrations/test_use_it_in.py",
}
# The blocks marked `<!-- not run: reason -->`, which keeps any other from being left out unseen.
NOT_RUN = {"models.md": 1, "publish.md": 1, "teachers.md": 1}
RUN = [page for page in PAGES if page not in ELSEWHERE and any(not one.why_not for one in blocks(page, "python"))]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(files, monkeypatch):
    """The current folder, with all that the pages name."""
    monkeypatch.chdir(files)
    monkeypatch.syspath_prepend(str(files))
    yield files
    sys.modules.pop("my_teachers", None)  # the page's own file


def export_onnx(world):
    pytest.importorskip("onnxruntime")
    from transformers_radio.export.run import export_student

    export_student(str(world / "runs/quickstart/run-vit/student"), world / "exported", adaptors=[])
    (world / "exported/onnx").rename(world / "runs/mine/student/onnx")  # that of two blocks is exported sooner


# What a page needs besides the world.
BEFORE = {"export.md": export_onnx}


def check_models(scope):
    assert [maps.shape for maps in scope["maps"]] == 3 * [(2, 32, 14, 10)]
    assert scope["llava"].model.vision_tower.config.hidden_size == 32


def check_lora(scope):
    trained = [name for name, weight in scope["model"].named_parameters() if weight.requires_grad]
    assert len(trained) == 12 * 6 * 2 and all(".encoder.layer." in name and ".lora_" in name for name in trained)


def check_onnx(scope):
    assert scope["summary"].shape == (2, 32) and scope["features"].shape == (2, 24, 32)


def check_evaluation(scope):
    assert 0 <= scope["accuracy"] <= 100 and set(scope["report"]["IoU"]) == {"wall", "building", "sky"}


def check_teacher(scope):
    assert (scope["teacher"].summary_dim, scope["teacher"].feature_dim) == (6, 6)


def check_stream(scope):
    assert scope["batch"].images[256].shape == (32, 3, 256, 256) and scope["batch"].images[224].shape[-1] == 224


def check_converted(scope):
    assert list(scope["model"].adaptors) == ["clip"]


AFTER = {
    "models.md": check_models,
    "fine_tuning.md": check_lora,
    "export.md": check_onnx,
    "evaluation.md": check_evaluation,
    "teachers.md": check_teacher,
    "data.md": check_stream,
    "convert.md": check_converted,
}


@pytest.mark.parametrize("page", RUN)
def test_the_python_of_a_page_runs(page, world):
    BEFORE.get(page, lambda world: None)(world)
    scope: dict = {"__name__": page}
    for block in blocks(page, "python"):
        if not block.why_not:
            run(block, scope, world)
    AFTER.get(page, lambda scope: None)(scope)


def test_what_does_not_run_is_known():
    marked = Counter(page for page in PAGES for one in blocks(page, "python") if one.why_not)
    assert marked == NOT_RUN

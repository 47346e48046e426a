"""What `eval` refuses for every task before the task begins."""

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_sam import make_student

from transformers_radio.evaluation import summary_store
from transformers_radio.evaluation.run import ONE_PROCESS, TASKS, run_task

RECIPES = Path(__file__).parents[2] / "recipes" / "evaluation"
SETTINGS = {
    "segmentation": ("data", "ade20k", []),
    "sam-coco": ("data", "coco2017", []),
    "llava": ("data", "llava", ["language_model=small"]),
    "throughput": (None, None, []),
}


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("students") / "student"
    make_student().save_pretrained(folder)
    return folder


@pytest.fixture
def begun(monkeypatch):
    """The tasks that were begun; none does anything."""
    tasks = []
    for task, (name, _) in TASKS.items():
        module = import_module(f"transformers_radio.evaluation.tasks.{name}")
        monkeypatch.setattr(module, "run", lambda *_, task=task: tasks.append(task))
    return tasks


def start(task, models, output):
    data, recipe, overrides = SETTINGS.get(task, ("data", None, []))
    run_task(task, models, data, recipe and RECIPES / f"{recipe}.yaml", output, overrides)


@pytest.mark.parametrize("task", list(TASKS))
def test_models_that_would_share_their_files_are_refused(task, student, tmp_path, begun):
    for titles in (("", ""), ("a b=", "a-b=")):
        with pytest.raises(ValueError, match="Two of .* have one name: give them titles, as TITLE=MODEL"):
            start(task, [f"{title}{student}" for title in titles], tmp_path)
    assert begun == []
    start(task, [str(student), f"other={student}"], tmp_path)
    assert begun == [task]


@pytest.mark.parametrize("task", list(TASKS))
def test_more_processes_than_a_task_can_use_are_refused(task, student, tmp_path, begun, monkeypatch):
    monkeypatch.setattr(summary_store, "start_processes", lambda: SimpleNamespace(num_processes=2))
    if task in ONE_PROCESS:
        with pytest.raises(ValueError, match=f"eval {task} runs in one process, but 2 were started"):
            start(task, [str(student)], tmp_path)
    else:
        start(task, [str(student)], tmp_path)
    assert begun == ([] if task in ONE_PROCESS else [task])

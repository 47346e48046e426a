"""What happens before torch is loaded: mistakes are named, threads are told to sleep, Ctrl-C is one line."""

import json
import os
import signal
import subprocess
import sys
from importlib import resources

import pytest
from torch._utils import ExceptionWrapper

from transformers_radio import cli
from transformers_radio.data import SourceError
from transformers_radio.training import __main__, recipe

RECIPE = str(resources.files("transformers_radio.quickstart") / "recipe_vit.yaml")
MISTYPED = {
    "train nosuch.yaml": "no recipe at nosuch.yaml",
    "train RECIPE stepz=1": "unknown recipe field stepz",
    "train RECIPE checkpoints": "override 'checkpoints' is not of the form key=value",
    "train RECIPE student.size=vit-b-17": "student.size is 'vit-b-17'; expected one of vit-ti-16, vit-s-16",
    "train RECIPE student.config.hiden_size=3": "a field of student.config is 'hiden_size'; expected one of",
    "train RECIPE teachers.clip.type=klip": "teachers.clip.type is 'klip'; expected one of open_clip, transformers",
    "plan RECIPE stages.main.stepz=1": "did you mean stages.main.steps?",
    "plan RECIPE --gpu h1000": "gpu 'h1000' is unknown; choose one of a100-40",
    "eval knnn --model x": "There is no task 'knnn': use one of zero-shot, knn",
    "eval knn": "There is no model to evaluate",
    "eval knn --model /no/such/dir": "There is no folder /no/such/dir",
    "eval knn --model TITLE=/no/such/dir": "There is no folder /no/such/dir",
    "eval knn --model segment_anything:/no/such.pth": "There is no /no/such.pth, which segment_anything:/no/such.pth",
    "eval knn --model open_klip:ViT-B-32": "'open_klip:ViT-B-32' begins with no type of model: use one of open_clip",
    "eval knn --model nosuch --recipe no.yaml": "There is no recipe no.yaml",
    "eval knn --model nosuch 20": "'20' is not of the form key=value",
    "visualize nokind --model x": "There is no picture 'nokind': use one of features, attention",
    "visualize features": "There is no model to show",
    "visualize features --model /no/such/dir": "There is no folder /no/such/dir",
    "demo /no/such/dir": "There is no folder /no/such/dir",
    "demo /no/such/dir --teacher clip": "write ADAPTOR=TYPE:CHECKPOINT, each name once",
    "watch /no/such/run": "/no/such/run holds no run, as it has no run.yaml",
    "quickstart seeed=1": "unknown recipe field seeed; did you mean seed?",
    "quickstart student=resnet": "student is 'resnet', expected one of eradio, vit, convnext",
    "report nofolder": "There is no folder nofolder",
}
# Runs each command in one process, and says how it ended and whether torch or another large library was loaded.
RUN_ALL = """
import json, sys
from transformers_radio.cli import main

ends = []
for line in json.loads(sys.argv[1]):
    sys.argv[1:] = line
    try:
        main()
        ends.append("")
    except SystemExit as ended:
        ends.append(str(ended.code))
loaded = [name for name in ("torch", "transformers", "datasets", "accelerate", "matplotlib") if name in sys.modules]
print(json.dumps([ends, loaded]))
"""
ENTRIES = {
    "cli": ["-m", "transformers_radio.cli", "train", RECIPE],
    "training": ["-m", "transformers_radio.training", RECIPE],
    "eval": ["-m", "transformers_radio.cli", "eval", "throughput", "--model", "python:anything"],
}
LIBRARY = ["-c", "import transformers_radio; transformers_radio.RadioModel"]


@pytest.fixture
def start(tmp_path):
    """Starts a command with a torch in its path that does what it is told, in place of being torch."""

    def start(arguments, torch, **environment):
        (tmp_path / "torch.py").write_text(torch)
        path = os.pathsep.join([str(tmp_path), *sys.path])
        environment = {**{k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}, **environment}
        command = [sys.executable, *arguments]
        return subprocess.run(
            command,
            env={**environment, "PYTHONPATH": path},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # jobs in the background ignore it
        )

    return start


def test_what_is_mistyped_is_named_before_anything_large_is_loaded(tmp_path):
    commands = [[RECIPE if word == "RECIPE" else word for word in line.split()] for line in MISTYPED]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", RUN_ALL, json.dumps(commands)],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    ends, loaded = json.loads(run.stdout)
    for end, (line, message) in zip(ends, MISTYPED.items(), strict=True):
        assert end.startswith("error: ") and message in end and "\n" not in end, f"{line}: {end}"
    assert loaded == [] and list(tmp_path.iterdir()) == []


def raising(error):
    def run(*_, **__):
        raise error

    return run


def error_of_a_worker():
    """As the main process gets it from torch's DataLoader."""
    try:
        raise SourceError("tar 3 is damaged;\nmend it")
    except SourceError:
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(SourceError) as raised:
        wrapped.reraise()
    return raised.value


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("seed is -1;\n  expected 0"), "error: seed is -1; expected 0"),
        (OSError(28, "No space left on device", "/run"), "error: [Errno 28] No space left on device: '/run'"),
        (ImportError("\n\ntimm is missing.\r\nInstall it\n"), "error: timm is missing. Install it"),
        (FloatingPointError(""), "error: FloatingPointError"),
        (error_of_a_worker, "error: tar 3 is damaged; mend it"),
    ],
)
def test_errors_of_users_are_one_line_and_others_keep_their_traceback(error, line, monkeypatch):
    error = error() if callable(error) else error
    monkeypatch.setattr(cli, "app", raising(error))
    monkeypatch.setattr(recipe, "load_recipe", raising(error))
    for command in (cli.main, lambda: __main__.main(["recipe.yaml"])):
        with pytest.raises(SystemExit) as ended:
            command()
        assert ended.value.code == line
    for bug in (KeyError("x"), RuntimeError("CUDA"), AssertionError()):
        monkeypatch.setattr(cli, "app", raising(bug))
        monkeypatch.setattr(recipe, "load_recipe", raising(bug))
        for command in (cli.main, lambda: __main__.main(["recipe.yaml"])):
            with pytest.raises(type(bug)):
                command()


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_threads_sleep_while_they_wait_unless_the_user_says_otherwise(entry, start):
    show = "import os; print(os.environ.get('OMP_WAIT_POLICY'), flush=True); os._exit(0)"
    assert start(entry, show).stdout.split() == ["PASSIVE"]
    assert start(entry, show, OMP_WAIT_POLICY="ACTIVE").stdout.split() == ["ACTIVE"]


def test_the_library_leaves_the_environment_alone(start):
    show = "import os; print(os.environ.get('OMP_WAIT_POLICY'), flush=True); os._exit(0)"
    assert start(LIBRARY, show).stdout.split() == ["None"]


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_ctrl_c_while_libraries_are_loaded_is_one_line(entry, start):
    run = start(entry, f"import os, time; os.kill(os.getpid(), {int(signal.SIGINT)}); time.sleep(60)")
    assert run.returncode == 130
    assert len(run.stderr.splitlines()) == 1 and "stopped" in run.stderr

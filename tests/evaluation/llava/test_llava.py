"""The whole task on a made set whose answers need the image: accuracy, resuming, refusals."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

from helpers.paths import ROOT
from helpers.tiny_llava import make_world, save_language_model, save_student, settings
from transformers_radio import RadioModel
from transformers_radio.evaluation.llava.answers import AnswerLog, answer_questions, read_questions
from transformers_radio.evaluation.llava.config import LlavaConfig, LlavaQuestions
from transformers_radio.evaluation.llava.model import load_llava
from transformers_radio.evaluation.result import Result
from transformers_radio.evaluation.run import load_config, run_task
from transformers_radio.teachers import digest_weights

LEARNING = {
    "finetune.epochs": 10,
    "finetune.batch_size": 8,
    "finetune.learning_rate": 3e-3,
    "hardware.per_device_batch_size": 8,
}
SHORT = {"finetune.epochs": 5, "finetune.save_steps": 3, "finetune.batch_size": 8, "hardware.per_device_batch_size": 8}
RUN_TASK = """
import sys
from transformers_radio.evaluation.run import run_task
run_task("llava", [sys.argv[1]], output=sys.argv[2], overrides=sys.argv[3:])
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("llava")
    make_world(root / "world", images=300, questions=60)
    make_world(root / "short", images=48, questions=5, seed=1)
    save_language_model(root / "language_model")
    save_student(root / "student")
    return root


def run(root, output, world="world", **overrides):
    overrides = settings(root / world, root / "language_model", **overrides)
    return run_task("llava", [f"tiny={root / 'student'}"], output=output, overrides=overrides)


@pytest.fixture(scope="module")
def trained(root):
    (result,) = run(root, root / "out", **LEARNING)
    return result


def test_answers_come_from_the_image(root, trained):
    questions, _ = read_questions(root / "world" / "questions.jsonl", root / "world" / "images", "exact_match")
    # Without the image nothing beats the most frequent answer to each of the two questions.
    by_text: dict[str, Counter] = {}
    for question in questions:
        by_text.setdefault(question.text, Counter())[question.answers[0]] += 1
    blind = 100 * sum(answers.most_common(1)[0][1] for answers in by_text.values()) / len(questions)
    assert blind < 40
    assert trained.metrics["made"] > 80 > 2 * blind

    # The same model asked about another question's image falls to chance.
    llava, processor = load_llava(str(root / "out/tiny/llava.made/finetune/llava"))
    images = [question.image for question in questions]
    shuffled = [images[number - 4] for number in range(len(images))]  # two questions an image: two images further
    for question, image in zip(questions, shuffled, strict=True):
        question.image = image
    answers = answer_questions(llava, processor, questions, LlavaQuestions(), root / "shuffled", 16)
    right = sum(answer == question.answers[0] for answer, question in zip(answers, questions, strict=True))
    assert 100 * right / len(questions) < 45 < trained.metrics["made"] - 30


def test_result_says_what_was_done(root, trained):
    file = root / "out" / "tiny" / "llava.made.json"
    assert Result.read(file) == trained
    assert trained.counts["finetune examples"] == 300 and trained.counts["made questions"] == 120
    assert trained.resolution == 64 and "aspect kept" in trained.protocol
    assert trained.settings["finetune"]["learning_rate"] == 3e-3
    assert trained.params == transformers.RadioModel.from_pretrained(root / "student").num_parameters()
    work = root / "out" / "tiny" / "llava.made"
    assert not list(work.glob("*/checkpoint-*"))  # nothing but results is left

    before = load_file(work / "pretrain" / "projector" / "model.safetensors")
    after = load_file(work / "finetune" / "llava" / "model.safetensors")
    language = load_file(root / "language_model" / "model.safetensors")
    student = load_file(root / "student" / "model.safetensors")
    projector = {key.split("multi_modal_projector.")[1]: key for key in after if "multi_modal_projector" in key}
    assert set(projector) == set(before)
    assert all(not torch.equal(before[name], after[key]) for name, key in projector.items())
    tower = {key.split("vision_tower.model.")[1]: value for key, value in after.items() if "vision_tower" in key}
    assert tower and all(torch.equal(value, student[key]) for key, value in tower.items())  # frozen to the end
    trained_key = next(key for key in after if key.endswith("layers.0.self_attn.q_proj.weight") and "language" in key)
    assert not torch.equal(after[trained_key], language["model.layers.0.self_attn.q_proj.weight"])


def test_nothing_is_done_twice_and_nothing_is_replaced_unasked(root, trained, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr("transformers_radio.evaluation.llava.task.train_phase", refuse)
    assert run(root, root / "out", **LEARNING) == [trained]
    # the hardware is no part of it
    assert run(root, root / "out", **LEARNING, **{"hardware.num_workers": 2, "finetune.save_steps": 7}) == [trained]
    changed = {**LEARNING, "finetune.learning_rate": 1e-3}
    with pytest.raises(ValueError, match="differs in finetune.learning_rate .*overwrite=true"):
        run(root, root / "out", **changed)
    (root / "out/tiny/llava.made.json").rename(root / "result.json")
    with pytest.raises(ValueError, match="finetune holds work of other settings.*overwrite=true"):
        run(root, root / "out", **changed)

    # Questions go on from the answers that are there, the last of which was cut while it was written.
    answers = root / "out/tiny/llava.made/answers/made/0.jsonl"
    lines = answers.read_text().splitlines(keepends=True)
    answers.write_text("".join(lines[:50]) + lines[50][:10])
    assert run(root, root / "out", **LEARNING) == [trained]
    assert sorted(answers.read_text().splitlines(keepends=True)) == sorted(lines)
    # Other questions to the same model are asked without training again.
    questions = root / "world" / "few.jsonl"
    questions.write_text("".join((root / "world" / "questions.jsonl").read_text().splitlines(keepends=True)[:4]))
    more = {"questions.few.questions": "few.jsonl", "questions.few.images": "images", "overwrite": "true"}
    (result,) = run(root, root / "out", **LEARNING, **more)
    assert result.metrics["made"] == trained.metrics["made"] and result.counts["few questions"] == 4
    os.replace(root / "result.json", root / "out/tiny/llava.made.json")


def _run_and_die(root, output):
    """In a process of its own: kill -9 as soon as the second phase has its first checkpoint."""

    class Killed(transformers.TrainerCallback):
        def on_save(self, args, state, control, **_):
            if "finetune" in args.output_dir:
                os.kill(os.getpid(), signal.SIGKILL)

    transformers.trainer.DEFAULT_CALLBACKS.append(Killed)
    run(root, output, "short", **SHORT)


def test_a_killed_run_goes_on_to_the_same_result(root):
    killed = root / "killed"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_run_and_die, args=(root, killed))
    process.start()
    process.join()
    work = killed / "tiny" / "llava.made"
    assert process.exitcode == -signal.SIGKILL and not (work / "finetune" / "llava").exists()
    assert list((work / "finetune").glob("checkpoint-*/trainer_state.json"))
    assert (work / "pretrain" / "projector").exists()
    projector_time = (work / "pretrain" / "projector").stat().st_mtime
    # a checkpoint that was being written
    torn = work / "finetune" / "checkpoint-29"
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"global_step"')

    (resumed,) = run(root, killed, "short", **SHORT)
    (whole,) = run(root, root / "whole", "short", **SHORT)
    assert resumed.metrics == whole.metrics
    assert (work / "pretrain" / "projector").stat().st_mtime == projector_time
    expected = load_file(root / "whole/tiny/llava.made/finetune/llava/model.safetensors")
    got = load_file(work / "finetune" / "llava" / "model.safetensors")
    assert set(got) == set(expected)
    for key in expected:
        torch.testing.assert_close(got[key], expected[key], atol=1e-5, rtol=1e-4)


def test_several_processes_share_the_questions(tmp_path):
    for rank in (0, 1):
        AnswerLog(tmp_path, rank).add({f"{rank}": "red", f"{rank}-again": "blue\nline"})
    assert AnswerLog(tmp_path, 2).answers == {"0": "red", "0-again": "blue\nline", "1": "red", "1-again": "blue\nline"}


@pytest.mark.parametrize(
    "overrides, error, message",
    [
        ({"image_size": 60}, ValueError, "image_size is 60"),
        ({"finetune.batch_size": 12}, ValueError, "batch_size is 12"),
        ({"questions.made.scorer": "bleu"}, ValueError, "scorer is 'bleu'"),
        ({"questions.made.scorer": "yes_no"}, ValueError, "Line 1 of .* wants yes or no"),
        ({"questions.made.questions": "none.jsonl"}, FileNotFoundError, "none.jsonl"),
        ({"questions.made.images": "elsewhere"}, FileNotFoundError, "10 images"),
        ({"pretrain.conversations": "none.json"}, FileNotFoundError, "none.json"),
        ({"finetune.images": "none"}, FileNotFoundError, "none"),
        ({"language_model": "/nowhere"}, OSError, "nowhere"),
        ({"lmms_eval_tasks": "[mmlu]"}, ValueError, "lmms_eval_tasks has mmlu; choose from gqa"),
        ({"finetune.epoch": 2}, ValueError, "epoch"),
    ],
)
def test_wrong_settings_are_refused_before_any_work(root, tmp_path, overrides, error, message):
    with pytest.raises(error, match=message):
        run(root, tmp_path / "out", "short", **overrides)
    assert not (tmp_path / "out").exists()


def test_other_models_are_refused(root, tmp_path):
    overrides = settings(root / "short", root / "language_model")
    with pytest.raises(ValueError, match="not a student"):
        run_task("llava", ["transformers:anything"], output=tmp_path, overrides=overrides)


def test_a_student_in_transformers_own_layout(root, tmp_path):
    transformers.RadioModel.from_pretrained(root / "student").save_pretrained(tmp_path / "native")
    make_world(tmp_path / "world", images=8, questions=1)
    little = {"hardware.per_device_batch_size": 8, "pretrain.batch_size": 8, "finetune.batch_size": 8}
    overrides = settings(tmp_path / "world", root / "language_model", **little)
    (result,) = run_task("llava", [str(tmp_path / "native")], output=tmp_path / "out", overrides=overrides)
    assert result.settings["weights"] == digest_weights(RadioModel.from_pretrained(root / "student"))


@pytest.mark.parametrize(
    "lines, message",
    [
        (['{"question_id": 1, "text": "?"}'], "Line 1 .* is not a question"),
        (['{"question_id": 1, "text": "?", "answer": "a"}'] * 2, "Line 2 .* question_id '1' again"),
        (['{"question_id": 1, "text": "?", "answers": []}'], "has answers"),
        (["no json"], "Line 1"),
        ([], "holds no questions"),
    ],
)
def test_wrong_questions_are_named(tmp_path, lines, message):
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        read_questions(tmp_path / "questions.jsonl", tmp_path, "exact_match")


@pytest.mark.slow
def test_trained_on_blank_images_it_guesses(root, trained):
    """The blind baseline: the same training and questions, every image gray."""
    blind = root / "blind"
    shutil.copytree(root / "world", blind)
    for path in (blind / "images").iterdir():
        with Image.open(path) as image:
            gray = np.full((image.height, image.width, 3), 128, dtype=np.uint8)
        Image.fromarray(gray).save(path)
    (result,) = run(root, root / "out-blind", "blind", **LEARNING)
    assert result.metrics["made"] < 40 < trained.metrics["made"] - 40


@pytest.mark.slow
def test_two_processes_train_and_answer_together(root, tmp_path):
    """With text alone among the conversations: a process whose batch has no image must not make the other wait."""
    shutil.copytree(root / "short", tmp_path / "mixed")
    file = tmp_path / "mixed" / "finetune.json"
    items = json.loads(file.read_text())
    words = [{"from": "human", "value": "Where is the shape?"}, {"from": "gpt", "value": "left"}]
    file.write_text(json.dumps([items[0], *[{"conversations": words}] * 30, *items[1:8]]))
    script = tmp_path / "script.py"
    script.write_text(RUN_TASK)
    overrides = settings(
        tmp_path / "mixed",
        root / "language_model",
        **{**SHORT, "hardware.per_device_batch_size": 2, "hardware.gradient_checkpointing": "true"},
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [*launch, f"tiny={root / 'student'}", str(tmp_path / "out"), *overrides]
    subprocess.run(command, check=True, env=environment, timeout=600)
    result = Result.read(tmp_path / "out" / "tiny" / "llava.made.json")
    assert result.counts["finetune examples"] == 38
    answers = tmp_path / "out" / "tiny" / "llava.made" / "answers" / "made"
    shares = [(answers / f"{rank}.jsonl").read_text().splitlines() for rank in (0, 1)]
    assert [len(share) for share in shares] == [5, 5]
    assert len({json.loads(line)["question_id"] for share in shares for line in share}) == 10


def test_the_recipe_is_lla_va_s():
    recipe = ROOT / "recipes" / "evaluation" / "llava.yaml"
    config = load_config(LlavaConfig, None, recipe, None)
    assert (config.pretrain.learning_rate, config.pretrain.batch_size, config.pretrain.epochs) == (1e-3, 256, 1)
    assert (config.finetune.learning_rate, config.finetune.batch_size, config.finetune.epochs) == (2e-5, 128, 1)
    assert config.pretrain.warmup == config.finetune.warmup == 0.03
    assert config.image_size == 432 and "vicuna-7b" in config.language_model

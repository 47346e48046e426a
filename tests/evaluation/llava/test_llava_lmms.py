"""What lmms-eval asks of us: a small module in its place calls as its evaluator does, and is held to its answers."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image

from helpers.tiny_llava import save_language_model, save_student
from transformers_radio import RadioModel
from transformers_radio.evaluation.llava import lmms as llava_lmms
from transformers_radio.evaluation.llava.answers import generate
from transformers_radio.evaluation.llava.data import encode_image
from transformers_radio.evaluation.llava.lmms import LmmsTasks, check_lmms_eval, evaluate_lmms
from transformers_radio.evaluation.llava.model import build_llava

DOCUMENTS = [
    {"image": Image.new("RGB", (64, 40), "red"), "question": "What color is the shape?"},
    {"image": Image.new("RGB", (40, 64), "blue").convert("P"), "question": "Where is the shape?"},
    {"image": None, "question": "Who are you?"},
]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("lmms")
    torch.manual_seed(3)
    student = RadioModel.from_pretrained(save_student(root / "student"))
    llava, processor = build_llava(student, str(save_language_model(root / "language_model")), 64)
    return llava.eval(), processor


@pytest.fixture
def lmms_eval(monkeypatch):
    """The three names of lmms-eval that are used, and what was asked."""
    seen = SimpleNamespace(calls=[], answers=[])

    class lmms:
        def __init__(self):
            self.task_dict = {}

    def simple_evaluate(model, tasks, task_manager, limit, batch_size, log_samples, cli_args):
        seen.calls.append((tasks, limit, batch_size, cli_args.output_path))
        results = {}
        for task in (one["task"] if isinstance(one, dict) else one for one in tasks):
            model.task_dict[task] = {"test": DOCUMENTS}
            requests = [
                SimpleNamespace(
                    args=(
                        document["question"],
                        {"max_new_tokens": 4, "until": ["\n"]},
                        lambda document: [] if document["image"] is None else [document["image"]],
                        index,
                        task,
                        "test",
                    )
                )
                for index, document in enumerate(DOCUMENTS[:limit])
            ]
            requests.append(requests[-1])  # with several processes the last is repeated, so that all have as many
            seen.answers.append(model.generate_until(requests))
            results[task] = {"alias": task, "exact_match,none": 0.25, "exact_match_stderr,none": 0.5}
            if task == "pope_pop":
                results[task] = {"pope_accuracy,none": 0.5, "pope_f1_score,none": 0.75, "submission,none": None}
        return {"results": results}

    names = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": lmms},
        "lmms_eval.evaluator": {"simple_evaluate": simple_evaluate},
        "lmms_eval.tasks": {"TaskManager": lambda model_name: model_name},
    }
    for name, values in names.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    return seen


def test_requests_are_answered_and_metrics_named(built, lmms_eval, tmp_path, monkeypatch):
    llava, processor = built
    metrics = evaluate_lmms(llava, processor, LmmsTasks(["gqa", "pope_pop"]), tmp_path, batch_size=2)
    assert metrics == {"GQA": 25.0, "POPE accuracy": 50.0, "POPE F1": 75.0}
    images = [one["image"] and encode_image(processor, one["image"].convert("RGB")) for one in DOCUMENTS]
    expected = [
        generate(llava, processor, [image], [one["question"]], 4)[0]
        for image, one in zip(images, DOCUMENTS, strict=True)
    ]
    assert lmms_eval.answers == [[*expected, expected[-1]]] * 2
    assert lmms_eval.calls == [(["gqa", "pope_pop"], None, 2, str(tmp_path))]

    # started again, nothing is asked again
    def refuse(*args):
        raise AssertionError("asked again")

    monkeypatch.setattr(llava_lmms, "generate", refuse)
    assert evaluate_lmms(llava, processor, LmmsTasks(["gqa", "pope_pop"]), tmp_path, batch_size=2) == metrics
    assert lmms_eval.answers[2:] == lmms_eval.answers[:2]


@pytest.mark.parametrize(("ocr", "column"), [(True, "TextVQA (OCR tokens)"), (False, "TextVQA (no OCR tokens)")])
def test_textvqa_is_named_by_its_prompt(built, lmms_eval, tmp_path, ocr, column):
    metrics = evaluate_lmms(*built, LmmsTasks(["textvqa_val", "gqa"], 1, ocr), tmp_path, batch_size=4)
    assert metrics == {column: 25.0, "GQA": 25.0}
    (((textvqa, gqa), *_),) = lmms_eval.calls
    asked_with = textvqa["lmms_eval_specific_kwargs"]["default"]["ocr"] if ocr else textvqa
    assert (asked_with, gqa) == (True if ocr else "textvqa_val", "gqa")


def test_a_metric_that_is_not_there_is_an_error(built, lmms_eval, tmp_path, monkeypatch):
    monkeypatch.setitem(llava_lmms.LMMS_TASKS, "gqa", {"accuracy": "GQA"})
    with pytest.raises(RuntimeError, match="accuracy of gqa"):
        evaluate_lmms(*built, LmmsTasks(["gqa"], limit=1), tmp_path, batch_size=4)


@pytest.mark.parametrize("missing", ["lmms_eval.evaluator", "filelock._api"])
def test_without_lmms_eval_or_what_it_needs_the_error_says_how_to_get_it(lmms_eval, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, "filelock._api", ModuleType("filelock._api"))
    check_lmms_eval(["gqa"])
    monkeypatch.setitem(sys.modules, missing, None)  # Python's own way to say that there is no such module
    with pytest.raises(ImportError, match=rf'{missing}.*pip install "transformers_radio\[lmms\]"'):
        check_lmms_eval(["gqa"])
    check_lmms_eval([])
    with pytest.raises(ValueError, match="choose from gqa"):
        check_lmms_eval(["coco"])

"""lmms-eval itself (`make test-lmms`): its tasks on made data sets of their schema, its scorers beside ours."""

import importlib
import random
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image

from helpers.tiny_llava import save_language_model, save_student
from transformers_radio import RadioModel
from transformers_radio.evaluation.llava import lmms as llava_lmms
from transformers_radio.evaluation.llava.lmms import LMMS_TASKS, LmmsTasks, check_lmms_eval, evaluate_lmms
from transformers_radio.evaluation.llava.model import build_llava
from transformers_radio.evaluation.llava.scorers import vqa_accuracy, yes_no

pytestmark = pytest.mark.lmms

PICTURE = Image.new("RGB", (64, 40), "red")
SHORT = "\nAnswer the question using a single word or phrase."
PEOPLE = ["red"] * 2 + ["dark red"] * 8  # two of ten: (2 x 1/3 + 8 x 2/3) / 10 = 0.6


def numbered(people):
    """As VQAv2 has them. Without the numbers, leaving one out would leave out all that said the same."""
    return [{"answer": answer, "answer_id": number} for number, answer in enumerate(people)]


SETS = {
    ("lmms-lab-encoder/GQA", "testdev_balanced_images"): {"testdev": [{"id": "7", "image": PICTURE}]},
    ("lmms-lab-encoder/GQA", "testdev_balanced_instructions"): {
        "testdev": [
            {"id": "a", "imageId": "7", "question": "Is it red?", "answer": "yes"},
            {"id": "b", "imageId": "7", "question": "What is it?", "answer": "square"},
        ]
    },
    ("lmms-lab-encoder/textvqa", None): {
        "validation": [
            {
                "question_id": 1,
                "image": PICTURE,
                "question": "which color?",
                "answers": PEOPLE,
                "ocr_tokens": ["STOP", "all way"],
            }
        ]
    },
    ("lmms-lab-encoder/VQAv2", None): {
        "validation": [{"question_id": 1, "image": PICTURE, "question": "How?", "answers": numbered(PEOPLE)}]
    },
    ("lmms-lab-encoder/POPE", "Full"): {
        "popular": [
            {"question_id": str(number), "image": PICTURE, "question": f"Is there {thing}?", "answer": answer}
            for number, (thing, answer) in enumerate({"a dog": "yes", "a cat": "no", "a cow": "no"}.items())
        ]
    },
    ("lmms-lab-encoder/ScienceQA", "ScienceQA-IMG"): {
        "test": [
            {"image": PICTURE, "question": "Which?", "choices": ["iron", "wood"], "answer": 1, "hint": "It burns."},
            {"image": PICTURE, "question": "Which one?", "choices": ["iron", "wood"], "answer": 0, "hint": ""},
        ]
    },
}
REPLIES = {
    f"Is it red?{SHORT}": "Yes.",
    f"What is it?{SHORT}": "a circle",
    f"Which color?\nReference OCR token: STOP, all way{SHORT}": "Red.",  # as LLaVA-1.5 asks it
    f"How?{SHORT}": "the red",
    f"Is there a dog?{SHORT}": "Yes",
    f"Is there a cat?{SHORT}": "yes",
    f"Is there a cow?{SHORT}": "no",
    "Context: It burns.\nWhich?\nA. iron\nB. wood\n"
    "Answer with the option's letter from the given choices directly.": "B",
    "Which one?\nA. iron\nB. wood\nAnswer with the option's letter from the given choices directly.": "B. wood",
}
# What these replies are worth, counted by hand
EXPECTED = {
    "GQA": 50.0,
    "TextVQA (OCR tokens)": 60.0,
    "VQAv2": 60.0,
    "POPE accuracy": 100 * 2 / 3,
    "POPE F1": 100 * 2 / 3,  # precision 1/2, recall 1
    "ScienceQA": 50.0,
}


@pytest.fixture
def hub(monkeypatch):
    """The sets in place of the Hub."""

    def load_dataset(path, name=None, split=None, **settings):
        parts = {key: datasets.Dataset.from_list(rows) for key, rows in SETS[path, name].items()}
        return datasets.DatasetDict(parts) if split is None else parts[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("lmms")
    torch.manual_seed(3)
    student = RadioModel.from_pretrained(save_student(root / "student"))
    llava, processor = build_llava(student, str(save_language_model(root / "language_model")), 64)
    return llava.eval(), processor


def test_its_five_tasks_score_our_answers(built, hub, tmp_path, monkeypatch):
    check_lmms_eval(list(LMMS_TASKS))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    asked = []

    def reply(llava, processor, images, questions, max_new_tokens):
        assert all(image is not None for image in images) and max_new_tokens >= 16
        asked.extend(questions)
        return [REPLIES[question] for question in questions]

    monkeypatch.setattr(llava_lmms, "generate", reply)
    metrics = evaluate_lmms(*built, LmmsTasks(list(LMMS_TASKS)), tmp_path / "work", batch_size=2)
    assert sorted(asked) == sorted(REPLIES)
    assert metrics == pytest.approx(EXPECTED)
    # started again, nothing is asked again
    again = evaluate_lmms(*built, LmmsTasks(list(LMMS_TASKS)), tmp_path / "work", batch_size=2)
    assert again == metrics and len(asked) == len(REPLIES)
    # what its scorers write themselves goes to our folder, not to the one that the command was given in
    assert list((tmp_path / "work").rglob("textvqa_submission_*.json")) and not list(Path.cwd().iterdir())


def test_textvqa_without_ocr_tokens(built, hub, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(llava_lmms, "generate", lambda *args: asked.extend(args[3]) or ["red"] * len(args[3]))
    metrics = evaluate_lmms(*built, LmmsTasks(["textvqa_val"], textvqa_ocr=False), tmp_path, batch_size=2)
    assert metrics == {"TextVQA (no OCR tokens)": pytest.approx(60.0)} and asked == [f"Which color?{SHORT}"]
    # the folder's answers are of their prompts: with OCR tokens it is asked again
    assert list(evaluate_lmms(*built, LmmsTasks(["textvqa_val"]), tmp_path, batch_size=2)) == ["TextVQA (OCR tokens)"]
    assert len(asked) == 2


def test_a_model_answers_it(built, hub, tmp_path):
    metrics = evaluate_lmms(*built, LmmsTasks(["gqa", "pope_pop"], limit=1), tmp_path, batch_size=4)
    assert set(metrics) == {"GQA", "POPE accuracy", "POPE F1"} and all(0 <= one <= 100 for one in metrics.values())


def test_our_vqa_accuracy_is_its():
    score = importlib.import_module("lmms_eval.tasks.vqav2.utils").vqav2_process_results_val
    generator = random.Random(0)
    words = ["red", "Red.", "the red", "two", "2", "dont", "don't", "a black/white dog", "1,000", "none", "U.S.A."]
    for _ in range(300):
        people, answer = generator.choices(words, k=10), generator.choice(words)
        document = {"question_id": 0, "answers": numbered(people)}
        expected = score(document, [answer])["exact_match"]
        assert vqa_accuracy(answer, people) == pytest.approx(expected), (answer, people)


def test_our_yes_no_is_its():
    utils = importlib.import_module("lmms_eval.tasks.pope.utils")
    generator = random.Random(1)
    truths = [generator.choice(["yes", "no"]) for _ in range(100)]
    answers = [generator.choice(["yes", "no"]) for _ in truths]
    results = [
        utils.pope_process_results({"answer": truth, "question_id": number}, [answer])["pope_accuracy"]
        for number, (truth, answer) in enumerate(zip(truths, answers, strict=True))
    ]
    ours = yes_no(answers, truths)
    assert ours["accuracy"] == pytest.approx(100 * utils.pope_aggregate_accuracy(results))
    assert ours["precision"] == pytest.approx(100 * utils.pope_aggregate_precision(results))
    assert ours["recall"] == pytest.approx(100 * utils.pope_aggregate_recall(results))
    assert ours["F1"] == pytest.approx(100 * utils.pope_aggregate_f1_score(results))

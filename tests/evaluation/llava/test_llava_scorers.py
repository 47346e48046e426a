"""The scorers of short answers against their definitions written out, and scikit-learn."""

import random
import statistics

import evaluate
import pytest
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from transformers_radio.evaluation.llava.scorers import (
    ExactMatch,
    VqaAccuracy,
    YesNo,
    exact_match,
    normalize_answer,
    score,
    vqa_accuracy,
    yes_no,
)


def literal_vqa_accuracy(answer: str, people: list[str]) -> float:
    """Antol et al. 2015: leave each person out in turn, min(#others who said it / 3, 1), average."""
    accuracies = []
    for left_out in range(len(people)):
        others = [text for index, text in enumerate(people) if index != left_out]
        accuracies.append(min(sum(text == answer for text in others) / 3, 1.0))
    return statistics.mean(accuracies)


@pytest.mark.parametrize("agreeing", range(11))
def test_vqa_accuracy_is_the_average_over_leave_one_out_subsets(agreeing):
    people = ["red"] * agreeing + ["blue"] * (10 - agreeing)
    assert vqa_accuracy("red", people) == pytest.approx(literal_vqa_accuracy("red", people))


def test_vqa_accuracy_of_random_answers():
    generator = random.Random(0)
    for _ in range(300):
        people = [generator.choice(["cat", "dog", "fox"]) for _ in range(generator.randint(1, 12))]
        answer = generator.choice(["cat", "dog", "fox", "cow"])
        assert vqa_accuracy(answer, people) == pytest.approx(literal_vqa_accuracy(answer, people))


@pytest.mark.parametrize(
    "text, normal",
    [
        (" A  Red,\nball. ", "red ball"),
        ("Two", "2"),
        ("none", "0"),
        ("the dont", "don't"),
        ("isnt it the theyre", "isn't it they're"),
        ("don't", "don't"),
        ("1,000 people", "1000 people"),
        ("1,000-2,000", "10002000"),  # the challenge's rule: a number with commas takes all marks away
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("t-shirt", "t shirt"),
        ("3.5", "3.5"),
        ("U.S.A.", "usa"),
        ("yes!", "yes "),
        ("what?! ever", "what ever"),
    ],
)
def test_normalization(text, normal):
    assert normalize_answer(text) == normal.strip()


def test_vqa_accuracy_normalizes_both_sides():
    assert vqa_accuracy("The two dogs.", ["2 dogs"] * 4 + ["cats"] * 6) == 1.0
    assert vqa_accuracy("two dogs", ["2 dogs"] * 10) == 1.0


def test_exact_match():
    assert exact_match(" Red. ", ["red"]) == 1.0
    assert exact_match("red", ["blue", "Red"]) == 1.0
    assert exact_match("dark red", ["red"]) == 0.0
    assert exact_match("", ["red"]) == 0.0


def test_yes_no_against_scikit_learn():
    generator = random.Random(1)
    expected = [generator.choice(["yes", "no"]) for _ in range(200)]
    answers = [text if generator.random() < 0.7 else generator.choice(["yes", "no"]) for text in expected]
    scores = yes_no([text.capitalize() + "." for text in answers], expected)
    precision, recall, f1, _ = precision_recall_fscore_support(expected, answers, average="binary", pos_label="yes")
    assert scores["accuracy"] == pytest.approx(100 * accuracy_score(expected, answers))
    assert scores["precision"] == pytest.approx(100 * precision)
    assert scores["recall"] == pytest.approx(100 * recall)
    assert scores["F1"] == pytest.approx(100 * f1)
    assert scores["yes"] == pytest.approx(100 * answers.count("yes") / 200)


def test_yes_no_reads_sentences_and_counts_other_answers_as_wrong():
    scores = yes_no(["Yes, there is a dog.", "I know of no dog", "maybe", "nothing"], ["yes", "no", "yes", "no"])
    assert scores["accuracy"] == 50.0
    assert (scores["precision"], scores["recall"]) == (100.0, 50.0)
    assert yes_no(["no", "no"], ["yes", "yes"])["F1"] == 0.0


def test_score_names_its_metrics():
    assert score("exact_match", "mine", ["red", "blue"], [["red"], ["red"]]) == {"mine": 50.0}
    assert score("vqa", "mine", ["red"], [["red"] * 10]) == {"mine": 100.0}
    assert set(score("yes_no", "POPE", ["yes"], [["yes"]])) == {
        *("POPE accuracy", "POPE precision", "POPE recall", "POPE F1", "POPE yes"),
    }


def test_as_metrics_of_evaluate():
    generator = random.Random(2)
    answers = [generator.choice(["cat", "dog", "fox"]) for _ in range(60)]
    people = [[generator.choice(["cat", "dog"]) for _ in range(10)] for _ in answers]
    metric = VqaAccuracy()
    assert isinstance(metric, evaluate.Metric)
    metric.add(prediction=answers[0], reference=people[0])
    metric.add_batch(predictions=answers[1:40], references=people[1:40])
    assert len(metric) == 40
    expected = statistics.mean(map(literal_vqa_accuracy, answers, people))
    found = metric.compute(predictions=answers[40:], references=people[40:])
    assert found == {"vqa_accuracy": pytest.approx(100 * expected)}
    assert len(metric) == 0  # the next set begins anew

    assert ExactMatch().compute(predictions=["Cat.", "a dog"], references=[["fox", "cat"], ["dog"]]) == {
        "exact_match": 50.0
    }
    said, true = (generator.choices(["yes", "no"], k=60) for _ in range(2))
    found = YesNo().compute(predictions=said, references=[[one] for one in true])
    precision, recall, f1, _ = precision_recall_fscore_support(true, said, average="binary", pos_label="yes")
    assert [found[name] for name in ("accuracy", "precision", "recall", "F1")] == pytest.approx(
        [100 * value for value in (accuracy_score(true, said), precision, recall, f1)]
    )


@pytest.mark.parametrize("metric", [ExactMatch, VqaAccuracy, YesNo])
def test_metrics_name_what_is_missing(metric):
    with pytest.raises(ValueError, match="no answer to score"):
        metric().compute()
    for reference in ([], "cat"):
        with pytest.raises(ValueError, match="The reference of 'dog' is .*expected a list of answers"):
            metric().add(prediction="dog", reference=reference)

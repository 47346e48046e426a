"""Scores of short answers: exact match, yes or no (POPE), and VQA accuracy against several people's answers.

Published numbers come from lmms-eval's own scorers (see lmms.py); these score any question file without it.
"""

import re
import string
from collections import Counter
from collections.abc import Callable

import datasets

from transformers_radio.evaluation.counting_metric import CountingMetric

NUMBERS = dict(zip("zero one two three four five six seven eight nine ten".split(), map(str, range(11)), strict=True))
NUMBERS["none"] = "0"
ARTICLES = {"a", "an", "the"}
# words that people write without the apostrophe: "dont" is "don't", "theyre" is "they're"
CONTRACTIONS = {
    stem + ending.replace("'", ""): stem + ending
    for ending, stems in {
        "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
        "'ve": "could might must should they we what where who would you",
        "'ll": "how it they what who why you",
        "'d": "he how it there they where who you",
        "'re": "there they what why you",
        "'s": "he how that there what when where who why someone",
    }.items()
    for stem in stems.split()
}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def normalize_answer(text: str) -> str:
    """An answer as the VQA evaluation compares it: lower case, no punctuation or articles, digits for number words.

    The rules are those of the VQA challenge's evaluation, with the common ones of its contractions.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip().lower()
    original = text
    for mark in PUNCTUATION:
        # a mark is deleted at a word's border, and everywhere in a text that holds a number with commas; elsewhere it
        # becomes a space
        at_border = f"{mark} " in original or f" {mark}" in original
        text = text.replace(mark, "" if at_border or re.search(r"\d,+\d", original) else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = [NUMBERS.get(word, word) for word in text.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def exact_match(answer: str, expected: list[str]) -> float:
    """1 where the answer is one of the expected ones, up to case, punctuation and space around; else 0 (GQA)."""

    def plain(text: str) -> str:
        return text.lower().translate(str.maketrans("", "", string.punctuation)).strip()

    return float(plain(answer) in {plain(text) for text in expected})


def vqa_accuracy(answer: str, expected: list[str]) -> float:
    """VQA accuracy in [0, 1] of an answer against those of several people (ten in VQAv2 and TextVQA).

    min(people who gave this answer / 3, 1), averaged over all subsets that leave one person out (Antol et al. 2015).
    """
    people = [normalize_answer(text) for text in expected]
    agreeing = Counter(people)[normalize_answer(answer)]
    # a subset without somebody who agrees has one such person less; there are `agreeing` of these subsets
    with_all, with_one_less = min(agreeing / 3, 1), min((agreeing - 1) / 3, 1)
    return (agreeing * with_one_less + (len(people) - agreeing) * with_all) / len(people)


def yes_no(answers: list[str], expected: list[str]) -> dict[str, float]:
    """Accuracy, precision, recall and F1 of "yes" in percent (POPE), and the share of "yes" among the answers.

    An answer is its first word that is "yes" or "no"; one without either is wrong, and counts as a missed "yes" where
    "yes" was expected.
    """
    said = [_first_yes_or_no(answer) for answer in answers]
    true = [_first_yes_or_no(answer) for answer in expected]
    hits = sum(a == b == "yes" for a, b in zip(said, true, strict=True))
    precision = hits / max(1, said.count("yes"))
    recall = hits / max(1, true.count("yes"))
    scores = {
        "accuracy": sum(a == b for a, b in zip(said, true, strict=True)) / len(true),
        "precision": precision,
        "recall": recall,
        "F1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "yes": said.count("yes") / len(said),
    }
    return {name: 100 * score for name, score in scores.items()}


def _first_yes_or_no(text: str) -> str | None:
    return next((word for word in re.findall(r"[a-z]+", text.lower()) if word in ("yes", "no")), None)


class _AnswerMetric(CountingMetric):
    """Short answers to questions; a prediction is a text, a reference the list of right or of people's answers."""

    inputs = "predictions: answers; references: for each question a list of answers."
    schema = {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}

    def _reset(self) -> None:
        self.answers: list[str] = []
        self.expected: list[list[str]] = []

    def __len__(self) -> int:
        return len(self.answers)

    def add(self, *, prediction: str, reference: list[str]) -> None:
        """Counts one question.

        Raises:
            ValueError: the reference is not a list of texts, or is empty.
        """
        if isinstance(reference, str) or not reference:
            raise ValueError(f"The reference of {prediction!r} is {reference!r}; expected a list of answers.")
        self.answers.append(prediction)
        self.expected.append(list(reference))

    def _mean(self, of_answer: Callable[[str, list[str]], float]) -> float:
        """Percent."""
        self._check()
        return 100 * sum(map(of_answer, self.answers, self.expected)) / len(self.answers)

    def _check(self) -> None:
        if not self.answers:
            raise ValueError("There is no answer to score; add some first.")


class ExactMatch(_AnswerMetric):
    """{"exact_match": percent}, see `exact_match`."""

    description = "Share of answers that are one of the expected ones, in percent."

    def _scores(self) -> dict[str, float]:
        return {"exact_match": self._mean(exact_match)}


class VqaAccuracy(_AnswerMetric):
    """{"vqa_accuracy": percent}, see `vqa_accuracy`."""

    description = "VQA accuracy against several people's answers, in percent."

    def _scores(self) -> dict[str, float]:
        return {"vqa_accuracy": self._mean(vqa_accuracy)}


class YesNo(_AnswerMetric):
    """{"accuracy", "precision", "recall", "F1", "yes": percent}, see `yes_no`; a reference is ["yes"] or ["no"]."""

    description = "Accuracy, precision, recall and F1 of yes and no (POPE), in percent."

    def _scores(self) -> dict[str, float]:
        self._check()
        return yes_no(self.answers, [texts[0] for texts in self.expected])


METRICS = {"exact_match": ExactMatch, "yes_no": YesNo, "vqa": VqaAccuracy}
SCORERS = tuple(METRICS)


def score(scorer: str, name: str, answers: list[str], expected: list[list[str]]) -> dict[str, float]:
    """Percentages by metric; those of "yes_no" are called `name` and what they are."""
    scores = METRICS[scorer]().compute(predictions=answers, references=expected)
    return {f"{name} {metric}" if len(scores) > 1 else name: value for metric, value in scores.items()}

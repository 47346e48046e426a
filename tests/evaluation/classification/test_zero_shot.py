"""The classifier against a literal numpy loop over open_clip's templates; accuracy by hand."""

import hashlib

import evaluate
import numpy as np
import open_clip
import pytest
import torch

from transformers_radio.evaluation import openai_imagenet_templates, zero_shot_accuracy, zero_shot_classifier
from transformers_radio.evaluation.classification.words import load_class_names, load_templates
from transformers_radio.evaluation.classification.zero_shot import ZeroShotAccuracy
from transformers_radio.evaluation.models.text import load_text_tower


def text_vector(text: str) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    generator = np.random.default_rng(seed)
    return generator.normal(size=16) * generator.uniform(0.1, 10)  # lengths differ, so normalizing each text shows


def encode_text(texts: list[str]) -> torch.Tensor:
    return torch.from_numpy(np.stack([text_vector(text) for text in texts]))


def test_classifier_equals_a_literal_loop_over_the_80_templates():
    names = ["tench", "goldfish", "great white shark"]
    classifier = zero_shot_classifier(encode_text, names, openai_imagenet_templates())
    assert len(open_clip.OPENAI_IMAGENET_TEMPLATES) == 80
    for row, name in zip(classifier, names, strict=True):
        total = np.zeros(16)
        for template in open_clip.OPENAI_IMAGENET_TEMPLATES:
            vector = text_vector(template(name))
            total += vector / np.sqrt((vector**2).sum())
        np.testing.assert_allclose(row.numpy(), total / np.sqrt((total**2).sum()), atol=1e-6)


def test_string_templates_are_the_same_prompts():
    strings = zero_shot_classifier(encode_text, ["cat", "dog"], ["a {}.", "two {}s"])
    functions = zero_shot_classifier(encode_text, ["cat", "dog"], [lambda c: f"a {c}.", lambda c: f"two {c}s"])
    assert torch.equal(strings, functions) and strings.dtype == torch.float32


def test_accuracy_is_the_share_of_right_arg_max_and_ignores_length():
    classifier = torch.eye(3)
    embeddings = torch.tensor([[9.0, 1, 0], [0.1, 0.2, 0], [0, 5, 4], [0, 0, 1e-3]])
    assert zero_shot_accuracy(embeddings, classifier, torch.tensor([0, 1, 2, 2])) == 75
    assert zero_shot_accuracy(embeddings.half(), classifier, torch.tensor([1, 0, 0, 0])) == 0


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="classes would be equal"):
        zero_shot_classifier(encode_text, ["cat"], ["a photo"])
    with pytest.raises(ValueError, match="Expected lists"):
        zero_shot_classifier(encode_text, "cat", ["a {}"])
    with pytest.raises(ValueError, match="for 1 texts"):
        zero_shot_classifier(lambda texts: torch.ones(16), ["cat"], ["a {}"])
    with pytest.raises(ValueError, match="same last dimension"):
        zero_shot_accuracy(torch.ones(2, 4), torch.ones(3, 5), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="A label is 3.*only 3 classes"):
        zero_shot_accuracy(torch.ones(2, 4), torch.ones(3, 4), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="classifier holds NaN"):
        zero_shot_accuracy(torch.ones(2, 4), torch.full((3, 4), torch.nan), torch.tensor([0, 1]))


def test_the_metric_of_evaluate_is_the_function():
    generator = torch.Generator().manual_seed(0)
    classifier = torch.nn.functional.normalize(torch.randn(5, 8, generator=generator))
    labels = torch.randint(0, 5, (40,), generator=generator)
    embeddings = classifier[labels] + 0.4 * torch.randn(40, 8, generator=generator)
    expected = zero_shot_accuracy(embeddings, classifier, labels)
    assert 30 < expected < 100
    metric = ZeroShotAccuracy(classifier)
    assert isinstance(metric, evaluate.Metric)
    for start in range(0, 40, 16):
        metric.add_batch(predictions=embeddings[start : start + 16], references=labels[start : start + 16])
    assert metric.compute() == {"zero_shot_accuracy": pytest.approx(expected), "images": 40}
    scores = metric.compute(predictions=embeddings.numpy(), references=labels.tolist())
    assert scores["zero_shot_accuracy"] == pytest.approx(expected)
    with pytest.raises(ValueError, match="label is 5, but there are only 5 classes"):
        metric.add(prediction=embeddings[0], reference=5)
    with pytest.raises(ValueError, match="same last dimension"):
        metric.add_batch(predictions=torch.ones(1, 3), references=torch.tensor([0]))
    with pytest.raises(ValueError, match="NaN"):
        metric.add_batch(predictions=torch.full((1, 8), torch.nan), references=torch.tensor([0]))


def test_imagenets_names_are_in_the_order_of_its_labels():
    """torchvision states the same 1000 classes, mostly by other words."""
    from torchvision.models._meta import _IMAGENET_CATEGORIES

    names = load_class_names("openai_imagenet", None, "ImageNet")
    assert len(names) == 1000
    same = [ours.lower() == theirs.lower() for ours, theirs in zip(names, _IMAGENET_CATEGORIES, strict=True)]
    assert sum(same) > 500 and all(any(same[start : start + 50]) for start in range(0, 1000, 50))


def test_words_from_files(tmp_path, caplog):
    (tmp_path / "names.txt").write_text("red ball\ngrüner Kasten \n\n", encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("a photo of a {}.\n{}\n", encoding="utf-8")
    assert load_class_names(str(tmp_path / "names.txt"), ["a", "b"], "data") == ["red ball", "grüner Kasten"]
    assert load_templates(str(tmp_path / "prompts.txt")) == ["a photo of a {}.", "{}"]
    assert load_class_names(None, ["a", "b"], "data") == ["a", "b"]
    assert load_class_names(["x", "y"], None, "data") == ["x", "y"]
    assert len(load_templates("openai_imagenet")) == 80
    assert not caplog.text
    load_class_names(["crane", "crane"], None, "data")
    assert "stand for several classes: ['crane']" in caplog.text


@pytest.mark.parametrize(
    ("given", "stated", "message"),
    [
        ("nowhere.txt", None, "There is no file nowhere.txt"),
        (["a", "b"], ["a", "b", "c"], "There are 2 class names, but data has 3 classes"),
        (None, None, "does not state the names of its classes: give them with classes=FILE"),
        (None, ["n01440764", "n01443537"], "WordNet ids such as n01440764.*classes=openai_imagenet"),
        (["a", " "], None, "empty name"),
        ([], None, "none at all"),
    ],
)
def test_class_names_that_cannot_be_used_are_named(given, stated, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_class_names(given, stated, "data")


def test_templates_that_cannot_be_used_are_named(tmp_path):
    (tmp_path / "gap.txt").write_text("a {}\n\nthe {}\n")
    with pytest.raises(ValueError, match="Line 2 of .*gap.txt is empty"):
        load_templates(str(tmp_path / "gap.txt"))
    for wrong in ("a photo", "a {} and a {}", "a {name}", "{} {"):
        with pytest.raises(ValueError, match="needs one {} for the class name"):
            load_templates([wrong])
    with pytest.raises(ValueError, match="templates is empty"):
        load_templates([])


@pytest.mark.parametrize("spec", ["timm:vit", "ViT-H-14", "open_clip"])
def test_text_towers_of_no_known_kind_are_named(spec):
    with pytest.raises(ValueError, match="is not a text tower; expected TYPE:CHECKPOINT"):
        load_text_tower(spec)

"""The classifier against a literal numpy loop over open_clip's templates; accuracy by hand."""

import hashlib

import numpy as np
import open_clip
import pytest
import torch

from transformers_radio.evaluation import openai_imagenet_templates, zero_shot_accuracy, zero_shot_classifier


def text_vector(text: str) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    generator = np.random.default_rng(seed)
    return generator.normal(size=16) * generator.uniform(0.1, 10)  # lengths differ, so normalising each text shows


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

"""A student as an open_clip model, used as code for open_clip uses one, against open_clip and the evaluation."""

import copy
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

import transformers_radio
from helpers.echo_student import EchoStudent
from helpers.tiny_students import tiny_student
from transformers_radio.evaluation.classification.zero_shot import zero_shot_accuracy, zero_shot_classifier
from transformers_radio.evaluation.models.encoder import load_encoder
from transformers_radio.integrations import as_open_clip
from transformers_radio.teachers import build_teacher, load_text_encoder

CLIP = Path(transformers_radio.__file__).parent / "quickstart" / "teachers" / "clip"
NAMES = ["circle", "square", "triangle", "star"]
TEMPLATES = ["a photo of a {}", "a red {}"]
ENTRY = {"summary_dim": 128, "feature_dim": 192, "hidden_dim": 16}


def picture(seed, size=(80, 100)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def benchmark(model, preprocess, tokenizer, images, labels):
    """Zero-shot accuracy in percent and text-to-image retrieval, as code for open_clip computes them."""
    with torch.no_grad():
        weights = []
        for name in NAMES:
            embeddings = model.encode_text(tokenizer([template.format(name) for template in TEMPLATES]))
            embedding = torch.nn.functional.normalize(embeddings, dim=-1).mean(dim=0)
            weights.append(embedding / embedding.norm())
        features = model.encode_image(torch.stack([preprocess(image) for image in images]), normalize=True)
        logits = model.logit_scale.exp() * features @ torch.stack(weights, dim=1)
    accuracy = (logits.argmax(dim=1) == labels).float().mean().item()
    return 100 * accuracy, logits


def test_zero_shot_equals_the_evaluations_own(tmp_path):
    tiny_student("radio", {"clip": {**ENTRY, "teacher": f"open_clip:{CLIP}"}}).save_pretrained(tmp_path)
    model, preprocess, tokenizer = as_open_clip(str(tmp_path), image_size=64)
    images, labels = [picture(seed) for seed in range(12)], torch.arange(12) % 4
    accuracy, logits = benchmark(model, preprocess, tokenizer, images, labels)

    encoder = load_encoder(str(tmp_path), image_size=64)
    pixels = torch.stack([preprocess(image) for image in images])
    assert 0 <= pixels.min() and 0.9 < pixels.max() <= 1
    classifier = zero_shot_classifier(load_text_encoder("open_clip", str(CLIP)), NAMES, TEMPLATES)
    embeddings = encoder.language(pixels)
    expected = torch.nn.functional.normalize(embeddings, dim=-1) @ classifier.T * model.logit_scale.exp()
    torch.testing.assert_close(logits, expected.detach(), atol=1e-3, rtol=1e-3)
    assert accuracy == zero_shot_accuracy(embeddings, classifier, labels)


def test_the_teachers_own_embeddings_make_the_teachers_own_model():
    teacher = build_teacher("open_clip", str(CLIP))

    def encode(images):
        output = teacher(images)
        return output.summary, output.features, output.grid

    echo = EchoStudent("clip", 16, encode, 192, summary_dim=128, teacher=f"open_clip:{CLIP}")
    model, _, tokenizer = as_open_clip(echo)
    original, own_preprocess = open_clip.create_model_from_pretrained(f"local-dir:{CLIP}")
    original.eval()
    assert type(model) is type(original)
    images, texts = torch.rand(3, 3, 64, 64), tokenizer([f"a photo of a {name}" for name in NAMES])
    assert torch.equal(texts, open_clip.get_tokenizer(f"local-dir:{CLIP}")([f"a photo of a {one}" for one in NAMES]))
    mean, std = (torch.tensor(one).view(-1, 1, 1) for one in (original.visual.image_mean, original.visual.image_std))
    with torch.no_grad():
        for normalize in (False, True):
            expected = original.encode_image((images - mean) / std, normalize=normalize)
            torch.testing.assert_close(model.encode_image(images, normalize=normalize), expected, atol=1e-5, rtol=1e-4)
            assert torch.equal(model.encode_text(texts, normalize), original.encode_text(texts, normalize))
        for found, wanted in zip(model(images, texts), original((images - mean) / std, texts), strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
        logits, per_text = model.get_logits(images, texts)
        expected, _ = original.get_logits((images - mean) / std, texts)
        torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)
        assert torch.equal(logits.T, per_text)


@pytest.mark.parametrize("kind", ["radio", "eradio", "radio_timm"])
def test_every_kind_of_student(kind):
    student = tiny_student(kind, {"clip": {**ENTRY, "teacher": f"open_clip:{CLIP}"}})
    model, preprocess, _ = as_open_clip(student, image_size=96)
    pixels = preprocess(picture(0))[None]
    assert pixels.shape == (1, 3, 96, 96) and model.visual.image_size == (96, 96)
    assert open_clip.model.get_model_preprocess_cfg(model)["mean"] == (0, 0, 0)
    expected = student(pixels).adaptors["clip"].summary
    assert torch.equal(model.encode_image(pixels), expected)
    model.encode_image(pixels).sum().backward()  # it trains as open_clip models do
    assert any(one.grad is not None for one in student.parameters())
    model.lock_image_tower()
    assert not any(one.requires_grad for one in student.parameters())


@pytest.mark.parametrize("kind", ["radio", "eradio"])
def test_a_locked_student_stays_as_it_is_while_the_text_tower_trains(kind):
    model, _, _ = as_open_clip(tiny_student(kind, {"clip": {**ENTRY, "teacher": f"open_clip:{CLIP}"}}), image_size=64)
    pixels = torch.rand(2, 3, 64, 64)
    model.visual.requires_grad_(False)
    expected = model.encode_image(pixels)
    model.visual.requires_grad_(True)
    model.train().lock_image_tower()  # in this order, and in the other
    assert torch.equal(model.encode_image(pixels), expected)
    assert torch.equal(model.train().encode_image(pixels), expected) and model.training


def test_another_text_tower_by_its_name():
    student = tiny_student("radio", {"siglip2-g": ENTRY, "dino": ENTRY})
    with pytest.raises(ValueError, match="the adaptor 'siglip2-g' is '', which open_clip does not run"):
        as_open_clip(student, adaptor="siglip2-g")
    model, _, _ = as_open_clip(student, text=f"open_clip:{CLIP}", adaptor="siglip2-g")
    assert model.visual.adaptor == "siglip2-g"


def test_half_precision_follows_open_clip():
    student = copy.deepcopy(tiny_student("radio", {"clip": {**ENTRY, "teacher": f"open_clip:{CLIP}"}}))
    model, _, tokenizer = as_open_clip(student, image_size=64)
    model.to(torch.bfloat16)
    images = model.encode_image(torch.rand(1, 3, 64, 64, dtype=torch.bfloat16))
    assert images.dtype == torch.bfloat16 and images.shape == (1, 128)


@pytest.mark.parametrize(
    ("adaptors", "arguments", "message"),
    [
        ({}, {}, "no adaptor to a teacher with a text tower"),
        (
            {"clip": {**ENTRY, "teacher": "transformers:some/siglip"}},
            {},
            "'transformers:some/siglip', which open_clip",
        ),
        ({"clip": {**ENTRY, "summary_dim": 64}}, {"text": f"open_clip:{CLIP}"}, "64 dimensions, but .* has 128"),
        ({"clip": ENTRY}, {"text": f"open_clip:{CLIP}", "image_size": 70}, "image_size is 70.*use 64"),
        ({"clip": ENTRY}, {"text": "open_clip:no/such"}, "no/such"),
        ({"clip": ENTRY}, {"adaptor": "sam"}, "no adaptor 'sam'"),
    ],
)
def test_what_cannot_be_one_is_named(adaptors, arguments, message):
    with pytest.raises((ValueError, OSError), match=message):
        as_open_clip(tiny_student("radio", adaptors), **arguments)

"""Patch-text similarity against scikit-learn's cosines, and the figure by its pixels."""

from importlib import resources

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from sklearn.metrics.pairwise import cosine_similarity

from transformers_radio.evaluation.models.encoder import load_encoder
from transformers_radio.modeling import RadioConfig, RadioModel
from transformers_radio.teachers import load_text_encoder
from transformers_radio.visualization.heat_map import heat_map_figure, text_similarity

CLIP = str(resources.files("transformers_radio.quickstart") / "teachers" / "clip")
PROMPTS = ["a photo of a striped star", "a wooden ring"]


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def student_dir(tmp_path):
    torch.manual_seed(0)
    clip = {
        "summary_dim": 128,
        "feature_dim": 192,
        "hidden_dim": 16,
        "summary_token": 0,
        "teacher": f"open_clip:{CLIP}",
    }
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "max_img_size": 64}
    config = RadioConfig(
        **sizes, patch_size=8, initializer_range=0.2, adaptors={"clip": clip, "sam": {**clip, "summary_dim": None}}
    )
    RadioModel(config).save_pretrained(tmp_path / "student")
    return tmp_path / "student"


def text_vectors():
    return load_text_encoder("open_clip", CLIP)(PROMPTS).numpy()


def test_student_s_patches_through_its_summary_head(student_dir, images):
    encoder = load_encoder(str(student_dir))
    found = text_similarity(encoder, images, PROMPTS, load_text_encoder("open_clip", CLIP))
    assert found.shape == (2, 2, 4, 6) and found.dtype == torch.float32
    model = RadioModel.from_pretrained(student_dir).eval()
    with torch.no_grad():
        tokens = model(images).last_hidden_state[:, -24:]
        patches = model.adaptors["clip"].summary_head(tokens).reshape(48, 128)
    expected = cosine_similarity(patches.numpy(), text_vectors()).reshape(2, 4, 6, 2)
    np.testing.assert_allclose(found.permute(0, 2, 3, 1), expected, atol=1e-5)


def test_clip_teacher_s_patches_through_its_own_projection():
    encoder = load_encoder(f"open_clip:{CLIP}")
    side = encoder.image_size
    images = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    found = text_similarity(encoder, images, PROMPTS, load_text_encoder("open_clip", CLIP))
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{CLIP}")
    statistics = preprocess.transforms[-1]
    with torch.no_grad():
        visual = model.eval().visual
        mean, std = (torch.tensor(x)[:, None, None] for x in (statistics.mean, statistics.std))
        tokens = visual.forward_intermediates((images - mean) / std, indices=1, output_fmt="NLC")
        patches = visual.ln_post(tokens["image_intermediates"][-1][0]) @ visual.proj
    grid = found.shape[2:]
    expected = cosine_similarity(patches.numpy(), text_vectors()).T.reshape(2, *grid)
    np.testing.assert_allclose(found[0], expected, atol=1e-4)


def test_what_cannot_be_asked_is_refused(student_dir, images):
    tower = load_text_encoder("open_clip", CLIP)
    encoder = load_encoder(str(student_dir))
    with pytest.raises(ValueError, match="at least one text"):
        text_similarity(encoder, images, [], tower)
    with pytest.raises(ValueError, match="at least one text"):
        text_similarity(encoder, images, ["a star", ""], tower)
    encoder.adaptor = None
    with pytest.raises(ValueError, match="no adaptor to a teacher with a text tower"):
        text_similarity(encoder, images, PROMPTS, tower)
    dino = load_encoder(f"transformers:{CLIP.removesuffix('clip')}dinov2")
    with pytest.raises(ValueError, match="dinov2 is neither a student nor an OpenCLIP teacher"):
        text_similarity(dino, images, PROMPTS, tower)


def test_figure_is_brightest_at_the_highest_similarity_of_all_images(tmp_path):
    similarity = torch.full((2, 1, 4, 4), -0.1)
    similarity[0, 0, :, 0] = 0.3
    images = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    path = heat_map_figure(images, similarity, ["a star"], tmp_path / "a.png")
    pixels = np.asarray(Image.open(path).convert("L")).astype(int)  # 160 dpi: panels of 256, gaps of 9.6
    with_star, without = pixels[114:366, 287:538], pixels[380:631, 287:538]
    assert with_star[:, :60].min() > 100 and with_star[:, 66:].max() < 5  # a patch of 64 pixels, with a hard edge
    assert without.max() < 5  # one scale for all images: what is nowhere in it stays dark

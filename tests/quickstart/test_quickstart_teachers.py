"""The shipped teachers: each loads with its own library, and is good at what it is there for.

The scenes are fresh ones, of another seed than the teachers were trained on.
"""

import json
from importlib import resources
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from segment_anything import SamPredictor
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch.nn import functional as F
from transformers import AutoImageProcessor, Dinov2WithRegistersModel

from transformers_radio.quickstart.scenes import CLASS_NAMES, MATERIALS, draw_scene
from transformers_radio.quickstart.train_sam import build_sam
from transformers_radio.quickstart.train_teachers import cell_labels, linear_probe_miou

TEACHERS = Path(str(resources.files("transformers_radio.quickstart") / "teachers"))
SEED = 11


@pytest.fixture(scope="module")
def scenes():
    return {
        "train": [draw_scene("train", SEED, i) for i in range(480)],
        "validation": [draw_scene("validation", SEED, i) for i in range(192)],
    }


def _images(scenes):
    return torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2)


@torch.no_grad()
def _dinov2_tokens(scenes):
    processor = AutoImageProcessor.from_pretrained(TEACHERS / "dinov2")
    model = Dinov2WithRegistersModel.from_pretrained(TEACHERS / "dinov2").eval()
    assert model.dtype == torch.float32
    pixels = processor([scene.image for scene in scenes], return_tensors="pt")["pixel_values"]
    assert pixels.shape[-2:] == (84, 84)
    return model(pixels).last_hidden_state


def test_the_weights_are_small_and_in_half_precision():
    assert sum(path.stat().st_size for path in TEACHERS.rglob("*") if path.is_file()) <= 12e6
    weights = torch.load(TEACHERS / "sam" / "sam.pth", weights_only=True)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}


def test_vision_encoders_have_their_size():
    clip = open_clip.create_model(f"local-dir:{TEACHERS / 'clip'}")
    dinov2 = Dinov2WithRegistersModel.from_pretrained(TEACHERS / "dinov2")
    for encoder in (clip.visual, dinov2, build_sam().image_encoder):
        assert 1.7e6 < sum(p.numel() for p in encoder.parameters()) < 3e6


def test_clip_names_fresh_scenes_without_training(scenes):
    """With open_clip's model, preprocessing and tokenizer alone. Chance is 1 %."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{TEACHERS / 'clip'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{TEACHERS / 'clip'}")
    pixels = torch.stack([preprocess(Image.fromarray(scene.image)) for scene in scenes["validation"]])
    model.eval()
    with torch.no_grad():
        images = model.encode_image(pixels, normalize=True)
        texts = model.encode_text(tokenizer([f"a photo of a {name}" for name in CLASS_NAMES]), normalize=True)
    labels = torch.tensor([scene.main_class for scene in scenes["validation"]])
    assert ((images @ texts.T).argmax(dim=1) == labels).float().mean() > 0.85


def test_dinov2_without_labels_finds_scenes_of_the_same_material(scenes):
    """Nearest neighbors with scikit-learn. Chance is 12.5 %."""
    summaries = {split: F.normalize(_dinov2_tokens(scenes[split])[:, 0], dim=1).numpy() for split in scenes}
    labels = {split: [scene.main_class % len(MATERIALS) for scene in scenes[split]] for split in scenes}
    neighbors = KNeighborsClassifier(10, metric="cosine").fit(summaries["train"], labels["train"])
    assert neighbors.score(summaries["validation"], labels["validation"]) > 0.6


def test_dinov2_patches_tell_materials_apart(scenes):
    """A linear classifier of single patches by scikit-learn, against always answering the most frequent label."""
    labels, patches = {}, {}
    for split in scenes:
        semantic = torch.from_numpy(np.stack([scene.semantic for scene in scenes[split][:192]])).long()
        # The pixel in the middle of each of the 6 x 6 patches.
        at = ((torch.arange(6) + 0.5) * 128 / 6).long()
        centers = semantic[:, at][:, :, at]  # (N, 6, 6)
        labels[split] = torch.where(centers > 0, (centers - 1) % len(MATERIALS) + 1, 0).flatten().numpy()
        patches[split] = _dinov2_tokens(scenes[split][:192])[:, 5:].flatten(0, 1).numpy()
    probe = LogisticRegression(max_iter=200).fit(patches["train"], labels["train"])
    most_frequent = np.bincount(labels["validation"]).max() / len(labels["validation"])
    assert probe.score(patches["validation"], labels["validation"]) > most_frequent + 0.15


def test_sam_cuts_out_what_a_box_points_at(scenes):
    """With segment_anything's own predictor, against the filled box."""
    sam = build_sam()
    sam.load_state_dict(torch.load(TEACHERS / "sam" / "sam.pth", weights_only=True))
    predictor = SamPredictor(sam.eval())
    found, filled = [], []
    for scene in scenes["validation"][:64]:
        predictor.set_image(scene.image)
        for number, one in enumerate(scene.objects, start=1):
            masks, _, _ = predictor.predict(box=np.array(one.box), multimask_output=False)
            truth = scene.instances == number
            x0, y0, x1, y1 = one.box
            box = np.zeros_like(truth)
            box[y0:y1, x0:x1] = True
            for scores, guess in ((found, masks[0]), (filled, box)):
                scores.append((guess & truth).sum() / (guess | truth).sum())
    assert np.mean(found) > 0.7 > np.mean(filled) + 0.1


def test_the_report_belongs_to_the_files():
    report = json.loads((TEACHERS / "teachers.json").read_text())
    assert set(report) == {"clip", "dinov2", "sam"}
    clip = open_clip.create_model(f"local-dir:{TEACHERS / 'clip'}").visual
    assert report["clip"]["vision_parameters"] == sum(p.numel() for p in clip.parameters())
    assert report["clip"]["zero_shot"] > 85 and report["sam"]["box_prompt_iou"] > report["sam"]["filled_box_iou"]


def test_cell_labels_and_probe_score_against_a_closed_form():
    semantic = torch.zeros(2, 128, 128, dtype=torch.uint8)
    semantic[:, :64] = 1 + 3 * 8 + 5  # shape 3, material 5
    shapes, materials = cell_labels(semantic, "shapes"), cell_labels(semantic, "materials")
    assert shapes.shape == (2, 8, 8)
    assert (shapes[:, :4] == 4).all() and (materials[:, :4] == 6).all()
    assert (shapes[:, 4:] == 0).all() and (materials[:, 4:] == 0).all()
    one_hot = F.one_hot(shapes, 5).movedim(-1, 1).float()
    assert linear_probe_miou(one_hot, shapes, one_hot, shapes) == 100
    # Features that say nothing: everything is called one of two equal halves, IoU 1/2 and 0.
    assert linear_probe_miou(0 * one_hot, shapes, 0 * one_hot, shapes) == pytest.approx(25)

"""A converted release in the commands: asked in words with its teachers' text towers, and every picture of it."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from typer.testing import CliRunner

from helpers import nvidia_reference as reference
from helpers.classification_world import CLASSES, pictures, write_folders
from helpers.nvidia_files import HEADS, HIDDEN, SIDE, WIDTH, Randoms, make, mlp, write_pth
from helpers.tiny_sam import WIDTH as SAM_WIDTH
from helpers.tiny_sam import write_sam
from helpers.tiny_text_towers import siglip_embeddings, write_open_clip, write_siglip
from transformers_radio.cli import app
from transformers_radio.integrations import as_open_clip
from transformers_radio.integrations import open_clip as open_clip_swap
from transformers_radio.visualization import run as visualize_run

SIGLIP = "google/siglip2-giant-opt-patch16-384"  # what siglip2-g of C-RADIOv3 and v4 names
WIDTHS = {"clip": (20, 32), "siglip2-g": (16, 24), "dino_v2": (12, 16), "sam": (8, SAM_WIDTH)}
PICTURES = pictures(24, seed=1)
TEMPLATES = ["a {}.", "the photo of a {}"]
NAMES = ["blue cone", "green box", "red ball"]  # in the order of the folders' names


def command(*words):
    found = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.stdout


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A release in NVIDIA's layout, converted by the command, and its teachers where their names lead."""
    folder = tmp_path_factory.mktemp("world")
    clip, weights = write_open_clip(folder / "clip", "ViT-Tiny-of-this-test", 20)
    siglip = write_siglip(folder / SIGLIP, projection=16)
    write_sam(folder / "sam_vit_h_4b8939.pth")
    write_folders(folder / "pictures", "validation", PICTURES)
    args, stored, plain, *_ = make("c-radio_v3-h")
    args["teachers"][0] |= {"model": "ViT-Tiny-of-this-test", "pretrained": str(weights)}
    stored = {name: value for name, value in stored.items() if not name.startswith(("_heads.", "_feature_proj"))}
    rand, heads = Randoms(5), {}
    for teacher, (summary, feature) in WIDTHS.items():
        heads[teacher] = mlp(rand, "v2", WIDTH, HIDDEN, summary, 0)
        stored |= {f"_heads.{teacher}.{name}": value for name, value in heads[teacher].items()}
        feature_head = mlp(rand, "v2", WIDTH, HIDDEN, feature, 0)
        stored |= {f"_feature_projections.{teacher}.{name}": value for name, value in feature_head.items()}
    command("convert", write_pth(folder / "c-radio_v3-h.pth.tar", args, stored), folder / "student")
    return folder, plain, heads, clip, siglip


def text_vectors(world, adaptor, texts):
    _, _, _, clip, siglip = world
    if adaptor == "siglip2-g":
        return siglip_embeddings(siglip, [text.replace(".", "") for text in texts])
    with torch.no_grad():
        return clip.encode_text(open_clip.get_tokenizer("ViT-Tiny-of-this-test")(texts))


def tokens_of(world, pixels):
    """The reference's tokens for images of the preferred resolution: (CLS token of each teacher, patches)."""
    tokens = reference.vit(world[1], pixels, 16, HEADS)
    num_prefix = len(world[1]["patch_generator.cls_token.token"])
    return tokens[:, :num_prefix], tokens[:, num_prefix:]


def as_pixels(image, side=16 * SIDE):
    image = ImageOps.fit(Image.fromarray(image), (side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("adaptor", ["clip", "siglip2-g"])
def test_zero_shot_with_the_tower_that_the_adaptor_names(world, adaptor, tmp_path, monkeypatch):
    monkeypatch.chdir(world[0])
    words = f"classes=[{','.join(NAMES)}]", f"templates={json.dumps(TEMPLATES)}"
    chosen = [] if adaptor == "clip" else [f"adaptor={adaptor}"]  # clip is what is asked where it is there
    output = command("eval", "zero-shot", "--model", "student", "--data", "pictures", "--output", tmp_path, *words,
                     *chosen, "num_workers=1")  # fmt: skip
    result = json.loads((tmp_path / "student" / "zero-shot.pictures.json").read_text())
    classes = []
    for name in NAMES:
        vectors = F.normalize(text_vectors(world, adaptor, [one.format(name) for one in TEMPLATES]), dim=-1)
        classes.append(F.normalize(vectors.mean(0), dim=0))
    classifier, index = torch.stack(classes), list(WIDTHS).index(adaptor)
    correct = 0
    for image, label in PICTURES:
        prefix, _ = tokens_of(world, as_pixels(image))
        found = reference.head(world[2][adaptor], prefix[:, index]) @ classifier.T
        correct += int(found.argmax()) == sorted(CLASSES).index(CLASSES[label])
    assert result["metrics"]["Zero-shot"] == pytest.approx(100 * correct / len(PICTURES))
    assert 0 < correct < len(PICTURES) and f"{100 * correct / len(PICTURES):.2f}" in output
    tower = f"open_clip:ViT-Tiny-of-this-test:{world[0] / 'clip'}" if adaptor == "clip" else f"transformers:{SIGLIP}"
    assert result["settings"]["text"].startswith(tower)


@pytest.mark.parametrize("adaptor", ["clip", "siglip2-g"])
def test_heat_maps_of_texts(world, adaptor, tmp_path, monkeypatch):
    monkeypatch.chdir(world[0])
    seen, draw = [], visualize_run.heat_map_figure
    monkeypatch.setattr(
        visualize_run, "heat_map_figure", lambda images, found, *rest: seen.append(found) or draw(images, found, *rest)
    )
    image = next((world[0] / "pictures" / "validation").rglob("*.png"))
    prompts = ["a photo of a cat", "a ring"]
    command("visualize", "heat-map", "--model", "student", "--data", image, "--output", tmp_path,
            f"prompts={json.dumps(prompts)}", f"adaptor={adaptor}")  # fmt: skip
    _, patches = tokens_of(world, as_pixels(np.array(Image.open(image))))
    patches = F.normalize(reference.head(world[2][adaptor], patches), dim=-1)
    expected = patches @ F.normalize(text_vectors(world, adaptor, prompts), dim=-1).T  # (1, h*w, prompts)
    torch.testing.assert_close(seen[0], expected.mT.unflatten(2, (SIDE, SIDE)), atol=2e-5, rtol=1e-3)
    assert Image.open(tmp_path / "heat-map.student.png").width > 300


def test_all_pictures(world, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(world[0])
    output = command("visualize", "all", "--model", "student", "--data", "pictures", "--output", tmp_path, "images=2",
                     "boxes=[[2,2,20,20]]", 'prompts=["a ring"]')  # fmt: skip
    names = ["features", "attention.student", "positions", "heat-map.student", "masks"]
    assert [Path(line).name for line in output.split()] == [f"{name}.png" for name in names]
    assert "left out" not in caplog.text


def test_open_clips_copy_of_a_tower_of_transformers(world, monkeypatch):
    """siglip2-g names a tower of transformers; open_clip has the same weights under its own name."""
    asked = []

    def load(checkpoint):
        asked.append(checkpoint)
        model = open_clip.create_model("ViT-Tiny-of-this-test")
        return model, {"embed_dim": 16}

    for twin in open_clip_swap._TWINS.values():
        _, name, tag = twin.split(":")
        assert (name, tag) in open_clip.list_pretrained()
    assert open_clip.get_model_config("ViT-gopt-16-SigLIP2-384")["embed_dim"] == 1536
    monkeypatch.setattr(open_clip_swap, "load_open_clip", load)
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda name, **options: name)
    model, _, tokenizer = as_open_clip(str(world[0] / "student"), adaptor="siglip2-g")
    assert asked == ["ViT-gopt-16-SigLIP2-384:webli"] and tokenizer == "ViT-gopt-16-SigLIP2-384"
    assert model.encode_image(torch.rand(1, 3, 96, 96)).shape == (1, 16)

"""A user's path: every task of `eval` by its shipped recipe, on sets laid out as the real ones are; then a report."""

import re
from importlib import resources

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from typer.testing import CliRunner

from helpers.coco_files import Dataset
from helpers.paths import ROOT
from helpers.tiny_llava import make_world, save_language_model, settings
from helpers.tiny_sam import WIDTH
from transformers_radio.cli import app
from transformers_radio.evaluation.classification.zero_shot import openai_imagenet_templates, zero_shot_classifier
from transformers_radio.evaluation.models.text import load_text_tower
from transformers_radio.evaluation.report.table import Table
from transformers_radio.evaluation.result import Result
from transformers_radio.modeling import RadioConfig, RadioModel
from transformers_radio.quickstart.scenes import CLASS_NAMES

torch.set_num_threads(1)
CLIP = str(resources.files("transformers_radio") / "quickstart" / "teachers" / "clip")
RECIPES = ROOT / "recipes" / "evaluation"
SYNSETS = 1000
SIDE = 32


@pytest.fixture(scope="module")
def student(tmp_path_factory, sam_file):
    """A student of CLIP and SAM."""
    torch.manual_seed(1)
    adaptors = {
        "clip": {"summary_dim": 128, "feature_dim": 192, "teacher": f"open_clip:{CLIP}"},
        "sam": {"summary_dim": None, "feature_dim": WIDTH, "teacher": f"segment_anything:{sam_file}"},
    }
    config = RadioConfig(
        **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2.0},
        **{"patch_size": 8, "max_img_size": 64, "preferred_resolution": SIDE, "num_registers": 1},
        adaptors={name: {"hidden_dim": 24, "summary_token": 0, **entry} for name, entry in adaptors.items()},
    )
    model = RadioModel(config).eval()
    with torch.no_grad():
        model.embeddings.patch_projection.weight.mul_(5)  # untrained, but images are told apart
        for parameter in model.adaptors.parameters():
            if parameter.ndim > 1:
                parameter.mul_(20)
    folder = tmp_path_factory.mktemp("models") / "mine" / "student"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """A folder a synset, as ILSVRC unpacks; both splits show the same pictures, one a class."""
    root = tmp_path_factory.mktemp("data") / "imagenet"
    coarse = np.random.default_rng(0).integers(0, 256, (SYNSETS, 3, 3, 3), dtype=np.uint8)
    for number, pixels in enumerate(coarse):
        image = Image.fromarray(pixels).resize((40, SIDE), Image.Resampling.BICUBIC)
        for split in ("train", "val"):
            folder = root / split / f"n{1440764 + number:08d}"
            folder.mkdir(parents=True)
            image.save(folder / f"ILSVRC2012_{split}_{number:08d}.JPEG", quality=95)
    return root


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


def evaluate(out, task, student, *arguments) -> Result:
    """`transformers-radio eval TASK`: what it wrote, which it must have printed too."""
    known = set(out.rglob("*.json"))
    model = ["--model", f"mine={student}"]
    run = CliRunner().invoke(app, ["eval", task, *map(str, arguments), *model, "--output", str(out)])
    assert run.exit_code == 0, run.output
    (path,) = [path for path in set(out.rglob("*.json")) - known if path.parent == out / "mine"]
    result = Result.read(path)
    for name, value in result.metrics.items():
        assert f"{name} {value:.2f}" in run.output
    assert result.protocol in re.sub(r"\s+", " ", run.output) and result.settings["weights"]
    return result


def test_knn(out, student, imagenet):
    recipe = ["--recipe", RECIPES / "imagenet1k.yaml", "--data", imagenet]
    result = evaluate(out, "knn", student, *recipe)
    assert result.metrics == {"k-NN": 100.0}  # each query is in the bank, alone in its class
    assert result.counts["bank_images"] == result.counts["query_images"] == result.counts["classes"] == SYNSETS


def test_zero_shot(out, student, imagenet):
    recipe = ["--recipe", RECIPES / "imagenet1k.yaml", "--data", imagenet]
    result = evaluate(out, "zero-shot", student, *recipe, 'templates=["a {}"]')
    assert result.counts["classes"] == result.counts["images"] == SYNSETS
    assert result.metrics["Zero-shot"] < 2  # chance is 0.1: nothing was learned


def test_ade20k(out, student, tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("training", 6), ("validation", 3)):
        for number in range(count):
            mask = rng.integers(0, 151, (6, 8), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
            name = f"ADE_{'train' if split == 'training' else 'val'}_{number:08d}"
            for kind, pixels, suffix in (
                ("images", rng.integers(0, 256, (48, 64, 3), dtype=np.uint8), "jpg"),
                ("annotations", mask, "png"),
            ):
                (tmp_path / kind / split).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(tmp_path / kind / split / f"{name}.{suffix}")
    little = [f"probe.{key}={value}" for key, value in small_probe(iterations=3, warmup_iterations=1).items()]
    recipe = ["--recipe", RECIPES / "ade20k.yaml", "--data", tmp_path]
    result = evaluate(out, "segmentation", student, *recipe, *little)
    assert result.counts["train_images"] == 6 and result.counts["validation_images"] == 3
    assert result.counts["pixels"] + result.counts["pixels_left_out"] == 3 * 48 * 64


def small_probe(**changes):
    sizes = {"short_side": SIDE, "long_side": 128, "crop_size": SIDE, "stride": 16, "size_divisor": 8}
    return {**sizes, "num_workers": 0, "batch_size": 2, **changes}


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    """Palette masks, lists of names, and 255 between the objects."""
    root = tmp_path_factory.mktemp("data") / "VOC2012"
    rng = np.random.default_rng(1)
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for number in range(3):
        mask = rng.integers(0, 21, (4, 4), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
        mask[:, 15:17] = 255
        palette = Image.fromarray(mask, "P")
        palette.putpalette(rng.integers(0, 256, 768, dtype=np.uint8).tobytes())
        palette.save(root / "SegmentationClass" / f"2007_{number:06d}.png")
        image = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(image).save(root / "JPEGImages" / f"2007_{number:06d}.jpg")
    for split, numbers in (("train", (0,)), ("val", (1, 2))):
        text = "".join(f"2007_{number:06d}\n" for number in numbers)
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(text)
    return root


@pytest.mark.parametrize("method", ["summary_head", "projection"])
def test_voc_by_words(out, student, voc, method):
    little = [f"probe.{key}={value}" for key, value in small_probe().items()]
    # Words that the tiny text tower tells apart: it knows none of VOC's, so that all classes would tie.
    names = f"data.classes=[{','.join(CLASS_NAMES[:21])}]"
    recipe = ["--recipe", RECIPES / "voc2012.yaml", "--data", voc, f"method={method}", names]
    result = evaluate(out, "segmentation", student, *recipe, *little)

    # Written out: an image is one window, so its patches' cosines are resized to its pixels once.
    model = RadioModel.from_pretrained(student).eval()
    tower = load_text_tower(f"open_clip:{CLIP}")
    words = zero_shot_classifier(tower, result.settings["classes"], openai_imagenet_templates())
    visual = open_clip.create_model("local-dir:" + CLIP).eval().visual
    right = counted = 0
    for number in (1, 2):
        pixels = np.array(Image.open(voc / "JPEGImages" / f"2007_{number:06d}.jpg"))
        mask = np.array(Image.open(voc / "SegmentationClass" / f"2007_{number:06d}.png"))
        with torch.no_grad():
            output = model(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)
            if method == "summary_head":
                patches = model.adaptors["clip"].summary_head(output.features)
            else:
                patches = visual.ln_post(output.adaptors["clip"].features) @ visual.proj
        cosines = F.normalize(patches, dim=-1) @ words.T  # (1, 16, K)
        cosines = F.interpolate(cosines.mT.unflatten(2, (4, 4)), (SIDE, SIDE), mode="bilinear")
        right += int((cosines[0].argmax(0).numpy() == mask)[mask != 255].sum())
        counted += int((mask != 255).sum())
    assert result.counts["pixels"] == counted == 2 * SIDE * (SIDE - 2) and result.counts["pixels_left_out"] > 0
    assert result.metrics["aAcc"] == pytest.approx(100 * right / counted, abs=0.06)  # of 1,920 pixels
    assert method in result.protocol and f"open_clip:{CLIP}" in result.protocol


def test_sam_coco(out, student, sam_file, tmp_path):
    Dataset(tmp_path)
    recipe = ["--recipe", RECIPES / "coco2017.yaml", "--data", tmp_path]
    result = evaluate(out, "sam-coco", student, *recipe, f"sam={sam_file}", "image_size=64")
    # 3 of the 15 are crowd regions, which the paper's harness scores too
    assert result.counts["annotations"] == 15 and 0 < result.metrics["SAM COCO"] < 100


def test_llava(out, student, tmp_path):
    world = make_world(tmp_path / "world", images=12, questions=3)
    language_model = save_language_model(tmp_path / "language_model")
    little = {"hardware.per_device_batch_size": 4, "pretrain.batch_size": 4, "finetune.batch_size": 4}
    lmms = {"lmms_eval_tasks": "[]", "name": "LLaVA-1.5"}
    arguments = settings(world, language_model, **little, **lmms)
    result = evaluate(out, "llava", student, "--recipe", RECIPES / "llava.yaml", *arguments)
    assert result.counts["finetune examples"] == 12 and result.counts["made questions"] == 6


def test_throughput(out, student):
    result = evaluate(out, "throughput", student, "image_size=32", "batch_sizes=[1,2]", "repeats=2", "warmup=1")
    assert result.metrics["Throughput"] > 0 and "ms, batch 1" in result.metrics


def test_resolution(out, student, imagenet):
    little = ["bank_images=50", "images=20", "feature_images=4", "sizes=[32,48,[32,64]]"]
    words = ["classes=openai_imagenet", 'templates=["a {}"]']
    result = evaluate(out, "resolution", student, "--data", imagenet, *little, *words)
    assert {"k-NN @ 32", "Zero-shot @ 48", "Feature cosine @ 32x64"} <= set(result.metrics)
    assert (out / "resolution.imagenet.png").exists()


def test_features(out, student, imagenet):
    result = evaluate(out, "features", student, "--data", imagenet, "images=4")
    assert result.counts["images"] == 4


def test_the_report_has_all_of_them(out):
    if len(list((out / "mine").glob("*.json"))) < 10:
        pytest.skip("the tests before this one make its results")
    run = CliRunner().invoke(app, ["report", str(out)])
    assert run.exit_code == 0, run.output
    (row,) = Table.from_json((out / "report.json").read_text()).rows
    columns = {"Zero-shot", "k-NN", "ADE20K", "PASCAL VOC 2012 (summary_head)", "PASCAL VOC 2012 (projection)"}
    assert columns <= set(row.metrics) and {"made", "SAM COCO"} <= set(row.metrics)
    assert row.throughput and (out / "report.md").exists()

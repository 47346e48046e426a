"""The files that the pages of the documentation name, all of them small."""

import shutil
from pathlib import Path

import numpy as np
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from helpers import nvidia_files
from helpers.paths import ROOT
from helpers.small_students import ERADIO
from helpers.tiny_llava import save_language_model
from transformers_radio import ERadioConfig, ERadioModel, RadioConfig, RadioImageProcessor, RadioModel
from transformers_radio.hub.folder import convert

# Of the quickstart's teachers: their text tower and SAM's decoder work with these heads.
ADAPTORS = {
    "clip": {
        "summary_dim": 128,
        "feature_dim": 192,
        "hidden_dim": 16,
        "teacher": "open_clip:package:quickstart/teachers/clip",
    },
    "sam": {
        "summary_dim": None,
        "feature_dim": 160,
        "hidden_dim": 16,
        "teacher": "segment_anything:package:quickstart/teachers/sam/sam.pth",
    },
}
PROBE = {
    **{"iterations": 2, "batch_size": 2, "num_workers": 0, "mixed_precision": "no", "photometric_distortion": False},
    **{"short_side": 32, "long_side": 64, "crop_size": 32, "stride": 16},
}


def make_world(folder: Path) -> Path:
    """Everything below `folder`, which is to be the current one when the pages run."""
    rng = np.random.default_rng(0)
    write_images(folder, rng)
    write_segmentation(folder, rng)
    for name, depth in (("runs/mine", 12), ("runs/quickstart/run-vit", 2)):
        save_student(folder / name / "student", depth)
    save_eradio(folder / "runs/quickstart/run/student")
    save_file(timm.create_model("convnext_atto").state_dict(), folder / "weights.safetensors")
    torch.save(torch.nn.Conv2d(3, 6, 8, stride=8).state_dict(), folder / "weights.pt")
    save_language_model(folder / "lmsys/vicuna-7b-v1.5")
    release = "radio_v2.5-h"
    args, state, *_ = nvidia_files.make(release)
    nvidia_files.write_pth(folder / f"{release}.pth.tar", args, state)
    convert(str(folder / f"{release}.pth.tar"), folder / "radio-v2.5-h")
    return folder


def save_student(folder: Path, depth: int) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "mlp_ratio": 2.0, "max_img_size": 256}
    config = RadioConfig(**sizes, num_hidden_layers=depth, preferred_resolution=64, adaptors=ADAPTORS)
    RadioModel(config).save_pretrained(folder)
    RadioImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def save_eradio(folder: Path, side: int = 64) -> Path:
    torch.manual_seed(0)
    student = ERadioModel(ERadioConfig(**ERADIO, adaptors=ADAPTORS, preferred_resolution=side))
    student.save_pretrained(folder)
    size = {"height": side, "width": side}
    RadioImageProcessor(size=size, size_divisor=student.min_resolution_step).save_pretrained(folder)
    return folder


def write_images(folder: Path, rng) -> None:
    """photo.jpg, a folder of photos, and a labeled set."""
    names = [Path("photo.jpg"), *(Path("photos") / f"{number}.jpg" for number in range(40))]
    names += [
        Path("my-dataset") / split / name / f"{number}.jpg"
        for split, count in (("train", 24), ("validation", 2))
        for name in ("cat", "dog")
        for number in range(count)
    ]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize((80, 60), Image.Resampling.BICUBIC).save(folder / name)


def write_segmentation(folder: Path, rng) -> None:
    """A set with ADE20K's folders and three of its classes, and the recipes with a probe of two iterations for it."""
    for split, count in (("training", 4), ("validation", 2)):
        for number in range(count):
            mask = rng.integers(0, 4, (3, 4), dtype=np.uint8).repeat(16, axis=0).repeat(16, axis=1)  # (48, 64)
            image = np.repeat(60 * mask[..., None], 3, axis=2)
            for kind, pixels, ending in (("images", image, "jpg"), ("annotations", mask, "png")):
                path = folder / "data/ADEChallengeData2016" / kind / split / f"{number}.{ending}"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    path = folder / "recipes/evaluation/ade20k.yaml"
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe["data"]["classes"] = recipe["data"]["classes"][:3]
    recipe["probe"] = PROBE
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")

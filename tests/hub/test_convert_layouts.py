"""Every layout of NVIDIA's releases, with random weights, against the plain reference and transformers' own class."""

import pytest
import torch
import transformers

from helpers import nvidia_reference as reference
from helpers.nvidia_files import DEPTH, HEADS, LAYOUTS, WIDTH, folded, make, reparametrize, write_hub, write_pth
from helpers.reloaded import assert_same_but_for_rounding, assert_same_weights
from transformers_radio import RadioModel
from transformers_radio.hub.convert import load_nvidia_checkpoint

TOLERANCE = dict(atol=2e-5, rtol=2e-5)
GLOBAL_BLOCKS = {"radio_v2": {"window_num_windowed": 5}, "radio_v2.1": {"window_num_windowed": 5}}
GLOBAL_BLOCKS |= {name: {"window_num_global": 8} for name in ("radio_v2.5-g", "c-radio_v2-g", "c-radio_v2-vlm-h")}


def write(tmp_path, name, form):
    """The checkpoint in one form, and the plain state, heads and normalizers that it holds."""
    layout = LAYOUTS[name]
    args, stored, plain, heads, normalizers = make(name, form)
    if form == "hub":
        config = {"feature_normalizer_config": {"embed_dim": WIDTH} if "feature" in normalizers else None}
        return write_hub(tmp_path / name, args, stored, name, **config), plain, heads, normalizers
    if layout.get("spectral"):
        stored = reparametrize(stored, layout["spectral"])
        prefix = "base_model." + ("inner." if layout.get("inner_prefix") else "")
        computed = {key.removeprefix(prefix): value for key, value in folded(stored).items()}
        plain = {key: computed.get(key, value) for key, value in plain.items()}
    if layout.get("ema"):
        # the trained weights beside the average are others, and must not be read
        path = write_pth(
            tmp_path / f"{name}.pth.tar",
            args,
            {key: value + 1 for key, value in stored.items()},
            ema=stored,
            dtype=torch.bfloat16 if layout.get("bf16") else None,
        )
    else:
        path = write_pth(tmp_path / f"{name}.pth.tar", args, stored)
    return path, plain, heads, normalizers


def expected(name, plain, heads, normalizers, images):
    layout = LAYOUTS[name]
    tokens = reference.vit(plain, images, layout.get("patch", 16), HEADS)
    num_prefix = len(plain["patch_generator.cls_token.token"])
    prefix, features = tokens[:, :num_prefix], tokens[:, num_prefix:]
    if "feature" in normalizers:
        features = (features - normalizers["feature"]["mean"]) @ normalizers["feature"]["tx"].T
    used = [index for index, teacher in enumerate(layout["teachers"]) if teacher.get("use_summary", True)]
    found = {"summary": prefix[:, [0] if layout.get("shared") else used].flatten(1), "features": features}
    for index, (teacher, (summary, feature)) in enumerate(heads.items()):
        if index in used:
            found[f"{teacher}.summary"] = reference.head(summary, prefix[:, 0 if layout.get("shared") else index])
        dense, u = reference.head(feature, features), layout.get("upsample", 1)
        side = round(features.shape[1] ** 0.5)
        finer = torch.empty(len(images), side * u, side * u, dense.shape[-1] // u**2)
        for row in range(u):
            for col in range(u):
                part = dense.unflatten(-1, (u, u, -1))[:, :, row, col]
                finer[:, row::u, col::u] = part.unflatten(1, (side, side))
        found[f"{teacher}.features"] = finer.flatten(1, 2)
    return found


@torch.no_grad()
def outputs(model, images):
    out = model(images.to(model.dtype))
    found = {"summary": out.summary, "features": out.features}
    for name, head in out.adaptors.items():
        found |= {f"{name}.{key}": value for key, value in head.items() if key != "grid"}
    return found


@pytest.mark.parametrize("form", ["pth", "hub"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_computes_what_its_tensors_say(tmp_path, name, form):
    path, plain, heads, normalizers = write(tmp_path, name, form)
    model = load_nvidia_checkpoint(path)
    assert isinstance(model, RadioModel) and not model.training
    is_bf16 = LAYOUTS[name].get("bf16") and form == "pth"
    assert model.dtype == (torch.bfloat16 if is_bf16 else torch.float32)
    model = model.float()
    if is_bf16:
        plain = {key: value.bfloat16().float() for key, value in plain.items()}
        heads = {key: [{k: v.bfloat16().float() for k, v in one.items()} for one in two] for key, two in heads.items()}
    side = 5 * LAYOUTS[name].get("patch", 16)
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(3))
    found, wanted = outputs(model, images), expected(name, plain, heads, normalizers, images)
    assert set(found) == set(wanted)
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], **TOLERANCE, msg=lambda text, key=key: f"{key}: {text}")
    fields = {"window_num_global": 4, "window_num_windowed": None, **GLOBAL_BLOCKS.get(name, {})}
    assert {key: getattr(model.config, key) for key in fields} == fields
    assert model.config.converted_from["version"].startswith(name.rpartition("-norm")[0] or name)
    assert ("Open Model" in model.config.converted_from["license"]) == name.startswith("c-radio")


@pytest.mark.parametrize("name", ["radio_v2.5-b", "c-radio_v2-g", "c-radio_v4-h", "c-radio_v4-so400m", "radio_v2.5-h"])
def test_plain_layouts_equal_transformers_own_class(tmp_path, name):
    """FACTS of the field: native is exact for these once its config is mapped; here it reads the converted folder."""
    model = load_nvidia_checkpoint(write(tmp_path, name, "hub")[0], adaptor_names=[])
    model.save_pretrained(tmp_path / "converted")
    native = transformers.AutoModel.from_pretrained(tmp_path / "converted").eval()
    assert type(native) is transformers.RadioModel
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        ours, theirs = model(images), native(images)
    torch.testing.assert_close(ours.summary, theirs.summary, atol=0, rtol=0)
    torch.testing.assert_close(ours.features, theirs.features, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["radio_v2.5-g", "radio_v2.5-h-norm", "c-radio_v1", "c-radio_v2-vlm-h"])
def test_what_native_would_misread_it_refuses(tmp_path, name):
    path, *_ = write(tmp_path, name, "hub")
    model = load_nvidia_checkpoint(path)
    model.save_pretrained(tmp_path / "converted")
    with pytest.raises(Exception, match="cannot read this checkpoint"):
        transformers.AutoModel.from_pretrained(tmp_path / "converted")
    again = RadioModel.from_pretrained(tmp_path / "converted").eval()
    assert again.config.use_swiglu_ffn == (name == "radio_v2.5-g")
    side = 3 * model.patch_size
    images = torch.rand(1, 3, side, side)
    assert_same_weights(again, model)
    for key, value in outputs(model, images).items():
        assert_same_but_for_rounding(outputs(again, images)[key], value)


@pytest.mark.parametrize("name", ["radio_v2.5-h-norm", "c-radio_v3-h"])
def test_intermediate_normalizers_are_kept(tmp_path, name):
    path, _, _, normalizers = write(tmp_path, name, "pth")
    normalizer = load_nvidia_checkpoint(path).intermediate_normalizer
    inter = normalizers["inter"]
    tokens = torch.rand(2, 9, WIDTH)
    for block in range(DEPTH):
        rotation = inter["rotation"] if inter["rotation"].ndim == 2 else inter["rotation"][block]
        wanted = torch.stack(
            [inter["alphas"][block] * (rotation @ (token - inter["means"][block])) for token in tokens.flatten(0, 1)]
        )
        torch.testing.assert_close(normalizer(tokens, block).flatten(0, 1), wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="block is 4, expected an integer from 0 to 3"):
        normalizer(tokens, DEPTH)

"""SAM teachers against segment_anything's own encoder, from its own .pth files."""

import huggingface_hub
import numpy as np
import pytest
import segment_anything
import torch
from torch import nn
from torch.nn import functional as F

from helpers.tiny_segment_anything import tiny_sam
from transformers_radio.teachers import build_teacher, load_sam


@pytest.fixture
def make_file(tmp_path, randomize):
    """Random weights of a tiny SAM in a .pth file; returns (path, the SAM that was saved)."""

    def make(**kwargs):
        original = randomize(tiny_sam(**kwargs))
        torch.save(original.state_dict(), tmp_path / "sam.pth")
        return str(tmp_path / "sam.pth"), original

    return make


def encoder_outputs(sam, batch):
    """(before the neck, after it), each (B, h*w, C): SAM's preprocessing in 0..255, and a hook on its last block."""
    caught = []
    handle = sam.image_encoder.blocks[-1].register_forward_hook(lambda *a: caught.append(a[2]))
    neck = sam.image_encoder(torch.stack([sam.preprocess(image * 255) for image in batch]))
    handle.remove()
    return caught[0].flatten(1, 2), neck.flatten(2).transpose(1, 2)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"window_size": 5, "global_blocks": (0, 2), "heads": 6},
        {"window_size": 14},
        {"window_size": 8, "heads": 3},
        {"global_blocks": (0, 1, 2, 3)},
    ],
    ids=["windows pad", "other blocks", "window above grid", "window equals grid", "all global"],
)
def test_trunk_and_neck(make_file, images, assert_contract, shape):
    path, original = make_file(**shape)
    with torch.no_grad():
        trunk, neck = encoder_outputs(original, images(64))
    for features, expected, dim in (("trunk", trunk, 48), ("neck", neck, 32)):
        teacher = build_teacher("segment_anything", path, features=features)
        assert (teacher.summary_dim, teacher.feature_dim) == (None, dim)
        assert (teacher.image_size, teacher.patch_size) == (64, 8)
        output = assert_contract(teacher)
        assert output.grid == (8, 8)
        torch.testing.assert_close(output.features, expected)


def test_trunk_is_the_default(make_file):
    assert build_teacher("segment_anything", make_file()[0]).feature_dim == 48


@torch.no_grad()
def test_load_sam_predicts_the_same_masks(make_file):
    """The whole model, through the original predictor: masks, IoU scores and low-resolution logits."""
    path, original = make_file()
    loaded = load_sam(path)
    assert not loaded.training
    results = []
    for sam in (original, loaded):
        predictor = segment_anything.SamPredictor(sam)
        predictor.set_image(np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8))
        results.append(predictor.predict(box=np.array([4, 6, 30, 33]), multimask_output=True, return_logits=True))
    for expected, actual in zip(*results, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "width", "depth", "heads", "global_blocks"),
    [
        (segment_anything.build_sam_vit_b, 768, 12, 12, [2, 5, 8, 11]),
        (segment_anything.build_sam_vit_l, 1024, 24, 16, [5, 11, 17, 23]),
        (segment_anything.build_sam_vit_h, 1280, 32, 16, [7, 15, 23, 31]),
    ],
    ids=["vit_b", "vit_l", "vit_h"],
)
def test_released_sizes_are_read_off_their_shapes(monkeypatch, build, width, depth, heads, global_blocks):
    """The three released architectures, built without weights by segment_anything itself (meta device)."""
    from transformers_radio.teachers import segment_anything as module

    with torch.device("meta"):
        original = build()
    monkeypatch.setattr(module, "load_weights", lambda path: original.state_dict())
    sam = load_sam("sam.pth")
    encoder = sam.image_encoder
    assert encoder.img_size == 1024
    assert len(encoder.blocks) == depth
    assert [i for i, block in enumerate(encoder.blocks) if block.window_size == 0] == global_blocks
    assert {block.window_size for block in encoder.blocks} == {0, 14}
    assert {block.attn.num_heads for block in encoder.blocks} == {heads}
    assert str(sam) == str(original)  # every layer, width, epsilon and activation
    for features, dim in (("trunk", width), ("neck", 256)):
        teacher = build_teacher("segment_anything", "sam.pth", features=features)
        assert (teacher.summary_dim, teacher.feature_dim) == (None, dim)
        output = teacher.encode(torch.empty(1, 3, 1024, 1024, device="meta"))
        assert output.grid == (64, 64) and output.features.shape == (1, 64 * 64, dim)


def test_another_size(make_file, images, assert_contract):
    """The rule in the docs (bicubic position table, linear relative positions), in SAM's encoder of the new size."""
    path, original = make_file()
    weights = original.state_dict()
    for name, tensor in weights.items():
        if name == "image_encoder.pos_embed":  # (1, 8, 8, C) -> (1, 12, 12, C)
            table = F.interpolate(tensor.permute(0, 3, 1, 2), size=(12, 12), mode="bicubic")
            weights[name] = table.permute(0, 2, 3, 1)
        elif "rel_pos" in name and len(tensor) == 15:  # global block: (2*8-1, head dim) -> (2*12-1, head dim)
            weights[name] = F.interpolate(tensor.T[None], size=23, mode="linear")[0].T
    larger = tiny_sam(grid=12).eval()
    larger.load_state_dict(weights)
    with torch.no_grad():
        expected, _ = encoder_outputs(larger, images(96))
    teacher = build_teacher("segment_anything", path, image_size=96)
    assert teacher.image_size == 96
    output = assert_contract(teacher)
    assert output.grid == (12, 12)
    torch.testing.assert_close(output.features, expected)


def test_bfloat16(make_file, images):
    path, original = make_file()
    teacher = build_teacher("segment_anything", path, dtype="bfloat16")
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        expected, _ = encoder_outputs(original, images(64))
    features = teacher(images(64)).features
    assert features.dtype == torch.float32
    cosine = F.cosine_similarity(features.flatten(), expected.flatten(), dim=0)
    assert 0.995 < cosine < 0.999999  # close to the float32 original, and really computed in bfloat16


def test_hub_file(make_file, monkeypatch):
    path, _ = make_file()
    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file: asked.append((repo, file)) or path)
    assert build_teacher("segment_anything", "hf-hub:someone/sam/checkpoints/sam.pth").feature_dim == 48
    assert asked == [("someone/sam", "checkpoints/sam.pth")]
    with pytest.raises(ValueError, match="hf-hub:OWNER/NAME/FILE"):
        build_teacher("segment_anything", "hf-hub:someone/sam")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda weights: weights.pop("image_encoder.pos_embed"),
            "no original SAM checkpoint: .*image_encoder.pos_embed",
        ),
        (lambda weights: weights.pop("image_encoder.neck.1.bias"), "image_encoder.neck.1.bias"),
        (lambda weights: weights.update({"image_encoder.strange": torch.ones(1)}), "strange"),
        (
            lambda weights: weights.update({"image_encoder.blocks.0.attn.rel_pos_h": torch.ones(7, 12)}),
            r"window sizes \[3, 4\]",
        ),
    ],
    ids=["no SAM", "missing", "unexpected", "two windows"],
)
def test_weights_must_fit(make_file, edit, message):
    path, original = make_file()
    weights = original.state_dict()
    edit(weights)
    torch.save(weights, path)
    with pytest.raises(ValueError, match=message):
        build_teacher("segment_anything", path)


def hq_sam(weights):
    """HQ-SAM's decoder has these beside SAM's."""
    weights |= {"mask_decoder.hf_token.weight": torch.ones(1, 32), "mask_decoder.num_mask_tokens": torch.tensor(5)}
    return weights | {"mask_decoder.compress_vit_feat.0.weight": torch.ones(48, 32, 2, 2)}


@pytest.mark.parametrize(
    "change",
    [
        hq_sam,
        lambda weights: {name: tensor for name, tensor in weights.items() if name.startswith("image_encoder.")},
        lambda weights: {"model": {f"module.{name}": tensor for name, tensor in weights.items()}, "epoch": 3},
    ],
    ids=["HQ-SAM", "encoder alone", "trained on with DDP"],
)
def test_a_teacher_reads_the_image_encoder_and_nothing_else(make_file, images, change):
    path, original = make_file()
    with torch.no_grad():
        trunk, _ = encoder_outputs(original, images(64))
    torch.save(change(original.state_dict()), path)
    teacher = build_teacher("segment_anything", path)
    torch.testing.assert_close(teacher(images(64)).features, trunk)
    assert len(teacher.model.state_dict()) == len(original.image_encoder.state_dict())


def test_the_whole_sam_has_to_be_one(make_file):
    path, original = make_file()
    torch.save(hq_sam(original.state_dict()), path)
    with pytest.raises(ValueError, match=r"(?s)does not fit .*mask_decoder\.hf_token"):
        load_sam(path)


def test_wrong_arguments(make_file, tmp_path):
    path, _ = make_file()
    with pytest.raises(ValueError, match="image_size=70 .*patch size 8: use 72"):
        build_teacher("segment_anything", path, image_size=70)
    with pytest.raises(ValueError, match="features='head' is unknown"):
        build_teacher("segment_anything", path, features="head")
    with pytest.raises(ValueError, match="does not know 'feature': its options are features"):
        build_teacher("segment_anything", path, feature="neck")
    with pytest.raises(FileNotFoundError, match="absent.pth"):
        build_teacher("segment_anything", str(tmp_path / "absent.pth"))


def test_pickled_code_is_refused(tmp_path, malicious_file):
    proof = malicious_file(tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="evil.pth .*never loaded"):
        build_teacher("segment_anything", str(tmp_path / "evil.pth"))
    assert not proof.exists()


def test_torchscript_is_refused(tmp_path):
    torch.jit.script(nn.Linear(1, 1)).save(tmp_path / "script.pth")
    with pytest.raises(ValueError, match="never loaded"):
        build_teacher("segment_anything", str(tmp_path / "script.pth"))

"""Architectures without weights against published counts, closed forms and the classes that load weights."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from transformers_radio.teachers import build_teacher
from transformers_radio.teachers.known import KNOWN, is_on_disk, known_teacher

# The paper's teachers: its Table 1 (parameters in millions, resolution) and the widths of its targets.
PAPER = [
    ("open_clip", "ViT-H-14-378-quickgelu:dfn5b", 378, 633, (1024, 1280)),
    ("open_clip", "ViT-L-14-336:openai", 336, 305, (768, 1024)),
    ("transformers", "facebook/dinov2-with-registers-giant", 224, 1137, (1536, 1536)),
    ("segment_anything", "sam_vit_h_4b8939.pth", 1024, 637, (None, 1280)),
]


def millions(teacher):
    return sum(parameter.numel() for parameter in teacher.parameters()) / 1e6


def flops(teacher):
    pixels = torch.empty(1, 3, teacher.image_size, teacher.image_size, device="meta", dtype=teacher.dtype)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        output = teacher.encode(pixels)
    return counter.get_total_flops(), output


def vit_flops(grid, prefix, width, layers, mlp_flops, patch=14):
    """Of a plain ViT, two for each multiply-add: patches, and in a layer q, k, v, out, attention twice, MLP."""
    tokens = grid**2 + prefix
    layer = 2 * tokens * 4 * width**2 + 2 * 2 * tokens**2 * width + tokens * mlp_flops
    return 2 * grid**2 * 3 * patch**2 * width + layers * layer


@pytest.mark.parametrize(("kind", "checkpoint", "size", "count", "widths"), PAPER)
def test_the_papers_teachers_are_those_of_its_table_1(kind, checkpoint, size, count, widths):
    teacher = known_teacher(kind, checkpoint, image_size=size, dtype="bfloat16")
    assert {parameter.device.type for parameter in teacher.parameters()} == {"meta"}
    assert millions(teacher) == pytest.approx(count, abs=1)
    assert (teacher.summary_dim, teacher.feature_dim) == widths
    side = size // teacher.patch_size
    _, output = flops(teacher)
    assert output.grid == (side, side)
    assert output.features.shape == (1, side * side, widths[1])
    assert output.features.dtype == torch.bfloat16
    assert (output.summary is None) if widths[0] is None else (output.summary.shape == (1, widths[0]))


def test_flops_are_those_of_the_architectures():
    clip, _ = flops(known_teacher("open_clip", "ViT-H-14-378-quickgelu:dfn5b"))
    projection = 2 * 1280 * 1024
    assert clip == vit_flops(27, 1, 1280, 32, 2 * 2 * 1280 * 5120) + projection
    dinov2, _ = flops(known_teacher("transformers", "facebook/dinov2-with-registers-giant", image_size=224))
    # SwiGLU: one product to twice 4096 channels, one back
    assert dinov2 == vit_flops(16, 5, 1536, 40, 2 * 3 * 1536 * 4096)
    sam, _ = flops(known_teacher("segment_anything", "sam_vit_h_4b8939.pth"))
    assert sam == pytest.approx(2 * 2976e9, rel=0.01)  # multiply-adds as published for ViT-H at 1024 pixels


@pytest.mark.parametrize(
    ("kind", "checkpoint", "count"),
    [  # of the vision towers, as their authors publish them
        ("open_clip", "ViT-SO400M-14-SigLIP-384:webli", 428),
        ("transformers", "openai/clip-vit-large-patch14-336", 304.3),
        ("transformers", "facebook/dinov2-large", 304.4),
        ("transformers", "facebook/dinov3-vith16plus-pretrain-lvd1689m", 840.6),
        ("transformers", "facebook/dinov3-vit7b16-pretrain-lvd1689m", 6716),
        ("transformers", "google/siglip2-so400m-patch16-384", 428),
        ("transformers", "nvidia/C-RADIOv4-H", 651.7),
        ("segment_anything", "/somewhere/sam_vit_b_01ec64.pth", 89.7),
    ],
)
def test_other_teachers_have_their_published_sizes(kind, checkpoint, count):
    assert millions(known_teacher(kind, checkpoint)) == pytest.approx(count, rel=1e-3)


def test_every_entry_can_be_built():
    for kind, checkpoints in KNOWN.items():
        for checkpoint in checkpoints:
            teacher = known_teacher(kind, checkpoint, dtype="bfloat16")
            assert teacher.image_size % teacher.patch_size == 0, checkpoint


def test_it_is_what_loading_the_weights_gives(tmp_path):
    """SAM ViT-B of a file with random weights, at another size and with its neck, against the one without."""
    sam = pytest.importorskip("segment_anything").sam_model_registry["vit_b"]()
    path = tmp_path / "sam_vit_b_01ec64.pth"
    assert not is_on_disk("segment_anything", str(path))
    torch.save(sam.state_dict(), path)
    assert is_on_disk("segment_anything", str(path))
    options = {"image_size": 256, "dtype": "bfloat16", "features": "neck"}
    loaded = build_teacher("segment_anything", str(path), **options)
    known = known_teacher("segment_anything", str(path), **options)
    shapes = {name: (value.shape, value.dtype) for name, value in loaded.state_dict().items()}
    assert shapes == {name: (value.shape, value.dtype) for name, value in known.state_dict().items()}
    for name in ("image_size", "patch_size", "summary_dim", "feature_dim", "features", "dtype"):
        assert getattr(loaded, name) == getattr(known, name)
    assert flops(loaded.to("meta"))[0] == flops(known)[0]


def test_what_is_not_known_says_what_to_do():
    with pytest.raises(ValueError, match="known of the type transformers: .*dinov2-giant.*Download it"):
        known_teacher("transformers", "somebody/unheard-of")
    with pytest.raises(ValueError, match="ViT-H-14-378-quickgelu:nonsense is not on the disk"):
        known_teacher("open_clip", "ViT-H-14-378-quickgelu:nonsense")
    with pytest.raises(ValueError, match="known of the type timm: none"):
        known_teacher("timm", "vit_base_patch16_224")
    with pytest.raises(ValueError, match="does not know 'adaptor'"):
        known_teacher("transformers", "facebook/dinov2-base", adaptor="clip")
    with pytest.raises(ValueError, match="use 224"):
        known_teacher("transformers", "facebook/dinov2-base", image_size=230)


def test_local_forms_are_recognized(tmp_path):
    weights = tmp_path / "weights.pt"
    weights.touch()
    assert is_on_disk("open_clip", f"ViT-B-32:{weights}")
    assert is_on_disk("open_clip", f"local-dir:{tmp_path}")
    assert is_on_disk("transformers", str(tmp_path))
    assert is_on_disk("python", "my_teachers:MyTeacher")
    assert not is_on_disk("open_clip", "ViT-B-32:openai")
    assert not is_on_disk("transformers", "facebook/dinov2-base")

"""OpenCLIP teachers against OpenCLIP's own forward, from OpenCLIP's own file formats."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

import transformers_radio
from transformers_radio.teachers import build_teacher, load_text_encoder, portable_checkpoint

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 2, "width": 48, "head_width": 16, "patch_size": 8}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "patch_size": None}
SIGLIP = {"timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none", "image_size": 160}
CONVNEXT = {"timm_model_name": "test_convnext", "timm_pool": "avg", "timm_proj": "linear", "image_size": 64}
PREPROCESS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}


@pytest.fixture
def make_folder(tmp_path, randomize):
    """Save a tiny OpenCLIP model as one of its local-dir folders; returns (folder, the model that was saved)."""

    def make(vision, weights="open_clip_model.safetensors", embed_dim=24, text=TEXT, custom_text=False, **model):
        model_cfg = {"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": text, **model}
        kind = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
        original = randomize(kind(**model_cfg))
        folder = tmp_path / "clip"
        folder.mkdir(exist_ok=True)
        config = {"model_cfg": model_cfg | {"custom_text": custom_text}, "preprocess_cfg": PREPROCESS}
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        state = {name: tensor.contiguous() for name, tensor in original.state_dict().items()}
        save_file(state, folder / weights) if weights.endswith(".safetensors") else torch.save(state, folder / weights)
        return folder, original

    return make


def normalized(batch):
    mean, std = (torch.tensor(PREPROCESS[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return (batch - mean) / std


def output_of(module, run):
    """What `module` returns while `run()` runs, caught by a hook."""
    caught = []
    handle = module.register_forward_hook(lambda *a: caught.append(a[2]))
    run()
    handle.remove()
    return caught[0]


@pytest.mark.parametrize("weights", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_vit(make_folder, images, assert_contract, weights, prefix):
    folder, original = make_folder(VIT, weights, quick_gelu=True)
    teacher = build_teacher("open_clip", f"{prefix}{folder}")
    assert (teacher.summary_dim, teacher.feature_dim, teacher.image_size, teacher.patch_size) == (24, 48, 32, 8)
    output = assert_contract(teacher)
    batch = normalized(images(32))
    with torch.no_grad():
        embedding = original.encode_image(batch)
        tokens = output_of(original.visual.transformer.resblocks[-1], lambda: original.visual(batch))
    assert output.grid == (4, 4)
    torch.testing.assert_close(output.summary, embedding)
    torch.testing.assert_close(output.features, tokens[:, 1:])  # before ln_post: the hook sits on the last block


def test_vit_drops_the_text_tower(make_folder):
    folder, original = make_folder(VIT)
    teacher = build_teacher("open_clip", str(folder))
    size = sum(parameter.numel() for parameter in teacher.parameters())
    assert size == sum(parameter.numel() for parameter in original.visual.parameters())


def test_vit_at_another_size(make_folder, images, assert_contract):
    """OpenCLIP's own `resize_pos_embed`, called on the saved weights for its own tower of the new size."""
    folder, original = make_folder(VIT)
    larger = open_clip.CLIP(embed_dim=24, vision_cfg={**VIT, "image_size": 48}, text_cfg=TEXT).eval()
    weights = original.state_dict()
    open_clip.model.resize_pos_embed(weights, larger)
    larger.load_state_dict(weights)
    batch = normalized(images(48))
    with torch.no_grad():
        embedding = larger.encode_image(batch)
        tokens = output_of(larger.visual.transformer.resblocks[-1], lambda: larger.visual(batch))
    teacher = build_teacher("open_clip", str(folder), image_size=48)
    assert teacher.image_size == 48
    output = assert_contract(teacher)
    assert output.grid == (6, 6)
    torch.testing.assert_close(output.summary, embedding)
    torch.testing.assert_close(output.features, tokens[:, 1:])


@pytest.mark.parametrize("side", [24, 48])
def test_a_file_in_half_precision_takes_another_size_too(make_folder, images, side):
    folder, original = make_folder(VIT)
    halved = {name: tensor.half() for name, tensor in original.state_dict().items()}
    save_file(halved, folder / "open_clip_model.safetensors")
    output = build_teacher("open_clip", str(folder), image_size=side)(images(side))
    save_file({name: tensor.float() for name, tensor in halved.items()}, folder / "open_clip_model.safetensors")
    whole, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}", force_image_size=side)
    with torch.no_grad():
        torch.testing.assert_close(output.summary, whole.eval().encode_image(normalized(images(side))))
    assert output.grid == (side // 8, side // 8)


def test_resnet(make_folder, images, assert_contract):
    folder, original = make_folder(RESNET)
    teacher = build_teacher("open_clip", str(folder))
    assert (teacher.summary_dim, teacher.feature_dim, teacher.image_size, teacher.patch_size) == (24, 256, 64, 32)
    output = assert_contract(teacher)
    batch = normalized(images(64))
    with torch.no_grad():
        embedding = original.encode_image(batch)
        feature_map = output_of(original.visual.layer4, lambda: original.visual(batch))
    assert output.grid == (2, 2)
    torch.testing.assert_close(output.summary, embedding)
    torch.testing.assert_close(output.features, feature_map.flatten(2).transpose(1, 2))
    with pytest.raises(ValueError, match="image_size=96 is impossible for the ResNet"):
        build_teacher("open_clip", str(folder), image_size=96)


def test_siglip_in_a_timm_tower(make_folder, images, assert_contract):
    folder, original = make_folder(SIGLIP, embed_dim=64, custom_text=True, init_logit_bias=-10)
    teacher = build_teacher("open_clip", str(folder))
    assert (teacher.summary_dim, teacher.feature_dim, teacher.image_size, teacher.patch_size) == (64, 64, 160, 16)
    output = assert_contract(teacher)
    batch = normalized(images(160))
    with torch.no_grad():
        embedding = original.encode_image(batch)
        tokens = output_of(original.visual.trunk.norm, lambda: original.visual(batch))
    prefix = original.visual.trunk.num_prefix_tokens
    assert output.grid == (10, 10)
    torch.testing.assert_close(output.summary, embedding)
    torch.testing.assert_close(output.features, tokens[:, prefix:])


def test_convnext_in_a_timm_tower(make_folder, images, assert_contract):
    folder, original = make_folder(CONVNEXT)
    teacher = build_teacher("open_clip", str(folder), image_size=96)
    output = assert_contract(teacher)
    batch = normalized(images(96))
    with torch.no_grad():
        embedding = original.encode_image(batch)
        feature_map = output_of(original.visual.trunk.stages, lambda: original.visual(batch))
    assert (teacher.summary_dim, teacher.image_size, teacher.patch_size, output.grid) == (24, 96, 32, (3, 3))
    torch.testing.assert_close(output.summary, embedding)
    torch.testing.assert_close(output.features, feature_map.flatten(2).transpose(1, 2))


def test_bfloat16(make_folder, images):
    folder, original = make_folder(VIT)
    teacher = build_teacher("open_clip", str(folder), dtype="bfloat16")
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        expected = original.bfloat16().encode_image(normalized(images(32)).bfloat16()).float()
    torch.testing.assert_close(teacher(images(32)).summary, expected, rtol=0, atol=0)


@pytest.fixture
def built_in_model(monkeypatch, make_folder):
    """A tiny architecture among OpenCLIP's built-in names, and a .pt file of weights for it (made with QuickGELU)."""
    folder, original = make_folder(VIT, "weights.pt", quick_gelu=True)
    config = {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TEXT}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", config)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-quickgelu", {**config, "quick_gelu": True})
    return folder / "weights.pt", original


def test_name_and_weights_file(built_in_model, images):
    """No tag: the name alone says which activation to use; mean and std are OpenCLIP's defaults."""
    path, original = built_in_model
    teacher = build_teacher("open_clip", f"tiny-quickgelu:{path}")
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD).view(1, 3, 1, 1)
    with torch.no_grad():
        expected = original.encode_image((images(32) - mean) / std)
    torch.testing.assert_close(teacher(images(32)).summary, expected)


def test_name_and_tag(built_in_model, monkeypatch, images):
    """A tag brings its normalization, and its QuickGELU even where the plain model name lacks it."""
    path, original = built_in_model
    tag = {"file": str(path), "quick_gelu": True, "mean": PREPROCESS["mean"], "std": PREPROCESS["std"]}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {"made": tag})
    teacher = build_teacher("open_clip", "tiny:made")
    with torch.no_grad():
        expected = original.encode_image(normalized(images(32)))
    torch.testing.assert_close(teacher(images(32)).summary, expected)


@torch.no_grad()
def test_text_encoder(make_folder):
    folder, original = make_folder(VIT)
    texts = ["a red cube", "a photo of a sphere.", "ünusual wörds"] * 100  # more than one batch
    encode = load_text_encoder("open_clip", str(folder))
    assert not hasattr(encode.model, "visual")
    embeddings = encode(texts)
    expected = original.encode_text(open_clip.get_tokenizer("ViT-B-32")(texts))
    assert embeddings.shape == (300, 24) and embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings, expected)
    for wrong in ("a red cube", []):
        with pytest.raises(ValueError, match="list of at least one string"):
            encode(wrong)


@torch.no_grad()
def test_text_encoder_with_the_folder_s_own_tokenizer(make_folder):
    """As SigLIP has it: a Hugging Face tokenizer in the folder, and a text tower of its own class."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    text = {**TEXT, "vocab_size": 5, "context_length": 4, "hf_tokenizer_name": "elsewhere"}
    folder, original = make_folder(SIGLIP, embed_dim=64, text=text, custom_text=True)
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "red": 2, "cube": 3, "sphere": 4}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    expected = original.encode_text(torch.tensor([[2, 3, 0, 0], [1, 4, 0, 0]]))
    torch.testing.assert_close(load_text_encoder("open_clip", str(folder))(["red cube", "blue sphere"]), expected)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda weights: weights.pop("visual.ln_post.bias"), "[Mm]issing key.*visual.ln_post.bias"),
        (lambda weights: weights.update(strange=torch.ones(1)), "[Uu]nexpected key.*strange"),
        (
            lambda weights: weights.update({"visual.ln_post.bias": torch.ones(5)}),
            "size mismatch for visual.ln_post.bias",
        ),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_weights_must_fit(make_folder, edit, message):
    folder, original = make_folder(VIT)
    weights = original.state_dict()
    edit(weights)
    save_file(weights, folder / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match=f"(?s)could not load .*{message}"):
        build_teacher("open_clip", str(folder))


@pytest.mark.parametrize("key", ["state_dict", "model", "teacher"])
def test_a_file_saved_by_ddp_while_training(make_folder, monkeypatch, images, tmp_path, key):
    folder, original = make_folder(VIT, "plain.pt")
    model_cfg = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", model_cfg)
    saved = {key: {f"module.{name}": tensor for name, tensor in original.state_dict().items()}, "epoch": 3}
    torch.save(saved, tmp_path / "epoch_3.pt")
    plain, wrapped = (
        build_teacher("open_clip", f"tiny:{path}") for path in (folder / "plain.pt", tmp_path / "epoch_3.pt")
    )
    assert torch.equal(wrapped(images(32)).summary, plain(images(32)).summary)


def test_what_a_student_says_of_its_teacher_can_be_opened():
    """As `evaluation` opens the text tower of a student's adaptor: the folder in the package, by its portable name."""
    folder = Path(transformers_radio.__file__).parent / "quickstart" / "teachers" / "clip"
    name = portable_checkpoint(str(folder))
    assert name == "package:quickstart/teachers/clip"
    assert torch.equal(
        load_text_encoder("open_clip", name)(["a cube"]), load_text_encoder("open_clip", str(folder))(["a cube"])
    )


def test_folder_without_weights(make_folder):
    folder, _ = make_folder(VIT)
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match="could not load .*weights"):
        build_teacher("open_clip", str(folder))


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("ViT-B-32", "neither a folder nor names its weights"),
        ("ViT-B-33:openai", "OpenCLIP knows no model 'ViT-B-33'"),
        ("ViT-B-32:nowhere", "nowhere"),
    ],
)
def test_wrong_checkpoint(checkpoint, message):
    with pytest.raises(ValueError, match=message):
        build_teacher("open_clip", checkpoint)


def test_wrong_arguments(make_folder):
    folder, _ = make_folder(VIT)
    with pytest.raises(ValueError, match="image_size=50 .*patch size 8: use 48"):
        build_teacher("open_clip", str(folder), image_size=50)
    with pytest.raises(ValueError, match=r"open_clip teacher does not know 'pretrained': its options are \(none\)"):
        build_teacher("open_clip", str(folder), pretrained="openai")


def test_pickled_code_is_refused(make_folder, malicious_file):
    folder, _ = make_folder(VIT)
    (folder / "open_clip_model.safetensors").unlink()
    proof = malicious_file(folder / "open_clip_pytorch_model.bin")
    with pytest.raises(ValueError, match="never loaded"):
        build_teacher("open_clip", str(folder))
    assert not proof.exists()


@pytest.mark.parametrize(
    ("name", "summary_dim", "feature_dim", "size", "grid"),
    [("ViT-H-14-378-quickgelu", 1024, 1280, 378, 27), ("ViT-L-14-336-quickgelu", 768, 1024, 336, 24)],
)
def test_the_paper_s_teachers(monkeypatch, name, summary_dim, feature_dim, size, grid):
    """Widths and grids of DFN CLIP and OpenAI CLIP (meta device: OpenCLIP's own architectures without weights)."""
    from transformers_radio.teachers import open_clip as module

    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        original = open_clip.CLIP(**{key: value for key, value in config.items() if key != "custom_text"})
    original.visual.preprocess_cfg = PREPROCESS
    monkeypatch.setattr(module, "load_open_clip", lambda checkpoint, image_size: (original, config))
    teacher = build_teacher("open_clip", f"{name}:weights")
    assert (teacher.summary_dim, teacher.feature_dim, teacher.image_size) == (summary_dim, feature_dim, size)
    output = teacher.encode(torch.empty(1, 3, size, size, device="meta"))
    assert output.summary.shape == (1, summary_dim)
    assert output.features.shape == (1, grid**2, feature_dim) and output.grid == (grid, grid)

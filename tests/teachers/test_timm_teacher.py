"""timm teachers against timm's own forward, from timm's own file formats."""

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from transformers_radio.teachers import build_teacher

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


@pytest.fixture
def make_folder(tmp_path, randomize):
    """Save a model in timm's Hub layout (config.json with its arguments, model.safetensors): (folder, the model)."""

    def make(name, **model_args):
        original = randomize(timm.create_model(name, **model_args))
        pretrained_cfg = {**original.pretrained_cfg, "mean": MEAN, "std": STD}
        if "img_size" in model_args:
            pretrained_cfg["input_size"] = [3, model_args["img_size"], model_args["img_size"]]
        model_config = {"pretrained_cfg": pretrained_cfg}
        timm.models.save_for_hf(original, tmp_path, model_config=model_config, safe_serialization=True)
        return tmp_path, original

    return make


def normalized(batch):
    return (batch - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def classifier_input(model, pixel_values):
    """What the classifier reads, caught by a hook before it."""
    caught = []
    handle = model.get_classifier().register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    model(pixel_values)
    handle.remove()
    return caught[0]


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
@pytest.mark.parametrize(
    ("name", "args", "patch", "prefix_tokens"),
    [
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2}, 16, 1),
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2, "class_token": False, "global_pool": "avg"}, 16, 0),
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2, "reg_tokens": 3}, 16, 4),
        ("eva02_tiny_patch14_224", {"img_size": 56, "depth": 2}, 14, 1),
    ],
    ids=["class token", "average", "registers", "eva"],
)
def test_vit(make_folder, images, assert_contract, prefix, name, args, patch, prefix_tokens):
    folder, original = make_folder(name, **args)
    size = args["img_size"]
    teacher = build_teacher("timm", f"{prefix}{folder}")
    assert (teacher.image_size, teacher.patch_size, teacher.feature_dim) == (size, patch, original.embed_dim)
    output = assert_contract(teacher)
    batch = normalized(images(size))
    with torch.no_grad():
        summary = classifier_input(original, batch)
        patches = original.forward_intermediates(batch, indices=1, norm=True, intermediates_only=True)[0]
    assert original.num_prefix_tokens == prefix_tokens
    torch.testing.assert_close(output.summary, summary)
    torch.testing.assert_close(output.features, patches.flatten(2).transpose(1, 2))


@pytest.mark.parametrize(
    ("name", "size", "reduction"),
    [
        ("test_resnet", 96, 32),
        ("test_convnext", 96, 32),
        ("test_efficientnet", 96, 32),
        ("swin_tiny_patch4_window7_224", 224, 32),
    ],
)
def test_maps(make_folder, images, assert_contract, name, size, reduction):
    """Convolutional networks (NCHW) at a size of our choice, and Swin (NHWC) at its own."""
    small = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)} if "swin" in name else {}
    folder, original = make_folder(name, **small)
    teacher = build_teacher("timm", str(folder), image_size=size)
    output = assert_contract(teacher)
    batch = normalized(images(size))
    with torch.no_grad():
        summary = classifier_input(original, batch)
        feature_map = original.forward_features(batch)
    if "swin" in name:
        feature_map = feature_map.permute(0, 3, 1, 2)
    assert teacher.patch_size == reduction and output.grid == (size // reduction, size // reduction)
    torch.testing.assert_close(output.summary, summary)
    torch.testing.assert_close(output.features, feature_map.flatten(2).transpose(1, 2))


def test_vit_at_another_size(make_folder, images, assert_contract):
    """timm's own resampling: `create_model(img_size=...)` with the saved weights."""
    folder, _ = make_folder("vit_tiny_patch16_224", img_size=64, depth=2)
    teacher = build_teacher("timm", str(folder), image_size=96)
    assert teacher.image_size == 96
    output = assert_contract(teacher)
    larger = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=96).eval()
    with torch.no_grad():
        expected = larger.forward_features(normalized(images(96)))
    assert output.grid == (6, 6)
    torch.testing.assert_close(output.features, expected[:, 1:])


def test_name_and_weights_file(make_folder, tmp_path, images):
    folder, original = make_folder("test_vit")
    save_file(original.state_dict(), tmp_path / "weights.safetensors")
    teacher = build_teacher("timm", f"test_vit:{tmp_path / 'weights.safetensors'}")
    cfg = timm.get_pretrained_cfg("test_vit")
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (cfg.mean, cfg.std))
    with torch.no_grad():
        expected = original.forward_features((images(160) - mean) / std)
    torch.testing.assert_close(teacher(images(160)).features, expected[:, original.num_prefix_tokens :])


def test_bfloat16(make_folder, images):
    folder, original = make_folder("test_vit")
    teacher = build_teacher("timm", str(folder), dtype="bfloat16")
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        expected = original.bfloat16().forward_features(normalized(images(160)).bfloat16()).float()
    features = teacher(images(160)).features
    torch.testing.assert_close(features, expected[:, original.num_prefix_tokens :], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda weights: weights.pop("norm.bias"), "[Mm]issing key.*norm.bias"),
        (lambda weights: weights.update(strange=torch.ones(1)), "[Uu]nexpected key.*strange"),
        (lambda weights: weights.update({"norm.bias": torch.ones(5)}), "size mismatch for norm.bias"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_weights_must_fit(make_folder, edit, message):
    folder, _ = make_folder("test_vit")
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"(?s)could not load .*{message}"):
        build_teacher("timm", str(folder))


def test_wrong_arguments(make_folder, tmp_path):
    folder, _ = make_folder("vit_tiny_patch16_224", img_size=64, depth=1)
    with pytest.raises(ValueError, match="image_size=70 .*patch size 16: use 64"):
        build_teacher("timm", str(folder), image_size=70)
    with pytest.raises(ValueError, match=r"timm teacher does not know 'pool': its options are \(none\)"):
        build_teacher("timm", str(folder), pool="avg")
    with pytest.raises(ValueError, match="timm knows no model 'no_such_model'"):
        build_teacher("timm", "no_such_model")
    with pytest.raises(FileNotFoundError, match="absent.safetensors"):
        build_teacher("timm", f"test_vit:{tmp_path / 'absent.safetensors'}")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no weights: expected one of model.safetensors"):
        build_teacher("timm", str(folder))


@pytest.mark.parametrize("as_folder", [True, False])
def test_pickled_code_is_refused(make_folder, tmp_path, malicious_file, as_folder):
    folder, _ = make_folder("test_vit")
    (folder / "model.safetensors").unlink()
    proof = malicious_file(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="never loaded"):
        build_teacher("timm", str(folder) if as_folder else f"test_vit:{folder / 'pytorch_model.bin'}")
    assert not proof.exists()


def test_weights_saved_by_ddp_while_training(tmp_path, images, randomize, monkeypatch):
    original = randomize(timm.create_model("test_vit"))
    saved = {"state_dict": {f"module.{name}": tensor for name, tensor in original.state_dict().items()}, "epoch": 1}
    torch.save(saved, tmp_path / "last.pth.tar")
    monkeypatch.setenv("HOME", str(tmp_path))
    teacher = build_teacher("timm", "test_vit:~/last.pth.tar")
    assert {name: tensor.sum() for name, tensor in teacher.model.state_dict().items()} == {
        name: tensor.sum() for name, tensor in original.state_dict().items()
    }

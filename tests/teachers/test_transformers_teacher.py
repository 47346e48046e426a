"""transformers teachers against transformers' own forward, from save_pretrained folders."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from transformers_radio.teachers import build_teacher
from transformers_radio.teachers.transformers.dino import DinoTeacher

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 99}


@pytest.fixture
def save(tmp_path, randomize):
    """Random weights into a model, then the model and its image processor into a folder; returns the folder's path."""

    def to_folder(model, **processor):
        randomize(model).save_pretrained(tmp_path)
        settings = {"image_mean": MEAN, "image_std": STD, **processor}
        transformers.CLIPImageProcessor(**settings).save_pretrained(tmp_path)
        return str(tmp_path)

    return to_folder


def normalized(batch):
    return (batch - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def assert_teacher(teacher, images, assert_contract, expected, summary_dim, feature_dim, size):
    """The contract, the dimensions, and the outputs that `expected(pixel_values)` -> (summary, features) gives."""
    assert (teacher.summary_dim, teacher.feature_dim, teacher.image_size) == (summary_dim, feature_dim, size)
    output = assert_contract(teacher)
    with torch.no_grad():
        summary, features = expected(normalized(images(size)))
    assert output.grid == (size // teacher.patch_size,) * 2
    torch.testing.assert_close(output.features, features)
    if summary is not None:
        torch.testing.assert_close(output.summary, summary)


def clip():
    vision = {**VIT, "intermediate_size": 48, "image_size": 48}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=20))


def siglip():
    vision = {**VIT, "intermediate_size": 48, "image_size": 48}
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=TEXT, vision_config=vision))


def siglip2():
    vision = {**VIT, "intermediate_size": 48, "num_patches": 36}
    return transformers.Siglip2Model(transformers.Siglip2Config(text_config=TEXT, vision_config=vision))


def dinov2(**kwargs):
    return transformers.Dinov2Model(transformers.Dinov2Config(**VIT, image_size=48, mlp_ratio=2, **kwargs))


def dinov2_with_registers():
    config = transformers.Dinov2WithRegistersConfig(**VIT, image_size=48, mlp_ratio=2, num_register_tokens=3)
    return transformers.Dinov2WithRegistersModel(config)


def dinov3():
    config = transformers.DINOv3ViTConfig(**VIT, intermediate_size=48, image_size=48, num_register_tokens=2)
    return transformers.DINOv3ViTModel(config)


def intern_vit(**kwargs):
    config = transformers.InternVLVisionConfig(
        **{**VIT, "patch_size": [8, 8]}, intermediate_size=48, image_size=[48, 48], **kwargs
    )
    return transformers.InternVLVisionModel(config)


def sam():
    vision = {**VIT, "image_size": 48, "mlp_dim": 64, "output_channels": 16, "window_size": 4}
    vision["global_attn_indexes"] = [1]
    prompt = {"hidden_size": 16, "image_size": 48, "patch_size": 8, "mask_input_channels": 8}
    mask = {"hidden_size": 16, "num_attention_heads": 2, "mlp_dim": 16, "iou_head_hidden_dim": 16}
    config = transformers.SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=mask)
    return transformers.SamModel(config)


SIZES = pytest.mark.parametrize("size", [48, 64], ids=["native", "larger"])


@SIZES
@pytest.mark.parametrize("vision_only", [False, True], ids=["CLIPModel", "CLIPVisionModelWithProjection"])
def test_clip(save, tmp_path, images, assert_contract, vision_only, size):
    original = clip()
    path = save(original)
    if vision_only:
        config = transformers.CLIPVisionConfig(**original.config.vision_config.to_dict() | {"projection_dim": 20})
        vision = transformers.CLIPVisionModelWithProjection.from_pretrained(path, config=config)
        path = str(tmp_path / "vision")
        vision.save_pretrained(path)
        transformers.CLIPImageProcessor(image_mean=MEAN, image_std=STD).save_pretrained(path)

    def expected(pixel_values):
        output = original.vision_model(pixel_values, interpolate_pos_encoding=True, output_hidden_states=True)
        embedding = original.get_image_features(pixel_values, interpolate_pos_encoding=True).pooler_output
        return embedding, output.hidden_states[-1][:, 1:]

    assert_teacher(build_teacher("transformers", path, size), images, assert_contract, expected, 20, 32, size)


@SIZES
@pytest.mark.parametrize(
    ("make", "prefix"),
    [(dinov2, 1), (dinov2_with_registers, 4), (dinov3, 3), (intern_vit, 1)],
    ids=["dinov2", "dinov2 with registers", "dinov3", "internvit"],
)
def test_class_token_models(save, images, assert_contract, make, prefix, size):
    original = make()

    def expected(pixel_values):
        tokens = original(pixel_values).last_hidden_state
        return tokens[:, 0], tokens[:, prefix:]

    assert_teacher(
        build_teacher("transformers", save(original), size), images, assert_contract, expected, 32, 32, size
    )


def test_dinov2_targets_are_final_normed(save, images, assert_contract):
    """Independent of `last_hidden_state`'s meaning: a hook on the last block, and the final LayerNorm by hand."""
    original = dinov2()
    teacher = build_teacher("transformers", save(original))

    def expected(pixel_values):
        caught = []
        handle = original.encoder.layer[-1].register_forward_hook(lambda *a: caught.append(a[2]))
        original(pixel_values)
        handle.remove()
        norm = original.layernorm
        tokens = torch.nn.functional.layer_norm(caught[0], (32,), norm.weight, norm.bias, norm.eps)
        return tokens[:, 0], tokens[:, 1:]

    assert_teacher(teacher, images, assert_contract, expected, 32, 32, 48)


def test_dinov2_classifier_checkpoint(save, images):
    """A checkpoint with a classification head gives the same targets as the bare model inside it."""
    config = transformers.Dinov2Config(**VIT, image_size=48, mlp_ratio=2, num_labels=3)
    original = transformers.Dinov2ForImageClassification(config)
    teacher = build_teacher("transformers", save(original))
    with torch.no_grad():
        tokens = original.dinov2(normalized(images(48))).last_hidden_state
    torch.testing.assert_close(teacher(images(48)).features, tokens[:, 1:])


@SIZES
def test_siglip(save, images, assert_contract, size):
    original = siglip()

    def expected(pixel_values):
        output = original.vision_model(pixel_values, interpolate_pos_encoding=True)
        return output.pooler_output, output.last_hidden_state

    assert_teacher(
        build_teacher("transformers", save(original), size), images, assert_contract, expected, 32, 32, size
    )


@SIZES
def test_siglip2_naflex(save, images, size):
    """Against SigLIP2's own image processor, which cuts the patches; it sees images of exact 8-bit values."""
    original = siglip2()
    teacher = build_teacher("transformers", save(original, image_mean=[0.5] * 3, image_std=[0.5] * 3), size)
    assert (teacher.summary_dim, teacher.feature_dim, teacher.image_size) == (32, 32, size)
    pixels = (images(size) * 255).round().to(torch.uint8)
    processor = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=(size // 8) ** 2)
    inputs = processor(list(pixels), return_tensors="pt")
    with torch.no_grad():
        expected = original.vision_model(**inputs)
    output = teacher(pixels / 255)
    torch.testing.assert_close(output.summary, expected.pooler_output)
    torch.testing.assert_close(output.features, expected.last_hidden_state)


@pytest.mark.parametrize("features", ["trunk", "neck"])
def test_sam(save, images, assert_contract, features):
    original = sam()
    teacher = build_teacher("transformers", save(original), features=features)

    def expected(pixel_values):
        output = original.vision_encoder(pixel_values, output_hidden_states=True)
        if features == "trunk":
            return None, output.hidden_states[-1].flatten(1, 2)
        return None, original.get_image_embeddings(pixel_values).flatten(2).transpose(1, 2)

    assert_teacher(teacher, images, assert_contract, expected, None, 32 if features == "trunk" else 16, 48)


@pytest.mark.parametrize("features", ["trunk", "neck"])
def test_sam_at_another_size(save, images, assert_contract, features):
    """The rule in the docs (bicubic position table, linear relative positions), put into a model of the new size."""
    original = sam()
    teacher = build_teacher("transformers", save(original), 64, features=features)
    weights = original.vision_encoder.state_dict()
    for name, tensor in weights.items():
        if name == "pos_embed":  # (1, 6, 6, C) -> (1, 8, 8, C)
            table = torch.nn.functional.interpolate(tensor.permute(0, 3, 1, 2), size=(8, 8), mode="bicubic")
            weights[name] = table.permute(0, 2, 3, 1)
        elif "rel_pos" in name and len(tensor) == 11:  # global block: (2*6-1, head dim) -> (2*8-1, head dim)
            weights[name] = torch.nn.functional.interpolate(tensor.T[None], size=15, mode="linear")[0].T
    resized_config = transformers.SamVisionConfig(**original.config.vision_config.to_dict() | {"image_size": 64})
    resized = transformers.SamVisionModel(resized_config).eval()
    resized.vision_encoder.load_state_dict(weights)

    def expected(pixel_values):
        output = resized(pixel_values, output_hidden_states=True)
        if features == "trunk":
            return None, output.hidden_states[-1].flatten(1, 2)
        return None, output.last_hidden_state.flatten(2).transpose(1, 2)

    assert_teacher(teacher, images, assert_contract, expected, None, 32 if features == "trunk" else 16, 64)


def test_bfloat16(save, images, assert_contract):
    original = dinov2()
    teacher = build_teacher("transformers", save(original), dtype="bfloat16")
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        tokens = original.bfloat16()(normalized(images(48)).bfloat16()).last_hidden_state.float()
    output = assert_contract(teacher)
    torch.testing.assert_close(output.features, tokens[:, 1:], rtol=0, atol=0)


def test_images_unnormalized_when_the_processor_says_so(save, images):
    original = dinov2()
    teacher = build_teacher("transformers", save(original, do_normalize=False))
    with torch.no_grad():
        torch.testing.assert_close(teacher(images(48)).summary, original(images(48)).pooler_output)


def test_the_paper_s_dinov2():
    """Widths and grid of DINOv2-g with registers at 224 px (meta device: the architecture without weights)."""
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=1536,
        num_hidden_layers=40,
        num_attention_heads=24,
        use_swiglu_ffn=True,
        image_size=518,
        patch_size=14,
    )
    with torch.device("meta"):
        original = transformers.Dinov2WithRegistersModel(config)
    teacher = DinoTeacher(original, image_size=224)
    assert (teacher.summary_dim, teacher.feature_dim) == (1536, 1536)
    assert sum(parameter.numel() for parameter in teacher.parameters()) // 10**6 == 1136
    output = teacher.encode(torch.empty(1, 3, 224, 224, device="meta"))
    assert output.summary.shape == (1, 1536)
    assert output.features.shape == (1, 256, 1536) and output.grid == (16, 16)


def edit_weights(path, edit):
    file = f"{path}/model.safetensors"
    weights = load_file(file)
    edit(weights)
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda weights: weights.pop("layernorm.bias"), r"missing keys \['layernorm.bias'\]"),
        (lambda weights: weights.update(strange=torch.ones(1)), r"unexpected keys \['strange'\]"),
        (lambda weights: weights.update({"layernorm.bias": torch.ones(5)}), "other shapes .*layernorm.bias"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_weights_must_fit(save, edit, message):
    path = save(dinov2())
    edit_weights(path, edit)
    with pytest.raises(ValueError, match=message):
        build_teacher("transformers", path)


@pytest.mark.parametrize("make", [dinov2, clip, sam], ids=["dinov2", "clip", "sam"])
def test_weights_saved_by_ddp(save, images, make):
    path = save(make())
    expected = build_teacher("transformers", path)(images(48)).features

    def prefix(weights):
        names = list(weights)
        weights.update({f"module.{name}": weights.pop(name) for name in names})

    edit_weights(path, prefix)
    torch.testing.assert_close(build_teacher("transformers", path)(images(48)).features, expected, rtol=0, atol=0)


def test_missing_normalization(save, tmp_path):
    path = save(dinov2())
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="preprocessor_config.json"):
        build_teacher("transformers", path)


@pytest.mark.parametrize(
    ("settings", "message"), [({"rescale_factor": 1 / 127.5}, "rescales"), ({"image_mean": None}, "image_mean")]
)
def test_unusable_normalization(save, tmp_path, settings, message):
    path = save(dinov2())
    file = tmp_path / "preprocessor_config.json"
    processor = {key: value for key, value in (json.loads(file.read_text()) | settings).items() if value is not None}
    file.write_text(json.dumps(processor))
    with pytest.raises(ValueError, match=message):
        build_teacher("transformers", path)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"image_size": 50}, "image_size=50 .*patch size 8: use 48"),
        ({"image_size": 0}, "image_size=0 "),
        ({"dtype": "int8"}, "dtype='int8' is unknown: use one of float32"),
        ({"features": "trunk"}, "dinov2 teacher does not know 'features': its options are revision"),
    ],
)
def test_wrong_arguments(save, kwargs, message):
    with pytest.raises(ValueError, match=message):
        build_teacher("transformers", save(dinov2()), **kwargs)


def test_wrong_sam_arguments(save):
    path = save(sam())
    with pytest.raises(ValueError, match="features='head' is unknown"):
        build_teacher("transformers", path, features="head")
    with pytest.raises(ValueError, match="does not know 'adaptor': its options are features"):
        build_teacher("transformers", path, adaptor="clip")


def plain_vit():
    return transformers.ViTModel(transformers.ViTConfig(**VIT, intermediate_size=48, image_size=48))


def swin():
    config = transformers.SwinConfig(image_size=64, patch_size=4, embed_dim=12, depths=[1, 1], num_heads=[2, 2])
    return transformers.SwinModel(config)


def convnext():
    return transformers.ConvNextModel(transformers.ConvNextConfig(hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1]))


def test_any_other_vision_model(save, images, assert_contract):
    model = plain_vit()

    def expected(pixel_values):
        tokens = model(pixel_values).last_hidden_state
        return tokens[:, 0], tokens[:, 1:]

    teacher = build_teacher("transformers", save(model))
    assert_teacher(teacher, images, assert_contract, expected, summary_dim=32, feature_dim=32, size=48)


def test_a_classifier_gives_its_backbone_and_another_size_its_resized_positions(save, images):
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(**VIT, intermediate_size=48, image_size=48, num_labels=3)
    )
    teacher = build_teacher("transformers", save(model), image_size=64)
    with torch.no_grad():
        tokens = model.vit(normalized(images(64)), interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(teacher(images(64)).features, tokens[:, 1:])
    torch.testing.assert_close(teacher(images(64)).summary, tokens[:, 0])


def test_merged_patches_and_feature_maps_pool_as_their_models_do(save, images):
    model = swin()
    teacher = build_teacher("transformers", save(model))
    with torch.no_grad():
        expected = model(normalized(images(64)))
    output = teacher(images(64))
    assert output.grid == (8, 8) and teacher.patch_size == 8  # 4 pixels a patch, and one merge
    torch.testing.assert_close(output.features, expected.last_hidden_state)
    torch.testing.assert_close(output.summary, expected.pooler_output)
    model = convnext()
    teacher = build_teacher("transformers", save(model), image_size=64)
    with torch.no_grad():
        expected = model(normalized(images(64)))
    output = teacher(images(64))
    assert output.grid == (2, 2) and teacher.patch_size == 32
    torch.testing.assert_close(output.features, expected.last_hidden_state.flatten(2).transpose(1, 2))
    torch.testing.assert_close(output.summary, expected.pooler_output)


def test_a_size_that_a_model_does_not_take_is_named(save):
    with pytest.raises(ValueError, match="image_size=50 is no positive multiple .* 8: use 48"):
        build_teacher("transformers", save(plain_vit()), image_size=50)


@pytest.mark.parametrize("path", ["{}/clipp", "./clipp", "runs/teachers/clipp"])
def test_a_mistyped_path_is_said_to_be_none(path, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder .*clipp; give an existing one, or a Hub id"):
        build_teacher("transformers", path.format(tmp_path))


def test_an_id_without_a_model_is_said_to_be_no_folder_either(monkeypatch):
    def unknown(checkpoint, revision=None):
        raise OSError("404")

    monkeypatch.setattr("transformers.PretrainedConfig.get_config_dict", unknown)
    with pytest.raises(FileNotFoundError, match="there is no folder runs/clipp, and as a Hub id it failed: 404"):
        build_teacher("transformers", "runs/clipp")


def test_unknown_model_type(tmp_path):
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type 'bert', which is no vision model"):
        build_teacher("transformers", str(tmp_path))


def test_pickled_code_is_refused(save, tmp_path, malicious_file):
    path = save(dinov2())
    (tmp_path / "model.safetensors").unlink()
    proof = malicious_file(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="never loaded"):
        build_teacher("transformers", path)
    assert not proof.exists()

"""RadioTimmModel against timm's own models: features, summary, saving, remote code, training, messages."""

import inspect
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from helpers.reloaded import assert_same_but_for_rounding, assert_same_weights
from helpers.tiny_radio import scramble
from transformers_radio import RadioConfig, RadioImageProcessor, RadioTimmConfig, RadioTimmModel
from transformers_radio.modeling import student_class

ADAPTORS = {
    "clip": {"summary_dim": 8, "feature_dim": 12, "hidden_dim": 16},
    "sam": {"summary_dim": None, "feature_dim": 6, "hidden_dim": 8, "upsample_factor": 2},
}
# network -> width of its features, of its summary, of its stage at stride 16; and millions of parameters, which are
# those of timm's documentation without the classifier
NETWORKS = {
    # the backbone table (paper Table 6)
    "tf_efficientnetv2_s": (1280, 1280, 160, 20.2),
    "resnetv2_101": (2048, 2048, 1024, 42.5),
    "regnety_064": (1296, 1296, 576, 29.3),
    "efficientvit_l1": (512, 3200, 256, 49.5),
    "convnext_base": (1024, 1024, 512, 87.6),
    "dm_nfnet_f3": (3072, 3072, 1536, 251.9),
    "swinv2_small_window8_256": (768, 768, 384, 49.0),
    "maxvit_base_tf_224": (768, 768, 384, 118.7),
    "poolformerv2_m36": (768, 768, 384, 55.3),
    "mvitv2_base": (768, 768, 384, 50.7),
    # newer ones
    "fastvit_t8": (768, 768, 192, 3.3),
    "hiera_tiny_224": (768, 768, 384, 27.1),
    "repvit_m1": (384, 384, 192, 4.7),
    "mobilenetv4_conv_small": (960, 1280, 96, 2.5),
    "convnext_tiny.dinov3_lvd1689m": (768, 768, 384, 27.8),
    "vit_small_patch16_dinov3": (384, 384, 384, 21.6),
}
# cut down as far as timm lets them be: one of each layout, of each kind of head, of fixed and of free sizes
TINY = {
    "convnext": ("convnext_tiny", {"dims": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}, None),
    "resnetv2": ("resnetv2_18", {"channels": [8, 8, 16, 16]}, None),
    "efficientnetv2": ("tf_efficientnetv2_b0", {"channel_multiplier": 0.25}, None),
    "efficientvit": ("efficientvit_b0", {"widths": [4, 8, 16, 32, 32], "head_widths": [48, 40]}, None),
    "fastvit": ("fastvit_t8", {"embed_dims": [12, 24, 48, 96], "layers": [1, 1, 1, 1]}, None),
    "regnety": ("regnety_002", {"depth": 8}, None),
    "swinv2": ("swinv2_tiny_window8_256", {"embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2]}, 64),
    "hiera": ("hiera_tiny_224", {"embed_dim": 16, "stages": [1, 1, 1, 1]}, 64),
    "levit": ("levit_128s", {"embed_dim": [32, 48, 64], "depth": [1, 1, 1], "key_dim": 8}, 128),
    "vit": ("vit_tiny_patch16_224", {"embed_dim": 24, "depth": 2, "num_heads": 2}, 64),
}
EVERY = pytest.mark.parametrize("name", TINY)
SOME = pytest.mark.parametrize("name", ["efficientvit", "swinv2"])


def build(name, adaptors=ADAPTORS, **fields):
    network, model_args, image_size = TINY[name]
    torch.manual_seed(0)
    config = RadioTimmConfig(
        timm_model=network, model_args=model_args, image_size=image_size, adaptors=adaptors, **fields
    )
    return scramble_all(RadioTimmModel(config).eval())


def scramble_all(model):
    """Statistics of batch norms too, which start at 0 and 1."""
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith(("running_mean", "running_var")):
            buffer += 0.2 * torch.rand(buffer.shape)
    return scramble(model)


def images_for(model, batch=2):
    side = model.config.image_size
    size = (side, side) if side else (2 * model.total_stride, 3 * model.total_stride)
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def timm_s_own(model, images):
    """What timm's own model with these weights returns: (forward_features, its pooled form)."""
    network, model_args, image_size = next(entry for entry in TINY.values() if entry[0] == model.config.timm_model)
    sizes = {"img_size": image_size} if image_size else {}
    own = timm.create_model(network, num_classes=0, **model_args, **sizes).eval()
    own.load_state_dict(model.network.state_dict())
    cfg = own.pretrained_cfg
    mean, std = (torch.tensor(cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    final = own.forward_features((images - mean) / std)
    return own, final, own.forward_head(final, pre_logits=True)


def test_it_is_a_public_student():
    assert student_class("radio_timm") is RadioTimmModel
    assert RadioTimmConfig.__name__ in dir(sys.modules["transformers_radio"])


# ---------------------------------------------------------------- the networks


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_has_the_shapes_of_timm_s_own(name):
    """On the meta device, where nothing is computed and nothing could be downloaded."""
    features, summary, stage, millions = NETWORKS[name]
    with torch.device("meta"):
        model = RadioTimmModel(RadioTimmConfig(timm_model=name, adaptors=ADAPTORS)).eval()
        own = timm.create_model(name, num_classes=0).eval()
        side = model.config.image_size or 64
        images = torch.rand(2, 3, side, side)
        final = own.forward_features(images)
        pooled = own.forward_head(final, pre_logits=True)
        output = model(images, output_hidden_states=True)
    assert {key: weight.shape for key, weight in model.network.state_dict().items()} == {
        key: weight.shape for key, weight in own.state_dict().items()
    }
    assert round(sum(weight.numel() for weight in model.network.parameters()) / 1e6, 1) == millions
    places = side // model.patch_size
    assert output.features.shape == (2, places**2, features) and output.grid == (places, places)
    prefix = getattr(own, "num_prefix_tokens", 0)
    expected = (places**2 + prefix) * features if final.ndim == 3 else places**2 * features
    assert final.numel() == 2 * expected
    assert output.summary.shape == pooled.shape == (2, summary)
    assert output.adaptors["clip"].features.shape == (2, places**2, 12)
    assert output.adaptors["sam"].features.shape == (2, 4 * places**2, 6)
    assert model.patch_size == (16 if "patch16" in name else 32)
    assert (2, stage, side // 16, side // 16) in [maps.shape for maps in output.hidden_states]
    # nearly all weights are in the blocks, none of them in two
    blocks = {id(weight): weight.numel() for block in model.blocks for weight in block.parameters()}
    assert sum(blocks.values()) == sum(weight.numel() for block in model.blocks for weight in block.parameters())
    assert len(model.blocks) >= 10 and sum(blocks.values()) > 0.5e6 * millions
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()


@pytest.mark.parametrize("size", RadioTimmConfig.sizes())
def test_small_sizes_have_two_million_parameters(size):
    fields = {"image_size": 64} if size.startswith(("swinv2", "hiera")) else {}
    with torch.device("meta"):
        model = RadioTimmModel(RadioTimmConfig.from_size(size, **fields)).eval()
        assert model(torch.rand(1, 3, 64, 64)).grid == (2, 2)
    assert 1.75e6 < sum(weight.numel() for weight in model.parameters()) < 2.4e6


# ---------------------------------------------------------------- values


@EVERY
@torch.no_grad()
def test_outputs_are_those_of_timm(name):
    model = build(name)
    images = images_for(model)
    own, final, pooled = timm_s_own(model, images)
    output = model(images)
    rows, cols = output.grid
    assert (rows, cols) == tuple(side // model.patch_size for side in images.shape[-2:])
    if final.ndim == 3:
        expected = final[:, 1:] if name == "vit" else final
    else:
        expected = final if name == "swinv2" else final.permute(0, 2, 3, 1)
        assert expected.shape[1:3] == (rows, cols)
        expected = torch.cat([expected[:, row] for row in range(rows)], dim=1)
    assert torch.equal(output.features, expected) and torch.equal(output.summary, pooled)
    assert torch.equal(output.pooler_output, output.summary)
    assert torch.equal(output.last_hidden_state, output.features)
    for adaptor, head in output.adaptors.items():
        heads = model.adaptors[adaptor]
        dense = heads.feature_head(expected)
        if adaptor == "sam":
            dense = model.features_to_grid(output.features, *images.shape[-2:])  # (B, D, h, w)
            dense = heads.feature_head(dense.permute(0, 2, 3, 1))  # (B, h, w, 2 * 2 * 6)
            dense = F.pixel_shuffle(dense.unflatten(-1, (4, 6)).permute(0, 4, 3, 1, 2).flatten(1, 2), 2)
            dense = dense.flatten(2).mT
        torch.testing.assert_close(head.features, dense)
        assert (head.summary is None) == (adaptor == "sam")
    torch.testing.assert_close(output.adaptors["clip"].summary, model.adaptors["clip"].summary_head(pooled))


@EVERY
@torch.no_grad()
def test_stages_are_those_of_timm(name):
    model = build(name)
    images = images_for(model)
    own, final, pooled = timm_s_own(model, images)
    normalized = model.input_conditioner(images)
    _, maps = own.forward_intermediates(normalized, output_fmt="NCHW")
    output = model(images, output_hidden_states=True)
    assert len(output.hidden_states) == len(maps)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(output.hidden_states, maps, strict=True))
    assert torch.equal(output.summary, model(images).summary) and torch.equal(output.features, model(images).features)
    stride = 16
    finer = build(name, feature_stride=stride)
    finer.network.load_state_dict(model.network.state_dict())
    found = finer(images)
    if name != "vit":  # whose only stride it is
        wanted = [map for map in maps if map.shape[-1] == images.shape[-1] // stride][-1]
        assert torch.equal(found.features, wanted.flatten(2).mT)
    assert found.grid == (images.shape[-2] // stride, images.shape[-1] // stride)
    assert torch.equal(found.summary, pooled)
    assert found.adaptors["sam"].grid == tuple(2 * side for side in found.grid)


@pytest.mark.parametrize("name", ["hiera", "swinv2", "convnext"])
@torch.no_grad()
def test_features_lie_where_the_image_does(name):
    """Row by row: what changes most is the place that changes, in a network that looks around it."""
    model = build(name, feature_stride=16)
    images = torch.full((1, 3, 64, 64), 0.5)
    before = model(images).features
    for row, col in ((0, 3), (3, 1)):
        changed = images.clone()
        changed[..., 16 * row : 16 * row + 16, 16 * col : 16 * col + 16] = 1.0
        difference = (model(changed).features - before).norm(dim=-1)[0]
        assert difference.argmax() == 4 * row + col


@EVERY
@torch.no_grad()
def test_saved_and_loaded_it_is_the_same(name, tmp_path):
    model = build(name)
    images = images_for(model)
    expected = model(images)
    model.save_pretrained(tmp_path)
    config = RadioTimmConfig.from_pretrained(tmp_path)
    assert (config.hidden_size, config.summary_size) == (expected.features.shape[-1], expected.summary.shape[-1])
    for loaded in (RadioTimmModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert isinstance(loaded, RadioTimmModel) and not loaded.training
        found = loaded(images)
        assert_same_weights(loaded, model)
        assert_same_but_for_rounding(found.features, expected.features)
        assert_same_but_for_rounding(found.summary, expected.summary)
    for other in (model.with_adaptors(["sam"]), loaded.with_adaptors(["sam"])):
        assert_same_but_for_rounding(other(images).adaptors["sam"].features, expected.adaptors["sam"].features)
        assert list(other.adaptors) == ["sam"]
    more = model.with_new_adaptors({"new": {"summary_dim": 5, "feature_dim": 7, "hidden_dim": 8}})
    assert more(images).adaptors["new"].summary.shape == (2, 5) and list(model.adaptors) == list(ADAPTORS)
    assert torch.equal(more(images).features, expected.features)


def test_half_precision_keeps_the_statistics():
    model = build("resnetv2").to(torch.bfloat16)
    output = model(images_for(model))
    assert output.features.dtype == torch.bfloat16 and model.input_conditioner.norm_mean.dtype == torch.float32


def test_initialization_is_timm_s_and_heads_are_new():
    torch.manual_seed(0)
    own = timm.create_model("resnetv2_18", num_classes=0, channels=[8, 8, 16, 16])
    torch.manual_seed(0)
    model = RadioTimmModel(
        RadioTimmConfig(timm_model="resnetv2_18", model_args={"channels": [8, 8, 16, 16]}, adaptors=ADAPTORS)
    )
    assert all(torch.equal(own.state_dict()[name], one) for name, one in model.network.state_dict().items())
    head = model.adaptors["clip"].summary_head.fc1
    assert 0.015 < head.weight.std() < 0.025 and not head.bias.any()


# ---------------------------------------------------------------- training


@EVERY
def test_every_weight_learns_and_checkpointing_changes_nothing(name):
    model = build(name, feature_stride=None if name == "vit" else 16)
    images = images_for(model)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        model.train().zero_grad()
        torch.manual_seed(0)
        output = model(images)
        losses = [head.features.square().mean() for head in output.adaptors.values()]
        (sum(losses) + output.adaptors["clip"].summary.square().mean()).backward()
        assert [key for key, weight in model.named_parameters() if weight.grad is None] == []
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


@SOME
def test_it_compiles_without_breaks(name):
    model = build(name)
    images = images_for(model)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        output, expected = compiled(images), model(images)
    torch.testing.assert_close(output.features, expected.features)
    torch.testing.assert_close(output.adaptors["clip"].summary, expected.adaptors["clip"].summary)


def test_the_blocks_are_what_is_sharded():
    for name, kinds in {
        "convnext": {"ConvNeXtBlock"},
        "regnety": {"Bottleneck"},
        "swinv2": {"SwinTransformerV2Block"},
        "vit": {"Block"},
    }.items():
        model = build(name)
        assert {type(block).__name__ for block in model.blocks} == set(model._no_split_modules) == kinds
    with torch.device("meta"):
        model = RadioTimmModel(RadioTimmConfig(timm_model="poolformer_s12"))
    assert model._no_split_modules == {"MetaFormerBlock"} and len(model.blocks) == 12
    assert any(name.endswith("cpb_mlp.0.weight") for name in build("swinv2").no_weight_decay())
    assert build("vit").no_weight_decay() == {"network.pos_embed", "network.cls_token"}


# ---------------------------------------------------------------- timm's weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """(folder with files of weights, the network that they are of, with its classifier)"""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    network = timm.create_model("resnetv2_18", channels=[8, 8, 16, 16])
    save_file(network.state_dict(), folder / "weights.safetensors")
    torch.save({"state_dict": network.state_dict()}, folder / "weights.pth")
    return folder, network


@pytest.mark.parametrize("file", ["weights.safetensors", "weights.pth"])
def test_it_starts_from_a_file_of_timm_s_weights(file, weights):
    folder, network = weights
    fields = {"model_args": {"channels": [8, 8, 16, 16]}, "adaptors": ADAPTORS}
    model = RadioTimmModel.from_timm("resnetv2_18", str(folder / file), **fields)
    assert all(torch.equal(network.state_dict()[name], one) for name, one in model.network.state_dict().items())
    assert list(model.adaptors) == list(ADAPTORS)


def test_weights_that_cannot_be_had_are_named(weights, tmp_path, monkeypatch):
    folder, network = weights
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors"):
        RadioTimmModel.from_timm("resnetv2_18", str(folder / "nowhere.safetensors"))
    with pytest.raises(ValueError, match="cannot load the weights of resnetv2_18"):  # of other shapes
        RadioTimmModel.from_timm("resnetv2_18", str(folder / "weights.safetensors"))
    torch.save(network, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="code.pth"):
        RadioTimmModel.from_timm("resnetv2_18", str(tmp_path / "code.pth"))
    lacking = {name: weight for name, weight in network.state_dict().items() if "stages.2" not in name}
    save_file(lacking, tmp_path / "lacking.safetensors")
    with pytest.raises(ValueError, match="cannot load the weights of resnetv2_18.*Missing key"):
        RadioTimmModel.from_timm(
            "resnetv2_18", str(tmp_path / "lacking.safetensors"), model_args={"channels": [8, 8, 16, 16]}
        )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="cannot load the weights of resnetv2_50.a1h_in1k"):
        RadioTimmModel.from_timm("resnetv2_50.a1h_in1k")


# ---------------------------------------------------------------- other processes


def test_remote_code_needs_timm_and_nothing_of_this_package(tmp_path):
    model = build("efficientvit")
    images = images_for(model)
    model.save_pretrained(tmp_path / "student")
    RadioImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "student")
    torch.save(images, tmp_path / "images.pt")
    code = (
        "import sys, torch; sys.modules['transformers_radio'] = None\n"
        "from transformers import AutoModel\n"
        "model = AutoModel.from_pretrained('student', trust_remote_code=True).eval()\n"
        "output = model(torch.load('images.pt'))\n"
        "torch.save([output.summary, output.features, output.adaptors['sam'].features], 'out.pt')\n"
        "sys.modules['timm'] = None\n"
        "try:\n"
        "    AutoModel.from_pretrained('student', trust_remote_code=True)\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    environment = {"PATH": "", "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # bits are equal for as many threads only
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    output = model(images)
    expected = [output.summary, output.features, output.adaptors["sam"].features]
    for one, other in zip(torch.load(tmp_path / "out.pt"), expected, strict=True):
        assert_same_but_for_rounding(one, other)
    assert "RadioTimmModel needs timm, which is not installed: pip install 'timm>=" in done.stdout


def test_auto_classes_know_it(tmp_path):
    build("resnetv2").save_pretrained(tmp_path)
    RadioImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), RadioTimmConfig)
    assert isinstance(AutoImageProcessor.from_pretrained(tmp_path), RadioImageProcessor)


# ---------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"timm_model": "convnext_bse"}, "has no network 'convnext_bse'; did you mean convnext_base"),
        ({"timm_model": "hf-hub:timm/resnet18"}, "has no network 'hf-hub:timm/resnet18'"),
        ({"timm_model": "convnext-2m"}, "that is a size of ours: RadioTimmConfig.from_size"),
        ({"timm_model": "convnext_tiny.mine"}, "has no weights 'convnext_tiny.mine'; it has .*convnext_tiny.fb_in22k"),
        ({"timm_model": 3}, "timm_model is 3, expected the name of a network of timm"),
        ({"feature_stride": 12}, "the stages of convnext_tiny have the strides 4, 8, 16, 32; choose one"),
        ({"image_size": 224}, "image_size is 224, but convnext_tiny takes images of any size; leave it out"),
        ({"hidden_size": 64}, "hidden_size is 64, but convnext_tiny with feature_stride=None has 768"),
        ({"model_args": {"img_size": 64}}, "model_args has img_size; leave it out: set image_size"),
        ({"model_args": {"checkpoint_path": "x.pth"}}, "model_args has checkpoint_path; leave it out"),
        ({"model_args": {"depth": 3}}, "cannot build convnext_tiny .*depth"),
        ({"model_args": [3]}, "model_args is .3., expected a dict"),
        ({"norm_mean": [0.5, 0.5]}, "norm_mean is .0.5, 0.5., expected one number for each of num_channels=3"),
        ({"num_channels": 4}, "norm_mean is .*expected one number for each of num_channels=4"),
        ({"timm_model": "levit_128s"}, "not a multiple of levit_128s's stride of 64; set image_size=256"),
        ({"timm_model": "mvitv2_tiny", "image_size": 100}, "image_size is 100.*set image_size=96"),
    ],
)
def test_what_cannot_be_built_is_said(fields, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        RadioTimmModel(RadioTimmConfig(**fields))


def test_sizes_that_a_network_does_not_take_are_named():
    free, fixed = build("convnext"), build("swinv2")
    assert (free.min_resolution_step, free.max_resolution, free.preferred_resolution) == (32, 2048, 224)
    assert (fixed.min_resolution_step, fixed.max_resolution, fixed.preferred_resolution) == (64, 64, 64)
    assert free.get_nearest_supported_resolution(75, 100) == (64, 96)
    assert fixed.get_nearest_supported_resolution(75, 200) == (64, 64)
    with pytest.raises(ValueError, match="50x64 pixels, but sides must be multiples of 32"):
        free(torch.rand(1, 3, 50, 64))
    with pytest.raises(ValueError, match="96x64 pixels, but swinv2_tiny_window8_256 is built for one size, 64x64"):
        fixed(torch.rand(1, 3, 96, 64))
    with pytest.raises(ValueError, match="uint8"):
        free(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(ValueError, match="'dino'"):
        free(torch.rand(1, 3, 64, 64), adaptors=["dino"])


def test_checkpoints_and_configurations_that_do_not_fit_are_named(tmp_path):
    model = build("resnetv2")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a RadioTimmConfig, got a RadioConfig"):
        RadioTimmModel(RadioConfig())
    state = load_file(tmp_path / "model.safetensors")
    name = "network.stages.3.blocks.0.conv1.weight"
    save_file({key: value for key, value in state.items() if key != name}, tmp_path / "model.safetensors")
    for allowed in ((), ["network"]):
        with pytest.raises(ValueError, match=f"1 weights of the network are not in the checkpoint, {name}"):
            RadioTimmModel.from_pretrained(tmp_path, allow_missing=allowed)
    with pytest.raises(ValueError, match='summary is .cls., expected "mean"'):
        RadioTimmConfig.for_training("resnetv2_18", {}, "cls")
    with pytest.raises(ValueError, match="RadioTimmConfig has no field drop_path"):
        RadioTimmConfig.for_training("resnetv2_18", {}, drop_path=0.1)


def test_a_new_number_of_channels():
    fields = {"num_channels": 1, "norm_mean": [0.5], "norm_std": [0.5], "adaptors": {}}
    model = build("convnext", **fields)
    assert model(torch.rand(1, 1, 32, 32)).grid == (1, 1)


def test_timm_is_imported_in_one_place():
    import transformers_radio.modeling.configuration_radio_timm as configuration
    import transformers_radio.modeling.modeling_radio_timm as modeling

    assert "import timm" not in inspect.getsource(configuration)
    assert inspect.getsource(modeling).count("import timm\n") == 1

import json

import pytest
import torch
import transformers

from transformers_radio import RadioConfig, RadioModel

ADAPTOR = {"summary_dim": 24, "feature_dim": 16, "hidden_dim": 20, "summary_token": 0, "teacher": "clip"}


@pytest.mark.parametrize(
    ("size", "millions"),
    [
        ("vit-ti-16", 8.63),
        ("vit-s-16", 27.88),
        ("vit-b-16", 98.23),
        ("vit-l-16", 319.88),
        ("vit-h-16", 651.64),
        ("vit-so400m-16", 431.24),
        ("vit-g-16", 1159.62),
    ],
)
def test_named_sizes_have_the_published_parameter_counts(size, millions):
    with torch.device("meta"):
        model = RadioModel(RadioConfig.from_size(size))
    assert model.embeddings.position_embedding.shape[1] == 128**2
    assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=1e-3)


def test_a_whole_mlp_ratio_is_taken_and_saved_as_transformers_reads_it(tmp_path):
    config = RadioConfig(mlp_ratio=2, summary_idxs=[0, 1])
    assert config == RadioConfig(mlp_ratio=2.0, summary_idxs=[0, 1])
    config.save_pretrained(tmp_path)
    native = transformers.RadioConfig.from_pretrained(tmp_path)
    assert native.mlp_ratio == 2.0 and isinstance(native.mlp_ratio, float)


def test_from_size_takes_overrides_and_refuses_unknown_names():
    config = RadioConfig.from_size("vit-b-16", num_cls_tokens=1, max_img_size=1024)
    assert (config.num_cls_tokens, config.max_img_size, config.num_hidden_layers) == (1, 1024, 12)
    assert set(RadioConfig.sizes()) >= {"vit-ti-16", "vit-g-16"}
    with pytest.raises(ValueError, match="vit-b-14.*vit-b-16"):
        RadioConfig.from_size("vit-b-14")


@pytest.mark.parametrize(
    ("depth", "fields", "expected"),
    [
        (32, {"window_num_windowed": 5}, [5, 11, 17, 23, 29, 31]),
        (12, {}, [2, 5, 8, 11]),
        (24, {}, [5, 11, 17, 23]),
        (32, {}, [7, 15, 23, 31]),
        (40, {"window_num_global": 8}, list(range(4, 40, 5))),
        (27, {}, [5, 11, 17, 23, 26]),
        (3, {"window_num_global": 3}, [0, 1, 2]),
        (3, {"window_num_windowed": 7}, [2]),
        (2, {}, [0, 1]),  # shallower than the number of global blocks
    ],
)
def test_global_blocks_of_released_models(depth, fields, expected):
    assert RadioConfig(num_hidden_layers=depth, **fields).global_blocks == expected


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"adaptors": {"clip": {**ADAPTOR, "summary_token": 3}}}, ["clip", "summary_token", "3"]),
        ({"adaptors": {"values": ADAPTOR}}, ["values", "ModuleDict", "another"]),
        ({"adaptors": {"training": ADAPTOR}}, ["training", "ModuleDict", "another"]),
        ({"adaptors": {"clip": {"summary_dim": 4}}}, ["clip", "feature_dim", "hidden_dim"]),
        ({"adaptors": {"clip": {**ADAPTOR, "width": 4}}}, ["clip", "width"]),
        ({"adaptors": {"clip": {**ADAPTOR, "hidden_dim": 0}}}, ["clip", "hidden_dim", "0"]),
        ({"adaptors": {"clip": {**ADAPTOR, "summary_dim": None, "feature_dim": None}}}, ["clip", "both None"]),
        ({"adaptors": {"clip": {**ADAPTOR, "mlp_version": "v3"}}}, ["clip", "v3", "v2"]),
        ({"adaptors": {"clip": {**ADAPTOR, "spatial_mlp_version": "conv"}}}, ["clip", "conv", "attn"]),
        ({"adaptors": {"a.b": ADAPTOR}}, ["a.b"]),
        ({"summary_idxs": [3]}, ["summary_idxs", "3"]),
        ({"summary_idxs": []}, ["summary_idxs"]),
        ({"num_cls_tokens": 0}, ["num_cls_tokens", "0", "mean"]),
        ({"window_size": 0}, ["window_size", "0"]),
        ({"window_num_global": 0}, ["window_num_global", "0"]),
        ({"train_window_sizes": [4, -1]}, ["train_window_sizes", "-1"]),
        ({"train_window_probability": 1.5}, ["train_window_probability", "1.5"]),
        ({"pos_dropout": 1.0}, ["pos_dropout", "1.0"]),
        ({"cpe_scale": [0.5, 0.1]}, ["cpe_scale", "0.5"]),
        ({"max_img_size": 1000}, ["max_img_size", "1000", "16"]),
        ({"preferred_resolution": 500}, ["preferred_resolution", "500", "16"]),
        ({"num_attention_heads": 7}, ["num_attention_heads", "7"]),
        ({"num_attention_heads": 0}, ["num_attention_heads", "0"]),
        ({"use_swiglu_ffn": True}, ["use_swiglu_ffn"]),
        ({"video_temporal_patch_size": 2}, ["video_temporal_patch_size", "2"]),
    ],
)
def test_impossible_values_raise_and_are_named(fields, words):
    with pytest.raises(ValueError) as error:
        RadioConfig(**fields)
    for word in words:
        assert word in str(error.value)


def test_late_changes_are_refused(tmp_path):
    config = RadioConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_img_size=64)
    with pytest.raises(ValueError, match="RadioConfig: window_num_global is 0, expected"):
        config.window_num_global = 0
    config.num_attention_heads = 5  # fits, as long as the width may still follow
    for use in (RadioModel, lambda config: config.save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match="RadioConfig: num_attention_heads is 5, expected a divisor"):
            use(config)


def test_summary_reads_the_tokens_of_the_adaptors_that_have_one():
    adaptors = {
        "dino": {**ADAPTOR, "summary_token": 2},
        "sam": {**ADAPTOR, "summary_dim": None, "summary_token": 1},
        "clip": ADAPTOR,
    }
    assert RadioConfig(adaptors=adaptors).summary_idxs == [0, 2]
    # without adaptors as transformers does, but never beyond the tokens there are
    assert RadioConfig().summary_idxs == transformers.RadioConfig().summary_idxs
    assert RadioConfig(num_cls_tokens=1).summary_idxs == [0]


def test_preferred_resolution_fits_patch_and_table():
    assert RadioConfig().preferred_resolution == 432
    assert RadioConfig(patch_size=14, max_img_size=1050).preferred_resolution == 420
    assert RadioConfig(max_img_size=224).preferred_resolution == 224


FULL = {
    "adaptors": {"clip": ADAPTOR, "sam": {"summary_dim": None, "feature_dim": 8, "hidden_dim": 8}},
    "summary_type": "mean",
    "final_norm": True,
    "mlp_norm": True,
    "window_size": 4,
    "window_num_windowed": 2,
    "window_prefix": "average",
    "train_window_sizes": [4, 8],
    "train_window_probability": 0.25,
    "cpe_sampling": False,
    "cpe_scale": [0.2, 0.9],
    "pos_dropout": 0.1,
    "preferred_resolution": 256,
}


def test_save_and_load_give_the_same_configuration_again_and_again(tmp_path):
    config = RadioConfig(**FULL)
    for turn in ("a", "b"):
        config.save_pretrained(tmp_path / turn)
        config = RadioConfig.from_pretrained(tmp_path / turn)
        for name, value in FULL.items():
            if name != "adaptors":
                assert getattr(config, name) == value, name
        assert {k: config.adaptors["clip"][k] for k in ADAPTOR} == ADAPTOR
        assert config.use_swiglu_ffn is False
    assert (tmp_path / "a/config.json").read_text() == (tmp_path / "b/config.json").read_text()
    assert RadioConfig(**config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    "fields", [{"final_norm": True}, {"mlp_norm": True}, {"summary_type": "mean"}, {"window_size": 4}]
)
def test_transformers_own_class_refuses_what_it_would_misread(tmp_path, fields):
    RadioConfig(**fields).save_pretrained(tmp_path)
    (name, value) = next(iter(fields.items()))
    for load in (transformers.RadioConfig.from_pretrained, transformers.AutoConfig.from_pretrained):
        with pytest.raises(Exception) as error:
            load(tmp_path)
        for words in (f"{name}={value!r}", "trust_remote_code=True", "pip install transformers_radio"):
            assert words in str(error.value)
    assert getattr(RadioConfig.from_pretrained(tmp_path), name) == value


def test_transformers_own_class_reads_what_it_would_get_right(tmp_path):
    config = RadioConfig(adaptors=FULL["adaptors"], train_window_sizes=[4], cpe_sampling=False, pos_dropout=0.1)
    config.save_pretrained(tmp_path)
    native = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(native) is transformers.RadioConfig
    shared = transformers.RadioConfig().to_dict().keys() - {
        "_name_or_path",
        "transformers_version",
        "video_temporal_patch_size",
    }
    assert {k: native.to_dict()[k] for k in shared} == {k: config.to_dict()[k] for k in shared}


def test_native_configuration_file_means_the_same_to_us(tmp_path):
    native = transformers.RadioConfig(hidden_size=64, num_attention_heads=4, num_registers=1, summary_idxs=[2])
    native.save_pretrained(tmp_path)
    ours = RadioConfig.from_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert {k: ours.to_dict()[k] for k in fields} == fields

import json

import pytest
import torch
import transformers

from transformers_radio import RadioBackboneConfig, RadioConfig, RadioModel, RadioVisionTowerConfig

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
        ({"adaptors": {1: ADAPTOR}}, ["adaptor 1"]),
        ({"summary_idxs": [3]}, ["summary_idxs", "3"]),
        ({"summary_idxs": []}, ["summary_idxs"]),
        ({"num_cls_tokens": 0}, ["num_cls_tokens", "0", "mean"]),
        ({"window_size": -1}, ["window_size", "-1"]),
        ({"window_num_global": 0}, ["window_num_global", "0"]),
        ({"train_window_sizes": [4, -1]}, ["train_window_sizes", "-1"]),
        ({"train_window_probability": 1.5}, ["train_window_probability", "1.5"]),
        ({"pos_dropout": 1.0}, ["pos_dropout", "1.0"]),
        ({"cpe_scale": [0.5, 0.1]}, ["cpe_scale", "0.5"]),
        ({"max_img_size": 1000}, ["max_img_size", "1000", "16"]),
        ({"preferred_resolution": 500}, ["preferred_resolution", "500", "16"]),
        ({"num_attention_heads": 7}, ["num_attention_heads", "7"]),
        ({"num_attention_heads": 0}, ["num_attention_heads", "0"]),
        ({"use_swiglu_ffn": True, "mlp_norm": True}, ["mlp_norm"]),
        ({"video_temporal_patch_size": 2}, ["video_temporal_patch_size", "2"]),
    ],
)
def test_impossible_values_raise_and_are_named(fields, words):
    with pytest.raises(ValueError) as error:
        RadioConfig(**fields)
    for word in words:
        assert word in str(error.value)


NOT_INTEGERS = (None, True, 2.0, "2", [2], float("nan"), -1, 10**9)
NOT_NUMBERS = (None, True, "0.1", [0.1], float("nan"), float("inf"), -1.0, 1e9)
NOT_BOOLEANS = (None, 1, 0, "true", 1.0, [])
NOT_NAMES = (None, True, 3, "x", ["cls"])
WRONG = {
    **dict.fromkeys(["hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size"], (*NOT_INTEGERS, 0)),
    **dict.fromkeys(["num_channels", "max_img_size", "window_num_global"], (*NOT_INTEGERS, 0)),
    **dict.fromkeys(["num_cls_tokens", "num_registers"], NOT_INTEGERS),
    **dict.fromkeys(["window_size", "window_num_windowed", "preferred_resolution"], NOT_INTEGERS[1:]),
    **dict.fromkeys(["mlp_ratio", "initializer_range"], NOT_NUMBERS),
    **dict.fromkeys(["attention_probs_dropout_prob", "hidden_dropout_prob", "drop_path_rate"], NOT_NUMBERS),
    **dict.fromkeys(["layer_norm_eps", "pos_dropout", "train_window_probability"], NOT_NUMBERS),
    "layerscale_value": (None, True, "1", float("nan"), float("inf")),
    **dict.fromkeys(["qkv_bias", "final_norm", "mlp_norm", "cpe_sampling"], NOT_BOOLEANS),
    **dict.fromkeys(["summary_type", "window_prefix", "hidden_act"], NOT_NAMES),
    **dict.fromkeys(["summary_idxs", "train_window_sizes"], (True, 1, "01", [1.0], [True], [-1], [None], {})),
    **dict.fromkeys(
        ["norm_mean", "norm_std"], (None, 0.5, [0.5, 0.5], ["a", "b", "c"], [float("nan")] * 3, [True] * 3)
    ),
    "cpe_scale": (None, 0.5, [0.5], ["a", "b"], [0.0, 1.0], [True, True], [0.1, float("nan")]),
    "adaptors": (None, 3, [], "clip", {"clip": None}, {"clip": 3}, {"clip": []}),
    "use_swiglu_ffn": (None, "yes", 1),
    "patch_bias": (None, "yes", 1),
    "feature_normalizer": (None, "yes", 1),
    "intermediate_normalizer": (True, "yes", 1),
    "converted_from": ("nvidia", 1, []),
    "dtype": (3, "x", "int8", "nn", torch.int64, []),
    "id2label": (3, [], {"a": "b"}, {1: 2}, {None: "a"}),
    "num_labels": (-1, True, 2.0, "2", 10**9),
    "problem_type": (3, "x", []),
    "label2id": (3, []),
    "architectures": (3, "x", [3]),
}


@pytest.mark.parametrize("config_class", [RadioConfig, RadioBackboneConfig])
@pytest.mark.parametrize(("name", "values"), WRONG.items())
def test_a_field_of_another_type_or_out_of_its_range(config_class, name, values):
    for value in values:
        with pytest.raises(ValueError) as error:
            config_class(**{name: value})
        message = str(error.value)
        assert message.startswith(config_class.__name__) and name in message and "\n" not in message, (value, message)


WRONG_ADAPTOR = {
    "summary_token": (None, True, 1.0, "0", -1, 3),
    **dict.fromkeys(["summary_dim", "feature_dim", "hidden_dim", "upsample_factor"], (True, 2.0, "2", 0, -1, 10**9)),
    "mlp_num_inner": (None, True, 1.0, -1, 10**9),  # the last would be built for hours
    "mlp_version": (None, 2, ["v2"], "v3"),
    "spatial_mlp_version": (2, ["v2"], "v3"),
    "teacher": (None, 3, ["a"]),
}


@pytest.mark.parametrize(("name", "values"), WRONG_ADAPTOR.items())
def test_a_field_of_an_adaptor_of_another_type_or_out_of_its_range(name, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"^RadioConfig: adaptor 'clip': {name} is [^\n]*$"):
            RadioConfig(adaptors={"clip": {**ADAPTOR, name: value}})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"out_indices": []}, "out_indices is \\[\\]"),
        ({"out_indices": [-5]}, "out_indices is \\[-5\\], expected indices into the 3 stages"),
        ({"out_indices": [3]}, "out_indices is \\[3\\]"),
        ({"out_indices": 1}, "out_indices is 1"),
        ({"out_indices": [1.0]}, "out_indices is \\[1.0\\]"),
        ({"out_indices": [True]}, "out_indices is \\[True\\]"),
        ({"out_features": []}, "out_features is \\[\\]"),
        ({"out_features": "stem"}, "out_features is 'stem'"),
        ({"out_features": [1]}, "out_features is \\[1\\]"),
        ({"out_features": ["stage9"]}, "out_features must be a subset of stage_names.*stage9"),
        ({"reshape_hidden_states": 1}, "reshape_hidden_states is 1"),
        ({"stage_names": ["stem"]}, "stage_names is \\['stem'\\]"),
    ],
)
def test_feature_maps_that_do_not_exist(fields, words, tmp_path):
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    RadioConfig(**small).save_pretrained(tmp_path)
    for make in (
        lambda: RadioBackboneConfig(**small, **fields),
        lambda: RadioBackboneConfig.from_pretrained(tmp_path, **fields),
    ):
        with pytest.raises(ValueError, match=f"^[^\n]*{words}[^\n]*$"):
            make()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"radio_config": 3}, "the configuration is 3"),
        ({"radio_config": {"hidden_size": True}}, "hidden_size is True"),
        ({"radio_config": {"model_type": "dinov2"}}, "model_type is 'dinov2'"),
        ({"radio_config": transformers.Dinov2Config()}, "expected a RadioConfig, got a Dinov2Config"),
        ({"image_size": 100}, "image_size is 100, expected a multiple of patch_size 16"),
        ({"image_size": True}, "image_size is True"),
    ],
)
def test_a_tower_s_fields(fields, words):
    with pytest.raises(ValueError, match=f"^[^\n]*{words}[^\n]*$"):
        RadioVisionTowerConfig(**fields)


@pytest.mark.parametrize("config_class", [RadioConfig, RadioBackboneConfig, RadioVisionTowerConfig])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not a valid JSON file"),
        ("{", "not a valid JSON file"),
        ("[1]", "the configuration|object has no attribute"),
        ("{}", "has no config.json, or an empty one"),
        ("null", "cannot be read"),
        ('{"model_type": "dinov2"}', "model_type is 'dinov2', expected one of radio"),
        ('{"model_type": "radio", "hidden_size": 0}', "hidden_size is 0, expected an integer"),
        ('{"model_type": "radio", "dtype": "x"}', "dtype is 'x'"),
        ('{"model_type": "radio", "to_dict": 1}', "has no field to_dict"),
        ('{"model_type": "radio", "num_summary_tokens": 1}', "num_summary_tokens follows from other fields"),
    ],
)
def test_a_damaged_configuration_is_named_with_its_folder(tmp_path, config_class, text, words):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises((ValueError, OSError), match=words) as error:
        config_class.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("fields", [None, 3, [], "x", {1: 2}])
def test_what_is_not_a_dict_of_fields(fields):
    with pytest.raises(ValueError, match="RadioConfig: the configuration is .*, expected a dict of fields"):
        RadioConfig.from_dict(fields)


def test_whole_numbers_are_taken_where_floats_are_meant():
    config = RadioConfig(drop_path_rate=0, norm_mean=(0, 0, 0), norm_std=[1, 1, 1], pos_dropout=0)
    assert config.drop_path_rate == 0.0 and config.norm_mean == [0.0] * 3 and config.norm_std == [1.0] * 3


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
    # without adaptors as transformers does, but never more tokens than there are
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

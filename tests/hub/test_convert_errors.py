"""Nothing silently wrong: tensors, settings and files that cannot be honored are refused by name."""

import argparse
import json
import logging
import pickle
import re
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.nvidia_files import (
    CLIP,
    LAYOUTS,
    WIDTH,
    Randoms,
    arguments,
    backbone,
    make,
    reparametrize,
    write_hub,
    write_pth,
)
from transformers_radio import ERadioModel, RadioConfig, RadioModel
from transformers_radio.hub.convert import load_nvidia_checkpoint

PLAIN = "radio_v2.5-b"


def changed(tmp_path, state=(), args=(), drop=(), name=PLAIN):
    """A .pth.tar of a layout with other tensors and arguments, and without some."""
    written, stored, *_ = make(name)
    stored = {**stored, **dict(state)}
    kept = {key: tensor for key, tensor in stored.items() if key not in drop}
    return write_pth(tmp_path / f"{name}.pth.tar", {**written, **dict(args)}, kept)


@pytest.mark.parametrize(
    ("state", "named"),
    [
        ({"base_model.blocks.0.attn.q_norm.weight": torch.ones(8)}, "blocks.0.attn.q_norm.weight"),
        ({"base_model.patch_generator.video_embedder.weight": torch.ones(32, 8)}, "video_embedder"),
        ({"base_model.norm.weight": torch.ones(32), "base_model.norm.bias": torch.ones(32)}, "args.model_norm"),
        ({"base_model.blocks.7.norm1.weight": torch.ones(32)}, r"blocks \[0, 1, 2, 3, 7\]"),
        ({"teacher_ema.weight": torch.ones(3)}, "teacher_ema.weight"),
        ({"_heads.clip2.fc1.weight": torch.ones(3, 3)}, "clip2"),
        ({"_heads.clip.other.weight": torch.ones(3, 3)}, "adaptors.clip.summary_head.other.weight"),
        ({"_heads.clip.final.2.weight": torch.ones(3, 3)}, r"final.2.weight has shape \(3, 3\), expected"),
        ({"base_model.patch_generator.cls_token.token": torch.ones(5, WIDTH)}, "5 CLS and register tokens"),
        ({"base_model.patch_generator.pos_embed": torch.ones(1, 35, WIDTH)}, "position table"),
        ({"base_model.blocks.1.attn.qkv.weight": torch.ones(95, WIDTH)}, "qkv"),
        ({"base_model.blocks.1.mlp.fc2.weight": torch.full((WIDTH, 4 * WIDTH), torch.nan)}, "NaN"),
        ({"_feature_normalizer.mean": torch.full((32,), torch.nan), "_feature_normalizer.tx": torch.eye(32)}, "NaN"),
        ({"input_conditioner.norm_std": torch.zeros(3, 1, 1)}, "norm_std"),
        ({"base_model.blocks.0.mlp.fc1.parametrizations.weight.0.scale": torch.ones(1, 1)}, "original is missing"),
        ({"base_model.merge.weight": torch.ones(3)}, "C-RADIOv4-H"),
        ({"base_model.blocks.0.norm1.weight": torch.ones(WIDTH, dtype=torch.int32)}, "int32, expected torch.float32"),
        ({"base_model.blocks.0.norm1.weight": torch.ones(WIDTH, dtype=torch.float64)}, "weights in torch.float64"),
        ({"base_model.blocks.0.norm1.weight": torch.ones(0)}, r"shape \(0,\), expected \(32,\)"),
    ],
)
def test_tensors_without_a_place_are_named(tmp_path, state, named):
    with pytest.raises(ValueError, match=named) as error:
        load_nvidia_checkpoint(changed(tmp_path, state))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"model_kwargs": {"num_heads": 4, "qk_norm": True}}, "model_kwargs.qk_norm"),
        ({"model_kwargs": {"num_heads": 5}}, "num_heads is 5"),
        ({"model_kwargs": {"num_heads": 4, "init_values": 0.1}}, "init_values is 0.1, but the file has no LayerScale"),
        ({"model": "vit_base_patch16_224_mlpnorm"}, "mlpnorm', but the file has no MLP norm"),
        ({"mlp_version": "v3"}, "args.mlp_version is 'v3', expected one of v1, v2, attn"),
        ({"spatial_mlp_version": "v3"}, "args.spatial_mlp_version is 'v3'"),
        ({"model_kwargs": {"num_heads": 4, "depth": 12}}, "depth is 12"),
        ({"model_kwargs": {"num_heads": 4, "patch_size": 14}}, "14"),
        ({"model_kwargs": {}}, "num_heads"),
        ({"model_kwargs": 3}, "model_kwargs"),
        ({"model": "eradio"}, "eradio"),
        ({"in_chans": 4}, "in_chans"),
        ({"model_norm": True}, "model_norm"),
        ({"register_multiple": 5}, "register_multiple"),
        ({"cpe_num_registers": 5}, "cpe_num_registers"),
        ({"cls_token_per_teacher": True, "teachers": []}, "teachers"),
        ({"teachers": [{"type": "sam"}]}, "teachers.0."),
        ({"teachers": [CLIP]}, "heads of 'dino_v2'"),
        ({"teachers": [{**CLIP, "mlp_version": "v1"}, *LAYOUTS[PLAIN]["teachers"][1:]]}, "mlp_version of clip"),
        ({"teachers": [{**CLIP, "fd_upsample_factor": 3}, *LAYOUTS[PLAIN]["teachers"][1:]]}, "fd_upsample_factor"),
        ({"token_merging": True}, "token_merging"),
        ({"model_kwargs": {"num_heads": "four"}}, "num_heads is 'four', expected a whole number"),
        ({"in_chans": "x"}, "in_chans is 'x', expected a whole number"),
        ({"cpe_max_size": 96.5}, "cpe_max_size is 96.5, expected a whole number"),
        ({"cpe_num_registers": "x"}, "cpe_num_registers is 'x', expected a whole number"),
        ({"register_multiple": [8]}, "register_multiple"),
        ({"spectral_reparam": {"eps": "x"}}, "eps is 'x', expected a number"),
        ({"teachers": [{**CLIP, "token_slot": "x"}]}, "token_slot of clip is 'x', expected a whole number"),
    ],
)
def test_arguments_that_cannot_be_honored_are_named(tmp_path, args, named):
    with pytest.raises(ValueError, match=named):
        load_nvidia_checkpoint(changed(tmp_path, args=args))


def test_a_repeated_teacher_is_one_teacher(tmp_path):
    """Its heads are those under the index of its first entry; CLS tokens count names."""
    args, stored, *_ = make("radio_v2")
    first = load_nvidia_checkpoint(write_pth(tmp_path / "radio_v2.pth.tar", args, stored))
    again = {k.replace("_heads.0.", "_heads.5."): v + 1 for k, v in stored.items() if k.startswith("_heads.0.")}
    args = {**args, "teachers": [*args["teachers"], CLIP]}
    second = load_nvidia_checkpoint(write_pth(tmp_path / "radio_v2.pth.tar", args, {**stored, **again}))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    # in front of others it shifts their places, and nothing says which CLS tokens they read
    args["teachers"] = [CLIP, *args["teachers"][:-1]]
    with pytest.raises(ValueError, match="no token_slot"):
        load_nvidia_checkpoint(write_pth(tmp_path / "radio_v2.pth.tar", args, stored))


def test_keys_are_matched_with_their_dot(tmp_path):
    """Heads 1 and 10, sam and sam3 are not the same."""
    args, stored, _, heads, _ = make("c-radio_v4-h")
    names = ["siglip2-g", "dino_v3_7b", "sam3"] + [f"t{i}" for i in range(3, 10)] + ["sam"]
    args["teachers"] += [{"name": name, "type": "sam", "use_summary": False} for name in names[3:]]
    rows = stored["base_model.patch_generator.cls_token.token"]
    stored["base_model.patch_generator.cls_token.token"] = torch.cat([rows, rows])  # 11 CLS + 9
    stored = {k: v for k, v in stored.items() if not k.startswith(("_heads.", "_feature"))}
    for index, teacher in ((1, "dino_v3_7b"), (10, "sam3")):
        stored |= {f"_feature_projections.{index}.{k}": v for k, v in heads[teacher][1].items()}
    model = load_nvidia_checkpoint(write_pth(tmp_path / "c-radio_v4-h.pth.tar", args, stored))
    assert list(model.adaptors) == ["dino_v3_7b", "sam"]
    for ours, theirs in (("dino_v3_7b", "dino_v3_7b"), ("sam", "sam3")):
        assert torch.equal(model.adaptors[ours].feature_head.fc1.weight, heads[theirs][1]["fc1.weight"])
    assert (model.config.num_cls_tokens, model.config.num_registers) == (11, 9)


def test_registers_are_a_whole_multiple_where_it_divides(tmp_path):
    args, stored, *_ = make(PLAIN)
    rows = stored["base_model.patch_generator.cls_token.token"][:1].repeat(8, 1)  # 4 CLS + 4
    path = write_pth(
        tmp_path / "x.pth.tar",
        {**args, "register_multiple": 4},
        {**stored, "base_model.patch_generator.cls_token.token": rows},
    )
    assert load_nvidia_checkpoint(path).config.num_registers == 4


def test_summary_idxs_come_from_the_buffer_or_are_rebuilt(tmp_path):
    args, stored, *_ = make(PLAIN, "hub")
    assert load_nvidia_checkpoint(write_hub(tmp_path / "a", args, stored, PLAIN)).config.summary_idxs == [0, 1, 2]
    other = {**stored, "radio_model.summary_idxs": torch.tensor([2, 0])}
    assert load_nvidia_checkpoint(write_hub(tmp_path / "b", args, other, PLAIN)).summary_idxs.tolist() == [2, 0]
    del stored["radio_model.summary_idxs"]
    model = load_nvidia_checkpoint(write_hub(tmp_path / "c", args, stored, PLAIN))
    assert model.config.summary_idxs == model.summary_idxs.tolist() == [0, 1, 2]


def test_the_average_is_preferred_and_a_file_without_conditioner_has_clips(tmp_path):
    args, stored, *_ = make(PLAIN)
    stored = {k: v for k, v in stored.items() if not k.startswith("input_conditioner.")}
    ema = {k: v * 2 for k, v in stored.items()}
    model = load_nvidia_checkpoint(write_pth(tmp_path / "a.pth.tar", args, stored, ema))
    key = "base_model.patch_generator.pos_embed"
    assert torch.equal(model.embeddings.position_embedding, 2 * stored[key])
    assert torch.equal(model.adaptors["clip"].summary_head.fc1.weight, 2 * stored["_heads.clip.fc1.weight"])
    assert model.config.norm_mean == RadioConfig().norm_mean


def test_parts_that_the_average_lacks_come_from_the_trained_weights(tmp_path):
    args, stored, *_ = make("radio_v2.5-h-norm")
    ema = {k.replace("base_model.", "module.base_model."): v * 2 for k, v in stored.items() if k[0] == "b"}
    model = load_nvidia_checkpoint(write_pth(tmp_path / "a.pth.tar", args, stored, ema))
    assert torch.equal(model.embeddings.position_embedding, 2 * stored["base_model.patch_generator.pos_embed"])
    assert list(model.adaptors) == ["clip", "siglip", "dino_v2", "sam"]
    assert torch.equal(model.adaptors["clip"].summary_head.fc1.weight, stored["_heads.clip.fc1.weight"])
    assert torch.equal(model.feature_normalizer.tx, stored["_feature_normalizer.tx"])
    assert torch.equal(model.input_conditioner.norm_mean, stored["input_conditioner.norm_mean"])


def test_the_configs_statistics_count_where_the_file_has_none(tmp_path):
    args, stored, *_ = make(PLAIN, "hub")
    bare = {k: v for k, v in stored.items() if "conditioner" not in k}
    found = {"norm_mean": [0.5, 0.4, 0.3], "norm_std": [0.2, 0.2, 0.1]}
    model = load_nvidia_checkpoint(write_hub(tmp_path / "a", args, bare, PLAIN, **found))
    assert model.config.norm_mean == found["norm_mean"] and model.config.norm_std == found["norm_std"]
    torch.testing.assert_close(model.input_conditioner.norm_mean.flatten(), torch.tensor(found["norm_mean"]))
    for wrong, named in (([0.5, 0.4, 0.3], "but the file has"), ("x", "norm_mean is 'x', expected a number")):
        with pytest.raises(ValueError, match=named):
            load_nvidia_checkpoint(write_hub(tmp_path / "b", args, stored, PLAIN, norm_mean=wrong))


def test_heads_by_the_width_are_said(tmp_path, monkeypatch):
    state = {f"base_model.{k}": v for k, v in backbone(LAYOUTS[PLAIN], Randoms(), 192, 1).items()}
    said, logger = [], logging.getLogger("transformers_radio.hub.nvidia_config")
    monkeypatch.setattr(logger, "warning", lambda *words: said.append(words))
    for name in ("vit_tiny_patch16_224", "my_vit"):
        args = {**arguments(LAYOUTS[PLAIN], 192), "model": name, "model_kwargs": {}}
        assert load_nvidia_checkpoint(write_pth(tmp_path / "a.pth.tar", args, state)).config.num_attention_heads == 3
        assert bool(said) == (name == "my_vit")
    assert said[0][1:] == ("my_vit", 3, 192)


def test_variants_beside_the_model_are_left_alone_and_a_tensor_in_two_shards_is_an_error(tmp_path):
    args, stored, *_ = make(PLAIN, "hub")
    folder = write_hub(tmp_path / "hub", args, stored, PLAIN)
    expected = load_nvidia_checkpoint(folder).state_dict()
    name = "radio_model.model.patch_generator.pos_embed"
    save_file({name: torch.zeros(1, 36, WIDTH)}, folder / "a.safetensors")
    for key, tensor in load_nvidia_checkpoint(folder).state_dict().items():
        assert torch.equal(tensor, expected[key])
    (folder / "model.safetensors").rename(folder / "b.safetensors")
    with pytest.raises(ValueError, match="pos_embed is in a.safetensors and in b.safetensors"):
        load_nvidia_checkpoint(folder)


def test_spectral_versions_and_eps(tmp_path):
    args, stored, *_ = make(PLAIN)
    stored = reparametrize(stored, 2)
    name = "base_model.blocks.0.mlp.fc1.parametrizations.weight"
    for eps in (1e-12, 0.25):
        args["spectral_reparam"] = {"eps": eps}
        model = load_nvidia_checkpoint(write_pth(tmp_path / "a.pth.tar", args, stored))
        weight = stored[f"{name}.original"]
        sigma = stored[f"{name}.0._u"] @ weight @ stored[f"{name}.0._v"]
        scale = torch.nn.functional.softplus(stored[f"{name}.0.scale"]) + 0.05
        torch.testing.assert_close(model.encoder.layer[0].mlp.fc1.weight.data, weight * scale / (sigma + eps))
    version = stored.pop(f"{name}.0._sn_version")
    with pytest.raises(ValueError, match="mlp.fc1.*_sn_version is missing, which"):
        load_nvidia_checkpoint(write_pth(tmp_path / "a.pth.tar", args, stored))
    stored[f"{name}.0._sn_version"] = version + 1
    with pytest.raises(ValueError, match="_sn_version is 3"):
        load_nvidia_checkpoint(write_pth(tmp_path / "a.pth.tar", args, stored))


def test_weight_noise_has_no_tensors_and_changes_nothing(tmp_path):
    """DAMP acts in training alone: a parametrization with nothing but the weight."""
    args, stored, *_ = make("c-radio_v4-h")
    plain = load_nvidia_checkpoint(write_pth(tmp_path / "a.pth.tar", args, stored))
    noisy = {
        re.sub(r"^(base_model[.]blocks.*[.]fc1)[.]weight$", r"\1.parametrizations.weight.original", name): tensor
        for name, tensor in stored.items()
    }
    assert set(noisy) != set(stored)
    model = load_nvidia_checkpoint(write_pth(tmp_path / "b.pth.tar", args, noisy))
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in plain.state_dict().items())


def test_adaptors_are_chosen_by_name(tmp_path):
    path = changed(tmp_path)
    assert list(load_nvidia_checkpoint(path, ["sam", "clip"]).adaptors) == ["sam", "clip"]
    assert list(load_nvidia_checkpoint(path, []).adaptors) == []
    with pytest.raises(ValueError, match=r"adaptor_names is \['dino'\].*'dino_v2'"):
        load_nvidia_checkpoint(path, ["dino"])
    args, stored, *_ = make(PLAIN, "hub")
    bare = {key: value for key, value in stored.items() if ".adaptors." not in key}
    folder = write_hub(tmp_path / "hub", args, bare, PLAIN)
    assert not load_nvidia_checkpoint(folder).adaptors
    with pytest.raises(ValueError, match="this file has no heads"):
        load_nvidia_checkpoint(folder, ["clip"])


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"token_pruning": {"ratio": 2}}, "token_pruning"),
        ({"preferred_resolution": [432, 512]}, "preferred_resolution"),
        ({"patch_size": 14}, "patch_size"),
        ({"feature_normalizer_config": {"embed_dim": 32}}, "feature_normalizer_config"),
        ({"adaptor_configs": {"clip": {"rotation": 2}}}, "adaptor_configs.clip.rotation"),
        ({"adaptor_names": ["clip", "owl"]}, "owl"),
        ({"adaptor_names": 3}, "adaptor_names is 3, expected a list"),
        ({"adaptor_configs": [1]}, "adaptor_configs is .1., expected settings"),
        ({"preferred_resolution": "big"}, "preferred_resolution is 'big', expected a whole number"),
        ({"version": "c-radio_v3-b", "vitdet_window_size": 8}, "vitdet_window_size is 8"),
        ({"version": "c-radio_v4-1d-h"}, "C-RADIOv4-1D-H"),
    ],
)
def test_hub_fields_that_cannot_be_honored_are_named(tmp_path, config, named):
    args, stored, *_ = make(PLAIN, "hub")
    folder = write_hub(tmp_path / "hub", args, stored, **{"version": PLAIN, **config})
    with pytest.raises(ValueError, match=named):
        load_nvidia_checkpoint(folder)


def test_windows_of_the_hub_config(tmp_path):
    args, stored, *_ = make(PLAIN, "hub")
    model = load_nvidia_checkpoint(write_hub(tmp_path / "hub", args, stored, PLAIN, vitdet_window_size=2))
    assert model.config.window_size == 2 and model.min_resolution_step == 32


def test_1d_is_refused_by_its_name(tmp_path):
    args, stored, *_ = make("c-radio_v4-h", "hub")
    with pytest.raises(ValueError, match="C-RADIOv4-1D-H.*convert nvidia/C-RADIOv4-H"):
        load_nvidia_checkpoint(write_hub(tmp_path / "C-RADIOv4-1D-H", args, stored))


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('run')",))


def test_pickles_are_not_run(tmp_path):
    args, stored, *_ = make(PLAIN)
    torch.save({"args": argparse.Namespace(**args), "state_dict": stored, "more": Evil()}, tmp_path / "a.pth.tar")
    with pytest.raises(ValueError, match="exec|builtins"):
        load_nvidia_checkpoint(tmp_path / "a.pth.tar")
    (tmp_path / "b.pth.tar").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="b.pth.tar is not read"):
        load_nvidia_checkpoint(tmp_path / "b.pth.tar")


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_paths_of_every_python_are_plain(tmp_path, monkeypatch, module):
    """`pathlib._local` is where Python 3.13 has its classes."""
    path_class = type("PosixPath", (), {"__module__": module, "__reduce__": lambda self: (path_class, ("/data", "x"))})
    args, stored, *_ = make(PLAIN)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, module, types.SimpleNamespace(PosixPath=path_class))
        file = write_pth(tmp_path / "a.pth.tar", {**args, "data_dir": path_class()}, stored)
    assert module.encode() in file.read_bytes()
    assert list(load_nvidia_checkpoint(file, ["clip"]).adaptors) == ["clip"]


def test_damaged_and_foreign_files(tmp_path):
    whole = changed(tmp_path).read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 10):
        (tmp_path / "cut.pth.tar").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="cut.pth.tar") as error:
            load_nvidia_checkpoint(tmp_path / "cut.pth.tar")
        assert "\n" not in str(error.value)
    for content, named in (
        ([1], "list"),
        ({"model": {}}, "it holds model"),
        ({"args": 3, "state_dict": {"a": torch.ones(2)}}, "args"),
        ({"args": {}, "state_dict": {"a": 3}}, "state_dict holds"),
        ({"args": {}, "state_dict": {"base_model.conv.weight": torch.ones(2)}}, "no place|lacks"),
    ):
        torch.save(content, tmp_path / "foreign.pth.tar")
        with pytest.raises(ValueError, match=named):
            load_nvidia_checkpoint(tmp_path / "foreign.pth.tar")
    for source in (tmp_path / "none", tmp_path / "none.pth.tar", "./none", "none.pth.tar", "owner/none"):
        with pytest.raises(FileNotFoundError, match="none"):
            load_nvidia_checkpoint(source)


def test_damaged_folders(tmp_path):
    args, stored, *_ = make(PLAIN, "hub")
    folder = write_hub(tmp_path / "hub", args, stored, PLAIN)
    weights, config = (folder / "model.safetensors"), (folder / "config.json")
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="model.safetensors cannot be read"):
        load_nvidia_checkpoint(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="no safetensors"):
        load_nvidia_checkpoint(folder)
    config.write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        load_nvidia_checkpoint(folder)
    config.write_text(json.dumps({"args": 3}))
    save_file({"a": torch.ones(2)}, weights)
    with pytest.raises(ValueError, match="args is 3"):
        load_nvidia_checkpoint(folder)
    config.write_text(json.dumps({"model_type": "dinov2"}))
    save_file({"a": torch.ones(2)}, weights)
    with pytest.raises(ValueError, match="dinov2"):
        load_nvidia_checkpoint(folder)
    config.unlink()
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_nvidia_checkpoint(folder)


def test_shards_are_read_by_their_index(tmp_path):
    args, stored, *_ = make(PLAIN, "hub")
    folder = write_hub(tmp_path / "hub", args, stored, PLAIN)
    whole = load_nvidia_checkpoint(folder).state_dict()
    names = sorted(load_file(folder / "model.safetensors"))
    for part, some in (("1", names[::2]), ("2", names[1::2])):
        save_file({name: stored[name].contiguous() for name in some}, folder / f"part-{part}.safetensors")
    (folder / "model.safetensors").unlink()
    where = {name: f"part-{1 + index % 2}.safetensors" for index, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    again = load_nvidia_checkpoint(folder).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
    (folder / "part-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="part-2.safetensors"):
        load_nvidia_checkpoint(folder)


def test_models_name_the_command(tmp_path):
    path = changed(tmp_path)
    args, stored, *_ = make(PLAIN, "hub")
    folder = write_hub(tmp_path / "hub", args, stored, PLAIN)
    typed = write_hub(tmp_path / "typed", args, stored, PLAIN, model_type="radio")
    for source in (path, folder, typed):
        for model in (RadioModel, ERadioModel):
            with pytest.raises(ValueError, match=f"transformers-radio convert {source} FOLDER"):
                model.from_pretrained(source)


@pytest.mark.parametrize(
    "key",
    [
        "base_model.patch_generator.embedder.weight",
        "base_model.patch_generator.pos_embed",
        "base_model.patch_generator.cls_token.token",
        "base_model.blocks.2.norm1.bias",
        "base_model.blocks.2.attn.qkv.weight",
        "base_model.blocks.0.mlp.fc1.weight",
        "input_conditioner.norm_mean",
        "_heads.clip.final.0.bias",
        "_feature_projections.sam.fc1.weight",
    ],
)
def test_a_missing_tensor_is_an_error(tmp_path, key):
    with pytest.raises(ValueError, match="lacks|not the other|of no known kind") as error:
        load_nvidia_checkpoint(changed(tmp_path, drop=[key]))
    assert "\n" not in str(error.value)

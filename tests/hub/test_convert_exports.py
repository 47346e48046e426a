"""Students for other libraries: what comes back, what timm and transformers compute, and what loaders cannot take."""

import json

import pytest
import timm
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from typer.testing import CliRunner

from helpers import nvidia_reference as reference
from helpers.nvidia_files import HEADS, LAYOUTS, make, write_hub, write_pth
from helpers.reloaded import assert_same_but_for_rounding, assert_same_weights
from helpers.tiny_radio import TINY, build, build_with_adaptors, scramble
from transformers_radio import RadioConfig, RadioImageProcessor, RadioModel
from transformers_radio.cli import app
from transformers_radio.disk import only_writer
from transformers_radio.hub.convert import load_nvidia_checkpoint
from transformers_radio.hub.folder import convert
from transformers_radio.modeling.fields_radio import complete_adaptors


def command(*words):
    return CliRunner().invoke(app, ["convert", *map(str, words)])


def same_outputs(first, second, images):
    with torch.no_grad():
        one, other = first(images), second(images)
    assert_same_weights(first, second)
    assert_same_but_for_rounding(one.summary, other.summary)
    assert_same_but_for_rounding(one.features, other.features)
    assert list(one.adaptors) == list(other.adaptors)
    for name, head in one.adaptors.items():
        assert head.grid == other.adaptors[name].grid
        for key in head.keys() - {"grid"}:
            assert_same_but_for_rounding(head[key], other.adaptors[name][key])


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_comes_back_from_nvidias(tmp_path, name):
    """.pth.tar -> ours -> NVIDIA's Hub layout -> ours: same configuration, same outputs."""
    args, stored, *_ = make(name)
    first = load_nvidia_checkpoint(write_pth(tmp_path / f"{name}.pth.tar", args, stored))
    first.save_pretrained(tmp_path / "ours")
    convert(str(tmp_path / "ours"), tmp_path / "theirs", "nvidia")
    again = load_nvidia_checkpoint(tmp_path / "theirs")
    before, after = first.config.to_dict(), again.config.to_dict()
    left = ("architectures", "auto_map", "_name_or_path", "transformers_version")
    assert {k: v for k, v in before.items() if k not in left} == {k: v for k, v in after.items() if k not in left}
    first = first.with_adaptors(sorted(first.adaptors))
    same_outputs(first, again.with_adaptors(sorted(again.adaptors)), torch.rand(1, 3, *[4 * first.patch_size] * 2))


def test_nvidias_names_hold_the_same_function(tmp_path):
    """The exported file, read by the plain reference that knows NVIDIA's names alone."""
    model = build(summary_idxs=[0, 1], num_cls_tokens=2)
    model.save_pretrained(tmp_path / "ours")
    convert(str(tmp_path / "ours"), tmp_path / "theirs", "nvidia")
    state = load_file(tmp_path / "theirs/model.safetensors")
    prefix = "radio_model.model."
    plain = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    plain |= {key: state[f"radio_model.input_conditioner.{key}"] for key in ("norm_mean", "norm_std")}
    images = torch.rand(2, 3, 96, 64)
    with torch.no_grad():
        out = model(images).last_hidden_state
    torch.testing.assert_close(
        reference.vit(plain, images, 16, TINY["num_attention_heads"]), out, atol=2e-5, rtol=2e-5
    )
    assert state["radio_model.summary_idxs"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"hidden_act": "gelu_pytorch_tanh"}, "hidden_act is 'gelu_pytorch_tanh'"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps 1e-05"),
        ({"window_num_global": 2, "window_size": 2}, "window_num_global=2"),
        ({"window_num_global": 2, "train_window_sizes": [2]}, "window_num_global=2"),
        # of v2.1, whose blocks NVIDIA's loader chooses itself
        ({"converted_from": {"version": "radio_v2.1"}, "window_size": 2}, "window_num_windowed=None"),
    ],
)
def test_what_nvidias_layout_has_no_field_for_is_refused(tmp_path, fields, named):
    build(**fields).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=named):
        convert(str(tmp_path / "ours"), tmp_path / "theirs", "nvidia")


def test_windows_that_are_not_in_use_are_reported(tmp_path):
    build(window_num_global=2).save_pretrained(tmp_path / "ours")
    lines = convert(str(tmp_path / "ours"), tmp_path / "theirs", "nvidia")
    assert lines[1] == "left out, as the loader has no place for it: window_num_global=2"


SMALL = dict(num_hidden_layers=12, hidden_size=384, num_attention_heads=6, mlp_ratio=4.0, max_img_size=64)


def small(**fields):
    """A network that vLLM knows by name, with a small table."""
    torch.manual_seed(0)
    return scramble(RadioModel(RadioConfig(**{**TINY, **SMALL, "summary_idxs": [0, 1], **fields})).eval())


def test_layer_scale_is_folded_for_vllm(tmp_path):
    model = small()
    model.save_pretrained(tmp_path / "ours")
    source = (tmp_path / "ours/model.safetensors").read_bytes()
    lines = convert(str(tmp_path / "ours"), tmp_path / "vllm", "vllm")
    assert (tmp_path / "ours/model.safetensors").read_bytes() == source  # weights are scaled in place, in memory
    assert "LayerScale is folded into attn.proj and mlp.fc2" in lines
    state = load_file(tmp_path / "vllm/model.safetensors")
    assert all(key.startswith("radio_model.") for key in state)
    assert not [key for key in state if "ls1" in key or "lambda" in key]
    args = json.loads((tmp_path / "vllm/config.json").read_text())["args"]
    assert args["model"] == "vit_small_patch16_224" and args["cpe_max_size"] == 64
    # what the loader counts from these: registers = multiple - tokens % multiple
    tokens = len({teacher["name"] for teacher in args["teachers"]}) if args["cls_token_per_teacher"] else 1
    assert (tokens, args["register_multiple"] - tokens % args["register_multiple"]) == (3, 2)
    assert [teacher["use_summary"] for teacher in args["teachers"]] == [True, True, False]
    again = load_nvidia_checkpoint(tmp_path / "vllm")
    images = torch.rand(1, 3, 48, 64)
    with torch.no_grad():
        found, wanted = again(images).features, model(images).features
    assert (found - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.parametrize(
    ("fields", "loader", "named"),
    [
        ({"final_norm": True}, "vllm", "final_norm"),
        ({"mlp_norm": True}, "vllm", "mlp_norm"),
        ({"feature_normalizer": True}, "tensorrt-llm", "feature_normalizer"),
        ({"patch_bias": True}, "vllm", "patch_bias"),
        ({"use_swiglu_ffn": True}, "vllm", "use_swiglu_ffn"),
        ({"window_size": 2}, "vllm", "window_size"),
        ({"qkv_bias": False}, "vllm", "qkv_bias"),
        ({"summary_type": "mean"}, "vllm", "summary_type"),
        ({"num_hidden_layers": 3}, "vllm", "vit_small_patch16_224"),
        ({"patch_size": 8}, "vllm", "vit_small_patch16_224"),
        ({"num_channels": 4, "norm_mean": [0.5], "norm_std": [0.5]}, "vllm", "num_channels"),
        ({"summary_idxs": [1, 0]}, "vllm", r"order .\[1, 0\]"),
        ({}, "sglang", "SGLang takes one"),
    ],
)
def test_what_a_loader_cannot_serve_is_named(tmp_path, fields, loader, named):
    with torch.device("meta"):
        model = RadioModel(RadioConfig(**{**TINY, **SMALL, "summary_idxs": [0, 1], **fields}))
    from transformers_radio.hub.export_nvidia import check_loader

    with pytest.raises(ValueError, match=f"{loader} cannot serve this student: .*{named}"):
        check_loader(model, loader)


def test_sglang_and_tensorrt_take_a_single_token(tmp_path):
    with torch.device("meta"):
        model = RadioModel(RadioConfig(**{**TINY, **SMALL, "summary_idxs": [0], "num_cls_tokens": 1}))
    from transformers_radio.hub.export_nvidia import check_loader

    for loader in ("vllm", "sglang", "tensorrt-llm"):
        check_loader(model, loader)


@pytest.mark.parametrize(
    "fields", [{}, {"final_norm": True}, {"mlp_norm": True}, {"num_registers": 0}, {"patch_size": 8}]
)
@torch.no_grad()
def test_timm_computes_the_same(tmp_path, fields):
    model = build(**fields)
    model.save_pretrained(tmp_path / "ours")
    side = 6 * model.patch_size
    result = command(tmp_path / "ours", tmp_path / "timm", "--for", "timm", "--image-size", side)
    assert result.exit_code == 0, result.output
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    images = torch.rand(2, 3, side, side)
    mean, std = (torch.tensor(theirs.pretrained_cfg[key]).view(-1, 1, 1) for key in ("mean", "std"))
    out, tokens = model(images), theirs.forward_features((images - mean) / std)
    torch.testing.assert_close(tokens, out.last_hidden_state, atol=2e-5, rtol=2e-5)
    assert theirs.num_prefix_tokens == model.config.num_summary_tokens
    torch.testing.assert_close(theirs.forward_head(tokens), out.last_hidden_state[:, 0], atol=2e-5, rtol=2e-5)


def test_timm_cannot_hold_everything(tmp_path):
    for fields, named in (({"use_swiglu_ffn": True}, "use_swiglu_ffn"), ({"feature_normalizer": True}, "normalizer")):
        build(**fields).save_pretrained(tmp_path / named)
        with pytest.raises(ValueError, match=named):
            convert(str(tmp_path / named), tmp_path / "out", "timm")
    build().save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="--image-size is 100"):
        convert(str(tmp_path / "ours"), tmp_path / "out", "timm", image_size=100)
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_native_files_go_both_ways(tmp_path):
    """Ours -> native -> NVIDIA's names on disk, as transformers writes -> ours."""
    model = build_with_adaptors()
    model.save_pretrained(tmp_path / "ours")
    lines = convert(str(tmp_path / "ours"), tmp_path / "native", "native")
    assert "adaptor clip, adaptor sam" in lines[1]
    native, info = transformers.AutoModel.from_pretrained(tmp_path / "native", output_loading_info=True)
    assert type(native) is transformers.RadioModel and not info["unexpected_keys"] and not info["missing_keys"]
    images = torch.rand(2, 3, 64, 48)
    theirs = native.eval()(images)
    assert torch.equal(theirs.summary, model(images).summary) and torch.equal(theirs.features, model(images).features)
    fresh = transformers.RadioModel(native.config).eval()  # one that was not loaded saves NVIDIA's names by default
    fresh.load_state_dict(native.state_dict())
    for original in (True, False):
        folder = tmp_path / f"saved-{original}"
        fresh.save_pretrained(folder, save_original_format=original)
        names = load_file(folder / "model.safetensors")
        assert any(key.startswith("radio_model.") for key in names) == original
        again = load_nvidia_checkpoint(folder)
        same_outputs(again, model.with_adaptors([]), images)


def test_windows_survive_transformers_own_class(tmp_path):
    """It has none, and keeps the fields; a file that it wrote itself says its release by its name."""
    args, stored, *_ = make("radio_v2.1")
    first = load_nvidia_checkpoint(write_pth(tmp_path / "radio_v2.1.pth.tar", args, stored), [])
    first.save_pretrained(tmp_path / "ours")
    build(window_num_global=2, window_prefix="average").save_pretrained(tmp_path / "mine")
    for name, wanted in (("ours", (4, 5, "bypass")), ("mine", (2, None, "average"))):
        convert(str(tmp_path / name), tmp_path / f"{name}-native", "native")
        native = transformers.AutoModel.from_pretrained(tmp_path / f"{name}-native")
        native.save_pretrained(tmp_path / f"{name}-again")
        for folder in ("native", "again"):
            config = load_nvidia_checkpoint(tmp_path / f"{name}-{folder}").config
            assert (config.window_num_global, config.window_num_windowed, config.window_prefix) == wanted
    fresh = transformers.RadioModel(transformers.RadioConfig(**TINY))
    fresh.save_pretrained(tmp_path / "radio_v2.5-g")
    fresh.save_pretrained(tmp_path / "any")
    assert load_nvidia_checkpoint(tmp_path / "radio_v2.5-g").config.window_num_global == 8
    assert load_nvidia_checkpoint(tmp_path / "any", version="radio_v2.1").config.window_num_windowed == 5


def test_buffers_count_more_than_the_configuration(tmp_path):
    """As in both classes, which compute with the buffers of a file."""
    model = build(summary_idxs=[2])
    model.input_conditioner.norm_mean.fill_(0.25)
    model.save_pretrained(tmp_path / "ours")
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        wanted = model(images)
    for target in ("nvidia", "timm", "native"):
        convert(str(tmp_path / "ours"), tmp_path / target, target, image_size=64 if target == "timm" else None)
    written = {target: json.loads((tmp_path / target / "config.json").read_text()) for target in ("nvidia", "timm")}
    assert written["nvidia"]["norm_mean"] == written["timm"]["pretrained_cfg"]["mean"] == [0.25, 0.25, 0.25]
    config = tmp_path / "native/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "summary_idxs": [0, 1]}))
    for again in (load_nvidia_checkpoint(tmp_path / "nvidia"), load_nvidia_checkpoint(tmp_path / "native")):
        assert again.config.summary_idxs == [2]
        with torch.no_grad():
            assert torch.equal(again(images).summary, wanted.summary)


def test_the_gated_mlp_is_natives(tmp_path):
    native = scramble(transformers.RadioModel(transformers.RadioConfig(**TINY, use_swiglu_ffn=True)).eval())
    native.save_pretrained(tmp_path / "native")
    ours, images = load_nvidia_checkpoint(tmp_path / "native"), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(images).features, native(images).features)


def test_the_command_writes_a_whole_folder(tmp_path):
    args, stored, *_ = make("c-radio_v4-h")
    path = write_pth(tmp_path / "c-radio_v4-h.pth.tar", args, stored)
    result = command(path, tmp_path / "out", "--adaptors", "siglip2-g")
    assert result.exit_code == 0 and "adaptors: siglip2-g" in result.output
    card = (tmp_path / "out/README.md").read_text()
    assert "license_name: nvidia-open-model-license" in card and "c-radio_v4-h.pth.tar" in card
    model = RadioModel.from_pretrained(tmp_path / "out").eval()
    assert list(model.adaptors) == ["siglip2-g"] and model.preferred_resolution == 96
    assert RadioImageProcessor.from_pretrained(tmp_path / "out").size["height"] == 96
    same_outputs(model, load_nvidia_checkpoint(path, ["siglip2-g"]), torch.rand(1, 3, 64, 64))
    remote = transformers.AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    same_outputs(remote.eval(), model, torch.rand(1, 3, 64, 64))


def test_versions_are_those_of_releases(tmp_path):
    args, stored, *_ = make("radio_v2.5-h")
    path = write_pth(tmp_path / "radio_v2.1.pth.tar", args, stored)
    for version in ("foo", "radio_v25-h"):
        with pytest.raises(ValueError, match=f"version is '{version}', expected one such as radio_v2.1"):
            load_nvidia_checkpoint(path, version=version)
    model = load_nvidia_checkpoint(path, version="radio_v2.5-h")
    assert model.config.window_num_windowed is None and model.config.converted_from["license_name"] == "nsclv1"
    model.save_pretrained(tmp_path / "student")
    refused = command(tmp_path / "student", tmp_path / "out", "--for", "nvidia", "--version", "radio_v2.1")
    assert "is for NVIDIA's releases, and" in str(refused.exception) and not (tmp_path / "out").exists()


def test_adaptors_are_split_at_commas_and_none_is_said_as_asked(tmp_path):
    args, stored, *_ = make("c-radio_v4-h")
    path = write_pth(tmp_path / "c-radio_v4-h.pth.tar", args, stored)
    output = command(path, tmp_path / "two", "--adaptors", " siglip2-g, dino_v3_7b ").output
    assert "adaptors: siglip2-g, dino_v3_7b" in output
    output = command(path, tmp_path / "none", "--adaptors", "").output
    assert "adaptors: none" in output and "heads are in" not in output


def test_the_second_of_two_converts_into_a_folder_reads_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers_radio.hub.folder.load_nvidia_checkpoint", lambda *_: pytest.fail("was read"))
    with only_writer(tmp_path / "out"), pytest.raises(FileExistsError, match="another process is writing"):
        convert("source", tmp_path / "out")


def test_the_command_overwrites_nothing_and_leaves_nothing(tmp_path):
    args, stored, *_ = make("radio_v2.5-b", "hub")
    folder = write_hub(tmp_path / "hub", args, stored, "radio_v2.5-b")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="full exists already"):
        convert(str(folder), tmp_path / "full")
    with pytest.raises(ValueError, match="--for is 'onnx', expected one of radio, native, nvidia, vllm"):
        convert(str(folder), tmp_path / "out", "onnx")
    with pytest.raises(ValueError, match="--image-size is for --for timm"):
        convert(str(folder), tmp_path / "out", image_size=32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "hub"]


def test_a_source_called_like_a_temporary_survives(tmp_path):
    build_with_adaptors().save_pretrained(tmp_path / "student.tmp")
    (tmp_path / "theirs.tmp").mkdir()
    (tmp_path / "theirs.tmp" / "mine.txt").write_text("mine")
    before = sorted((tmp_path / "student.tmp").iterdir())
    for name in ("student", "theirs"):
        assert command(tmp_path / "student.tmp", tmp_path / name, "--for", "nvidia").exit_code == 0
    assert sorted((tmp_path / "student.tmp").iterdir()) == before
    assert [path.name for path in (tmp_path / "theirs.tmp").iterdir()] == ["mine.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student", "student.tmp", "theirs", "theirs.tmp"]


def test_the_command_fills_the_folder_it_stands_in_and_one_behind_a_link(tmp_path, monkeypatch):
    args, stored, *_ = make("radio_v2.5-b", "hub")
    write_hub(tmp_path / "hub", args, stored, "radio_v2.5-b")
    for name in ("here", "disk"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("disk")
    monkeypatch.chdir(tmp_path / "here")
    for place, folder in ((".", "here"), ("../link", "disk")):
        result = command("../hub", place)
        assert result.exit_code == 0, result.output
        assert (
            RadioModel.from_pretrained(tmp_path / folder) and "tags" in (tmp_path / folder / "README.md").read_text()
        )
    assert (tmp_path / "link").is_symlink() and (tmp_path / "here").samefile(".")


def test_a_place_that_cannot_be_written_is_named_before_the_source_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers_radio.hub.folder.load_any", lambda *_: pytest.fail("was read"))
    (tmp_path / "n").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("gone")
    for place, message in (
        ("n/inner", "DST .*inner lies in .*n, which is read"),
        ("file/sub", "DST .*sub cannot be written: .*file is not a folder"),
        ("link", "DST .*link cannot be written: .*is a link to gone, which is not there"),
    ):
        with pytest.raises((OSError, ValueError), match=message):
            convert(str(tmp_path / "n"), tmp_path / place, "nvidia")
    assert not list((tmp_path / "n").iterdir())


def test_a_full_disk_is_named_and_nothing_is_left(tmp_path, monkeypatch):
    def full(*args, **options):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    args, stored, *_ = make("radio_v2.5-b", "hub")
    folder = write_hub(tmp_path / "hub", args, stored, "radio_v2.5-b")
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    monkeypatch.setattr("transformers_radio.hub.export_nvidia.save_file", full)
    for target in ("radio", "nvidia"):
        with pytest.raises(OSError, match="out could not be written .*No space left.* bytes free.: make room"):
            convert(str(folder), tmp_path / "out", target)
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


def test_text_towers_are_recorded(tmp_path):
    """The `teacher` of each adaptor is what zero-shot evaluation asks in words."""
    towers = {
        "radio_v2": {
            "clip": "open_clip:ViT-H-14-378-quickgelu:dfn5b",
            "openai_clip": "transformers:openai/clip-vit-large-patch14-336",
        },
        "c-radio_v3-b": {"siglip2-g": "transformers:google/siglip2-giant-opt-patch16-384"},
        "c-radio_v4-h": {"siglip2-g": "transformers:google/siglip2-giant-opt-patch16-384"},
        "radio_v2.5-l": {"siglip": "open_clip:ViT-SO400M-14-SigLIP-384:webli"},
    }
    for name, wanted in towers.items():
        args, stored, *_ = make(name)
        # also where the arguments say no more than the names
        for teacher in args["teachers"] if name == "radio_v2.5-l" else []:
            teacher.pop("model"), teacher.pop("pretrained", None)
        model = load_nvidia_checkpoint(write_pth(tmp_path / f"{name}.pth.tar", args, stored))
        assert {key: model.config.adaptors[key]["teacher"] for key in wanted} == wanted


def test_evaluation_opens_a_release_and_knows_its_text_tower(tmp_path):
    from transformers_radio.evaluation.models.encoder import load_encoder

    args, stored, *_ = make("c-radio_v4-h", "hub")
    folder = write_hub(tmp_path / "c-radio_v4-h", args, stored, "c-radio_v4-h")
    encoder = load_encoder(str(folder))
    assert encoder.is_student and encoder.adaptor == "siglip2-g"
    assert encoder.text_tower() == "transformers:google/siglip2-giant-opt-patch16-384"
    images = torch.rand(2, 3, 64, 64)
    assert encoder.language(images).shape == (2, 10)


def test_a_pre_norm_of_the_heads_is_read(tmp_path):
    args, stored, plain, heads, _ = make("radio_v2.5-b")
    extra = {"pre_norm.0.weight": torch.rand(32), "pre_norm.0.bias": torch.rand(32)}
    for prefix in ("_heads", "_feature_projections"):
        stored |= {f"{prefix}.clip.{key}": value for key, value in extra.items()}
    model = load_nvidia_checkpoint(write_pth(tmp_path / "radio_v2.5-b.pth.tar", args, stored), ["clip"])
    images = torch.rand(1, 3, 64, 64)
    tokens = reference.vit(plain, images, 16, HEADS)
    with torch.no_grad():
        out = model(images).adaptors["clip"]
    wanted = reference.head({**heads["clip"][1], **extra}, tokens[:, 8:])
    torch.testing.assert_close(out.features, wanted, atol=2e-5, rtol=2e-5)
    with pytest.raises(ValueError, match="mlp_pre_norm"):
        complete_adaptors("x", {"a": {**model.config.adaptors["clip"], "mlp_version": "v1"}}, 4)


def test_a_release_is_a_teacher(tmp_path):
    from transformers_radio.teachers import build_teacher

    args, stored, *_ = make("c-radio_v4-h", "hub")
    folder = write_hub(tmp_path / "c-radio_v4-h", args, stored, "c-radio_v4-h")
    teacher = build_teacher("transformers", str(folder), image_size=64, adaptor="siglip2-g")
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        wanted = load_nvidia_checkpoint(folder)(images).adaptors["siglip2-g"]
    assert torch.equal(teacher(images).features, wanted.features)

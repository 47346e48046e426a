"""Exported students: other runtimes and saved programs against the student itself, at shapes that were not traced."""

import json
import shutil

import huggingface_hub
import pytest
import torch
import torch._dynamo.testing
from safetensors.torch import load_file, save_file

from helpers.nvidia_files import make, write_hub
from helpers.tiny_radio import ADAPTORS, build_with_adaptors
from transformers_radio import (
    ERadioConfig,
    ERadioModel,
    RadioConfig,
    RadioImageProcessor,
    RadioModel,
    RadioTimmConfig,
    RadioTimmModel,
)
from transformers_radio.cli import app, main
from transformers_radio.disk import temporary_path
from transformers_radio.export import formats, run
from transformers_radio.export.parity import Parity, check_parity, load_program, measure_parity
from transformers_radio.export.program import open_student, parity_sizes
from transformers_radio.export.run import export_student

pytest.importorskip("transformers.exporters")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("student")
    build_with_adaptors(preferred_resolution=48, window_num_global=1).save_pretrained(path)
    RadioImageProcessor(size={"height": 48, "width": 48}).save_pretrained(path)
    return path


def outputs_of(model, images):
    """The student's own outputs by the names that programs give them."""
    output = model(images)
    found = {"summary": output.summary, "features": output.features}
    for name, head in output.adaptors.items():
        for part in ("summary", "features"):
            if getattr(head, part) is not None:
                found[f"{name}_{part}"] = getattr(head, part)
    return found


@torch.no_grad()
def assert_same_everywhere(program, model, sizes, tolerance=1e-4):
    for batch, height, width in sizes:
        images = torch.rand(batch, 3, height, width)
        found, expected = program(images), outputs_of(model, images)
        assert found.keys() == expected.keys()
        for name in expected:
            assert found[name].dtype == torch.float32
            torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance)


def test_onnx_takes_any_batch_and_aspect(folder, tmp_path):
    pytest.importorskip("onnxruntime")
    path, rows = export_student(str(folder), tmp_path)
    assert path == tmp_path / "onnx" / "model.onnx" and [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    model = RadioModel.from_pretrained(folder).eval()
    assert_same_everywhere(load_program(path, "onnx"), model, [(1, 64, 64), (5, 112, 32), (2, 32, 160)])
    # square, portrait and landscape; the adaptor without a summary has none
    assert {(row.batch, row.height, row.width) for row in rows} == {(1, 48, 48), (2, 48, 32), (3, 48, 64)}
    assert {row.output for row in rows} == {"summary", "features", "clip_summary", "clip_features", "sam_features"}
    assert max(row.error for row in rows) < 1e-5
    for name in ("config.json", "preprocessor_config.json"):  # for transformers.js
        assert json.loads((tmp_path / name).read_text()) == json.loads((folder / name).read_text())
    with pytest.raises(FileExistsError, match="model.onnx exists; pass --overwrite"):
        export_student(str(folder), tmp_path)


@pytest.mark.parametrize(("dtype", "name"), [("fp16", "model_fp16.onnx"), ("q8", "model_quantized.onnx")])
def test_smaller_onnx_files_have_windows_and_the_adaptors_asked_for(folder, tmp_path, dtype, name):
    pytest.importorskip("onnxruntime")
    path, rows = export_student(str(folder), tmp_path, dtype=dtype, adaptors=["clip"], window_size=2)
    assert path.name == name
    assert {row.output for row in rows} == {"summary", "features", "clip_summary", "clip_features"}
    program, model = load_program(path, "onnx"), open_student(str(folder), ["clip"], 2)
    assert model.config.window_size == 2 and all(row.height % 32 == row.width % 32 == 0 for row in rows)
    with torch.no_grad():
        images = torch.rand(2, 3, 96, 128)
        found, expected = program(images), outputs_of(model, images)
        globally = outputs_of(RadioModel.from_pretrained(folder).eval(), images)
    error = (found["features"] - expected["features"]).norm() / expected["features"].norm()
    without = (found["features"] - globally["features"]).norm() / globally["features"].norm()
    assert error < (0.005 if dtype == "fp16" else 0.1) and without > error
    onnx = pytest.importorskip("onnx")
    stored = sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in onnx.load(path).graph.initializer)
    weights = sum(weight.numel() for weight in model.parameters())
    assert stored < 2.5 * weights  # 4 bytes each in float32; the small position table stays so


def test_torch_export_takes_any_batch_and_aspect(folder, tmp_path):
    path, _ = export_student(str(folder), tmp_path, "torch-export", adaptors=[])
    model = open_student(str(folder), [], None)
    assert_same_everywhere(load_program(path, "torch-export"), model, [(1, 64, 64), (4, 96, 32), (2, 32, 96)])
    program = torch.export.load(path / "model.pt2").module()  # as users load it, without this package
    images = torch.rand(1, 3, 80, 32)
    with torch.no_grad():
        torch.testing.assert_close(program(pixel_values=images)["summary"], model(images).summary)


def test_torch_export_of_int8_weights(folder, tmp_path):
    pytest.importorskip("torchao")
    _, rows = export_student(str(folder), tmp_path, "torch-export", "q8", adaptors=[])
    assert 1e-5 < max(row.error for row in rows) < 0.1


def test_openvino_takes_any_batch_and_aspect(folder, tmp_path):
    pytest.importorskip("openvino")
    path, rows = export_student(str(folder), tmp_path, "openvino", adaptors=["clip"])
    assert (path / "openvino_model.bin").exists() and max(row.error for row in rows) < 1e-5
    model = open_student(str(folder), ["clip"], None)
    assert_same_everywhere(load_program(path, "openvino"), model, [(1, 64, 64), (4, 96, 32), (2, 32, 96)])


def test_executorch_takes_one_square_image_of_several_sides(folder, tmp_path):
    pytest.importorskip("executorch")
    path, rows = export_student(str(folder), tmp_path, "executorch", adaptors=[])
    assert (path / "model.pte").exists()
    assert {(row.batch, row.height, row.width) for row in rows} == {(1, 48, 48), (1, 32, 32)}
    assert max(row.error for row in rows) < 1e-5


def eradio():
    return ERadioModel(ERadioConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[2, 4], stem_channels=6))


def convnext():
    args = {"dims": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
    adaptors = {"clip": {"summary_dim": 8, "feature_dim": 12, "hidden_dim": 16}}
    return RadioTimmModel(RadioTimmConfig(timm_model="convnext_tiny", model_args=args, adaptors=adaptors))


def fixed():
    args = {"embed_dim": 24, "depth": 2, "num_heads": 2}
    return RadioTimmModel(RadioTimmConfig(timm_model="vit_tiny_patch16_224", model_args=args, image_size=32))


@pytest.mark.parametrize(
    ("make", "window", "sizes"),
    [
        (eradio, 2, [(1, 128, 256), (3, 256, 128)]),
        (eradio, None, [(1, 96, 96), (3, 96, 96)]),
        (convnext, None, [(1, 64, 64), (3, 128, 64)]),
        (fixed, None, [(1, 32, 32), (3, 32, 32)]),
    ],
)
def test_the_other_students(make, window, sizes, tmp_path):
    torch.manual_seed(0)
    model = make().eval()
    has_one_size = make is fixed or (make is eradio and window is None)
    model.config.preferred_resolution = sizes[0][1] if has_one_size else 64
    model.save_pretrained(tmp_path)
    path, rows = export_student(str(tmp_path), tmp_path, "torch-export", window_size=window)
    assert len({row.name for row in rows}) == (2 if has_one_size else 3)
    assert_same_everywhere(load_program(path, "torch-export"), open_student(str(tmp_path), None, window), sizes)


def test_one_compiled_program_serves_all_shapes():
    model = RadioModel(
        RadioConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, adaptors=ADAPTORS)
    ).eval()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend=counter)
    with torch.no_grad():
        for shape in ((2, 3, 64, 48), (3, 3, 32, 80), (2, 3, 96, 96), (4, 3, 128, 32)):
            images = torch.rand(shape)
            torch.testing.assert_close(compiled(images).summary, model(images).summary)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"format": "coreml"}, ValueError, "format is 'coreml', expected one of onnx, torch-export"),
        ({"dtype": "int4"}, ValueError, "dtype is 'int4', expected one of fp32"),
        ({"format": "openvino", "dtype": "q8"}, ValueError, "q8 is for onnx and torch-export"),
        ({"adaptors": ["dino"], "format": "torch-export"}, ValueError, "dino"),
        ({"window_size": -1, "format": "torch-export"}, ValueError, "window_size"),
        ({"window_size": 40, "format": "torch-export"}, ValueError, "two windows are 1280 pixels, .* image has 256"),
    ],
)
def test_what_is_refused_before_any_work(folder, tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        export_student(str(folder), tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["onnx", "executorch", "openvino"])
def test_a_missing_package_is_named_with_its_command(format, folder, tmp_path, monkeypatch):
    found = formats.importlib.util.find_spec
    absent = formats.PACKAGES[format][0]
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None if name in absent else found(name))
    with pytest.raises(ImportError, match=f"format {format} with fp32 needs {absent[0]}.*: pip install"):
        export_student(str(folder), tmp_path, format)


def test_a_release_is_opened_as_it_is(tmp_path):
    args, stored, *_ = make("c-radio_v3-b", "hub")
    model = open_student(str(write_hub(tmp_path / "hub", args, stored, "c-radio_v3-b")), ["clip"], None)
    assert list(model.adaptors) == ["clip"] and not model.training and model.dtype == torch.float32


def write_half(student, path, *_):
    path.mkdir()
    (path / "new").touch()


def test_a_program_that_differs_is_not_kept_and_the_one_that_was_there_is(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "write_program", write_half)
    student = open_student(str(folder), [], None)
    off = lambda images: {name: 1.01 * value for name, value in outputs_of(student, images).items()}  # noqa: E731
    monkeypatch.setattr(run, "load_program", lambda *_: off)
    program = tmp_path / "torch-export"
    for is_there in (False, True):
        with pytest.raises(
            ValueError, match="summary of 48x48 pixels differs .* by 0.01 .relative., more than the 0.0001"
        ):
            export_student(str(folder), tmp_path, "torch-export", adaptors=[], overwrite=True)
        assert [path.name for path in tmp_path.rglob("*")] == (["torch-export", "old"] if is_there else [])
        program.mkdir(exist_ok=True)
        (program / "old").touch()
    rows = measure_parity(student, off, parity_sizes(student))
    assert all(row.error == pytest.approx(0.01, rel=1e-3) for row in rows)
    monkeypatch.setattr(run, "load_program", lambda *_: lambda images: outputs_of(student, images))
    export_student(str(folder), tmp_path, "torch-export", adaptors=[], overwrite=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["torch-export", "new"]
    row = Parity("square", 1, 48, 48, "summary", float("nan"), float("nan"))
    with pytest.raises(ValueError, match="differs"):
        check_parity([row], "q8")


def test_one_process_at_a_time_and_what_a_killed_one_left_goes(folder, tmp_path, monkeypatch):
    def write(student, path, *_):
        with pytest.raises(FileExistsError, match="another process is writing .*model.onnx now"):
            export_student(str(folder), tmp_path, adaptors=[], overwrite=True)
        assert not (path.parent / "half").exists()
        path.write_text("graph")
        path.with_name("model.onnx_data").write_text("weights")

    student = open_student(str(folder), [], None)
    monkeypatch.setattr(run, "write_program", write)
    monkeypatch.setattr(run, "load_program", lambda *_: lambda images: outputs_of(student, images))
    leftover = temporary_path(tmp_path / "onnx" / "model.onnx")
    for place in (leftover, tmp_path / "onnx" / "model.onnx.tmp"):  # the second is a user's
        place.mkdir(parents=True)
        (place / "half").touch()
    path, _ = export_student(str(folder), tmp_path, adaptors=[])
    (tmp_path / "onnx" / "model.onnx.tmp" / "half").unlink()
    (tmp_path / "onnx" / "model.onnx.tmp").rmdir()
    assert sorted(file.name for file in path.parent.iterdir()) == ["model.onnx", "model.onnx_data"]
    # the weights of an old program do not stay beside a new one that has them inside
    monkeypatch.setattr(run, "write_program", lambda student, path, *_: path.write_text("graph and weights"))
    export_student(str(folder), tmp_path, adaptors=[], overwrite=True)
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]


@pytest.fixture
def instant(folder, monkeypatch):
    """Exports that write no program, and another student."""
    student = open_student(str(folder), [], None)
    monkeypatch.setattr(run, "write_program", lambda student, path, *_: path.write_text("graph"))
    monkeypatch.setattr(run, "load_program", lambda *_: lambda images: outputs_of(student, images))
    monkeypatch.setattr(run, "open_student", lambda *_: student)


@pytest.fixture
def other(folder, tmp_path):
    """A student whose two files differ."""
    path = tmp_path / "other"
    path.mkdir()
    (path / "config.json").write_text((folder / "config.json").read_text().replace("48", "64"))
    RadioImageProcessor(size={"height": 64, "width": 64}).save_pretrained(path)
    return path


def contents(output):
    return {name: (output / name).read_text() for name in run.FILES}


def test_the_two_files_are_those_of_the_program_beside_them(folder, other, tmp_path, instant):
    web = tmp_path / "web"
    export_student(str(other), web)
    with pytest.raises(FileExistsError, match="web/onnx/model.onnx belongs to another student, as .*web/config.json"):
        export_student(str(folder), web, dtype="fp16")
    assert contents(web) == contents(other) and not (web / "onnx" / "model_fp16.onnx").exists()
    export_student(str(other), web, dtype="fp16")  # of one student all precisions go together
    with pytest.raises(FileExistsError, match="model_fp16.onnx belongs to another student"):
        export_student(str(folder), web, overwrite=True)
    (web / "onnx" / "model_fp16.onnx").unlink()
    export_student(str(folder), web, overwrite=True)
    assert contents(web) == contents(folder) != contents(other)


def test_a_hub_id_has_the_two_files_too(other, tmp_path, instant, monkeypatch):
    repository = tmp_path / "cache" / "models--someone--tiny"
    shutil.copytree(other, repository / "snapshots" / "a1")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    export_student("someone/tiny", tmp_path / "web")
    assert contents(tmp_path / "web") == contents(other)


def test_files_of_others_are_replaced_only_when_told_and_never_a_students(folder, other, tmp_path, instant):
    web = tmp_path / "web"
    web.mkdir()
    (web / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"web/config.json is not that of \S+: .* --overwrite to replace it"):
        export_student(str(folder), web)
    assert [path.name for path in web.iterdir()] == ["config.json"]
    export_student(str(folder), web, overwrite=True)
    assert contents(web) == contents(folder)
    (other / "model.safetensors").touch()
    before = contents(other)
    with pytest.raises(FileExistsError, match="other/model.safetensors belongs to another student"):
        export_student(str(folder), other, overwrite=True)
    assert contents(other) == before and not (other / "onnx").exists()


def test_a_student_of_the_same_configuration_is_another_too(folder, tmp_path, instant):
    twin = tmp_path / "twin"
    shutil.copytree(folder, twin)
    export_student(folder, str(twin), "onnx")  # the same weights
    (twin / "config.json").write_text("{}")  # never replaced, even beside equal weights
    with pytest.raises(FileExistsError, match="belongs to another student, as"):
        export_student(folder, twin, overwrite=True)
    shutil.copyfile(folder / "config.json", twin / "config.json")
    weights = load_file(twin / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, twin / "model.safetensors")
    with pytest.raises(FileExistsError, match=r"twin/model.safetensors belongs to another student than \S+: choose"):
        export_student(folder, twin, dtype="fp16", overwrite=True)
    with pytest.raises(FileExistsError, match="belongs to another student"):
        export_student(folder, twin, "torch-export")
    export_student(twin, twin, dtype="fp16")


def test_a_place_that_cannot_be_written_is_named_before_the_student_is_opened(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "open_student", lambda *_: pytest.fail("was opened"))
    (tmp_path / "file").touch()
    for format in ("onnx", "torch-export"):
        with pytest.raises(
            OSError, match=r"^--output \S+ cannot be written: \S+/file is not a folder; choose another"
        ):
            export_student(str(folder), tmp_path / "file", format)


def test_sizes_of_the_comparison_are_square_portrait_and_landscape(folder):
    for window in (None, 2, 3):
        student = open_student(str(folder), [], window)
        sizes = parity_sizes(student)
        assert sizes["square"][1] == sizes["square"][2]
        if window is None:
            assert len({height * width for _, height, width in sizes.values()}) == 3  # three resolutions, too
        assert sizes["portrait"][1] > sizes["portrait"][2] and sizes["landscape"][1] < sizes["landscape"][2]
        for _, height, width in sizes.values():
            assert (
                height >= 2 * 16 * (window or 1) and height % (16 * (window or 1)) == width % (16 * (window or 1)) == 0
            )


def test_the_command_prints_the_table(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["transformers-radio", "export", str(folder), "--no-adaptors", "--adaptor", "clip"]
    )
    with pytest.raises(SystemExit, match="error: --no-adaptors leaves out --adaptor clip"):
        main()
    rows = [Parity("square", 1, 48, 48, "summary", 1e-6, 2e-6)]
    asked = []
    monkeypatch.setattr(run, "export_student", lambda *arguments: asked.append(arguments) or (tmp_path, rows))
    from typer.testing import CliRunner

    found = CliRunner().invoke(app, ["export", str(folder), "--format", "torch-export", "--adaptor", "clip"])
    assert found.exit_code == 0 and "1.00e-06" in found.output and str(tmp_path) in found.output.replace("\n", "")
    assert asked == [(str(folder), folder, "torch-export", "fp32", ["clip"], None, False)]

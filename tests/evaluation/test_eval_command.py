"""`transformers-radio eval`: models of every kind, settings, result files, and two tasks through the command line."""

import sys
from dataclasses import asdict, fields

import pytest
import torch
import transformers
from omegaconf import OmegaConf

from helpers.coco_files import Dataset
from helpers.paths import ROOT
from helpers.segmentation_set import LITTLE, describe, write_set
from helpers.tiny_sam import make_student
from transformers_radio.cli import main
from transformers_radio.evaluation.models.encoder import load_encoder
from transformers_radio.evaluation.models.specs import ModelSpec
from transformers_radio.evaluation.result import Result
from transformers_radio.evaluation.run import TASKS, load_config, load_task, run_task
from transformers_radio.evaluation.segmentation.config import SegmentationTaskConfig
from transformers_radio.evaluation.segmentation.probe import segmentation_probe

RECIPES = ROOT / "recipes" / "evaluation"


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("students") / "mine" / "student"
    make_student().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """A segmentation recipe as a user writes it."""
    folder = write_set(tmp_path_factory.mktemp("colours"))
    recipe = folder / "recipe.yaml"
    OmegaConf.save(OmegaConf.create({"data": asdict(describe(folder)), "probe": LITTLE}), recipe)
    return recipe


def test_a_native_radio_and_a_student_are_the_same_encoder(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "max_img_size": 64}
    native = transformers.RadioModel(transformers.RadioConfig(**sizes)).eval()
    native.save_pretrained(tmp_path / "native")
    encoder = load_encoder(f"NVIDIA's={tmp_path / 'native'}", image_size=48)
    images = torch.rand(2, 3, 48, 64)
    with torch.no_grad():
        expected = native(images)
    assert encoder.name == "NVIDIA's" and encoder.is_student and encoder.step == 8 and encoder.image_size == 48
    torch.testing.assert_close(encoder.summary(images), expected.summary)
    features, grid = encoder.features(images)
    torch.testing.assert_close(features, expected.features)
    assert grid == (6, 8)
    with pytest.raises(ValueError, match="no adaptor to a teacher with a text tower .it has no adaptors."):
        encoder.language(images)


def test_any_vision_model_of_transformers_is_a_row(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8, "image_size": 32}
    model = transformers.ViTModel(transformers.ViTConfig(**sizes)).eval()
    model.save_pretrained(tmp_path)
    transformers.ViTImageProcessor(image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path))
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        tokens = model((images - 0.5) / 0.25).last_hidden_state
    torch.testing.assert_close(encoder.summary(images), tokens[:, 0])
    torch.testing.assert_close(encoder.features(images)[0], tokens[:, 1:])
    assert encoder.params == sum(p.numel() for p in model.parameters()) and not encoder.is_student
    with pytest.raises(ValueError, match="has no text tower"):
        encoder.text_tower()
    with pytest.raises(ValueError, match="built for 32 x 32 pixels and cannot take 32 x 48"):
        encoder.check_size(32, 48)


def test_parameters_of_adaptors_are_not_the_students(student):
    encoder, model = load_encoder(str(student)), make_student()
    assert encoder.params == sum(p.numel() for name, p in model.named_parameters() if not name.startswith("adaptors"))
    assert encoder.name == "mine/student"
    with pytest.raises(ValueError, match="multiples of 8, not 30 x 64: use 32 x 64"):
        encoder.check_size(30, 64)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("open_klip:ViT-B-32", "begins with no type of model: use one of open_clip"),
        ("{tmp}", "has no config.json, so it is no transformers model"),
    ],
)
def test_what_is_no_model_is_named(spec, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_encoder(spec.format(tmp=tmp_path))


def test_titles(tmp_path):
    assert ModelSpec.parse("CLIP=open_clip:x/y:z") == ModelSpec("CLIP", "open_clip", "x/y:z")
    assert ModelSpec.parse("open_clip:weights/clip/") == ModelSpec("clip", "open_clip", "weights/clip/")
    assert ModelSpec.parse("segment_anything:sam/sam_vit_h.pth").title == "sam_vit_h.pth"
    assert ModelSpec.parse("timm:vit_base").kind == "timm"
    assert str(ModelSpec.parse("a=timm:vit_base@224")) == "timm:vit_base"


def test_segmentation_is_the_probe_and_is_not_done_twice(student, colours, tmp_path):
    [result] = run_task("segmentation", [str(student)], None, colours, tmp_path / "out")
    encoder = load_encoder(str(student))
    data = load_config(SegmentationTaskConfig, None, colours, [])
    expected = segmentation_probe(encoder.features, "mine", data.data, data.probe, tmp_path / "direct")
    assert result.metrics == {name: expected[name] for name in ("mIoU", "mAcc", "aAcc")}
    assert result.counts["validation_images"] == 5 and result.counts["pixels_left_out"] > 0
    path = tmp_path / "out" / "mine-student" / "segmentation.colors.json"
    assert Result.read(path) == result and "40 iterations of 4 crops of 32" in result.protocol

    before = path.stat().st_mtime_ns
    assert run_task("segmentation", [str(student)], None, colours, tmp_path / "out") == [result]
    assert path.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="holds a result of other settings; it differs in probe"):
        run_task("segmentation", [str(student)], None, colours, tmp_path / "out", ["probe.seed=1"])
    changed = ["probe.seed=1", "overwrite=true"]
    [other] = run_task("segmentation", [str(student)], None, colours, tmp_path / "out", changed)
    assert other.metrics != result.metrics and Result.read(path) == other


def test_other_weights_under_the_same_name_are_another_result(colours, tmp_path):
    torch.manual_seed(5)
    model = make_student()
    model.save_pretrained(tmp_path / "student")
    run_task("segmentation", [str(tmp_path / "student")], None, colours, tmp_path / "out")
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    model.save_pretrained(tmp_path / "student")
    with pytest.raises(ValueError, match="it differs in weights"):
        run_task("segmentation", [str(tmp_path / "student")], None, colours, tmp_path / "out")


def test_sam_coco_scores_student_and_sam(sam, sam_file, student, tmp_path):
    dataset = Dataset(tmp_path)
    models = [f"SAM=segment_anything:{sam_file}", f"ours={student}"]
    settings = [f"sam={sam_file}", "image_size=64"]
    first, second = run_task("sam-coco", models, str(tmp_path), RECIPES / "coco2017.yaml", tmp_path / "out", settings)
    without_crowds = dataset.literal_score(sam)
    dataset.count_crowds()
    assert first.metrics["SAM COCO"] == pytest.approx(dataset.literal_score(sam), abs=1e-4)
    assert (first.model, second.model) == ("SAM", "ours") and second.metrics != first.metrics
    assert first.counts == {"images": 3, "annotations": 15, "crowd": 0, "empty": 4}
    assert "true boxes" in first.protocol and "single mask" in first.protocol
    assert "crowd regions included" in first.protocol
    (own,) = run_task("sam-coco", models[:1], str(tmp_path), None, tmp_path / "own", settings)  # the settings' default
    assert own.metrics["SAM COCO"] == pytest.approx(without_crowds, abs=1e-4)
    assert own.counts["crowd"] == 3 and "without crowd regions" in own.protocol
    with pytest.raises(ValueError, match="is not the SAM that decodes"):
        run_task("sam-coco", ["segment_anything:other.pth"], str(tmp_path), None, tmp_path / "out", settings)
    with pytest.raises(FileNotFoundError, match="There is no file .*instances_val2018.json"):
        run_task("sam-coco", models, str(tmp_path), None, tmp_path / "out", [*settings, "split=val2018"])


def test_the_command_prints_and_errors_take_one_line(student, colours, tmp_path, monkeypatch, capsys):
    def command(*arguments):
        """What the command prints, and its exit code or the line that it ends with."""
        monkeypatch.setattr(sys, "argv", ["transformers-radio", "eval", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return capsys.readouterr().out, ended.value.code

    out = tmp_path / "out"
    printed, code = command(
        "segmentation", "--model", student, "--recipe", colours, "--output", out, "probe.iterations=5"
    )
    found = Result.read(out / "mine-student" / "segmentation.colors.json")
    assert code == 0 and "mine/student" in printed and f"mIoU {found.metrics['mIoU']:.2f}" in printed
    for arguments, message in {
        ("knnn", "--model", student): "error: There is no task 'knnn': use one of zero-shot, knn",
        ("segmentation", "--recipe", colours): "error: There is no model to evaluate",
        ("segmentation", "--model", student, "--recipe", colours, "probe.crop_syze=3"): "probe.crop_syze: ",
        ("segmentation", "--model", student, "--data", "nowhere", "--recipe", colours): "There is no folder nowhere",
    }.items():
        _, line = command(*arguments, "--output", out)
        assert message in line and "\n" not in line  # which Python prints, with exit code 1


@pytest.mark.parametrize("name", ["ade20k", "voc2012"])
def test_the_segmentation_recipes_are_complete(name):
    config = load_config(SegmentationTaskConfig, None, RECIPES / f"{name}.yaml", [])
    assert len(config.data.classes) == {"ade20k": 150, "voc2012": 21}[name] and config.data.license
    config = load_config(SegmentationTaskConfig, "elsewhere", RECIPES / f"{name}.yaml", ["probe.iterations=80000"])
    assert config.data.path == "elsewhere" and config.probe.iterations == 80000


def test_every_task_has_its_settings():
    assert list(TASKS) == [
        *("zero-shot", "knn", "segmentation", "llava", "sam-coco", "throughput", "resolution", "features")
    ]
    for name in TASKS:
        task = load_task(name)
        assert task.name == name and task.counted
        assert [field.name for field in fields(task.config_class) if field.name == "overwrite"]

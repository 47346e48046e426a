"""`visualize` from the settings to the files: the quickstart's own teachers, a tiny student, several kinds of data."""

import io
import json
import tarfile
from importlib import resources

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.conv_student import ConvStudent, ConvStudentConfig
from helpers.tiny_sam import picture
from transformers_radio import modeling
from transformers_radio.evaluation.models.encoder import load_encoder
from transformers_radio.evaluation.run import PICTURES
from transformers_radio.modeling import RadioConfig, RadioModel
from transformers_radio.visualization import run as visualize_run
from transformers_radio.visualization.features import common_columns
from transformers_radio.visualization.pictures import load_pictures
from transformers_radio.visualization.run import visualize

TEACHERS = resources.files("transformers_radio.quickstart") / "teachers"
CLIP, DINO = f"clip=open_clip:{TEACHERS / 'clip'}", f"DINOv2=transformers:{TEACHERS / 'dinov2'}"
SAM = f"segment_anything:{TEACHERS / 'sam' / 'sam.pth'}"


def adaptor(teacher, summary_dim=None, **options):
    return {
        "summary_dim": summary_dim,
        "feature_dim": 192,
        "hidden_dim": 16,
        "summary_token": 0,
        "teacher": teacher,
        **options,
    }


def save_student(folder, **options):
    torch.manual_seed(0)
    adaptors = {
        "clip": adaptor("moved:/elsewhere", 128),
        "second": adaptor(DINO.partition("=")[2], 192, summary_token=1, upsample_factor=2),
        "sam": adaptor(SAM),
    }
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "max_img_size": 64}
    config = RadioConfig(**{**sizes, "num_cls_tokens": 2, "summary_idxs": [0, 1], "adaptors": adaptors, **options})
    config.preferred_resolution = 32
    RadioModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return save_student(tmp_path_factory.mktemp("students") / "mine")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A few scenes in the format of the quickstart's world."""
    folder = tmp_path_factory.mktemp("world")
    with tarfile.open(folder / "validation-000000.tar", "w") as tar:
        for index in range(4):
            boxes = [[1, 2, 20, 30], [10, 5, 60, 50], [0, 0, 8, 8]][: index + 1]
            image = io.BytesIO()
            Image.fromarray(picture((64, 64), index)).save(image, "JPEG")
            about = json.dumps({"objects": [{"shape": "ring", "box": box, "area": 9} for box in boxes]})
            for suffix, content in (("jpg", image.getvalue()), ("json", about.encode())):
                member = tarfile.TarInfo(f"validation-{index:06d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return str(folder)


@pytest.fixture
def folder(tmp_path):
    for number, size in enumerate([(60, 90), (90, 60), (50, 50)]):
        Image.fromarray(picture(size, number)).save(tmp_path / f"{number}.png")
    return tmp_path


def test_images_come_from_a_file_a_folder_and_a_dataset(folder, world, caplog):
    (folder / "00-broken.jpg").write_bytes(b"no image")
    (folder / "notes.txt").write_text("not an image either")
    found = load_pictures(str(folder), 2)
    assert [one.name for one in found] == ["0.png", "1.png"] and found[0].boxes == []
    np.testing.assert_array_equal(np.asarray(found[1].image), picture((90, 60), 1))
    assert "00-broken.jpg" in caplog.text
    (one,) = load_pictures(str(folder / "2.png"), 5)
    np.testing.assert_array_equal(np.asarray(one.image), picture((50, 50), 2))
    scenes = load_pictures(world, 3)
    assert [one.name for one in scenes] == ["validation-000000", "validation-000001", "validation-000002"]
    assert scenes[2].boxes == [[10, 5, 60, 50], [1, 2, 20, 30], [0, 0, 8, 8]]  # the largest first


@pytest.mark.parametrize(
    ("data", "message"),
    [(None, "with --data"), ("empty", "no readable image"), ("world-without", "no image column among")],
)
def test_images_that_are_not_there_are_named(data, message, tmp_path):
    if data == "empty":
        data = tmp_path / "a.png"
        data.write_bytes(b"")
    elif data:
        (tmp_path / "train.csv").write_text("a,b\n1,2\n")
        data = tmp_path
    with pytest.raises(ValueError, match=message):
        load_pictures(data and str(data), 2, "train")


def test_a_teacher_and_the_student_s_adaptor_to_it_share_their_basis(student):
    encoders = [load_encoder(spec) for spec in (CLIP, DINO, f"mine={student}")]
    images = {encoder.name: torch.rand(2, 3, *[encoder.image_size] * 2) for encoder in encoders}
    columns, basis_of = common_columns(encoders, images)
    assert list(columns) == ["clip", "mine as clip", "DINOv2", "mine as DINOv2"]
    assert basis_of == {"mine as clip": "clip", "mine as DINOv2": "DINOv2"}
    model = RadioModel.from_pretrained(student).eval()
    with torch.no_grad():
        expected = model(images["mine"]).adaptors
    torch.testing.assert_close(columns["mine as clip"][0], expected["clip"].features, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(columns["mine as DINOv2"][0], expected["second"].features, atol=1e-5, rtol=1e-4)
    assert columns["mine as clip"][1] == (4, 4) and columns["mine as DINOv2"][1] == (8, 8)  # upsampled twice
    torch.testing.assert_close(columns["clip"][0], encoders[0].model(images["clip"]).features)


def test_models_without_a_common_space_are_refused(student, folder, tmp_path):
    encoders = [load_encoder(spec) for spec in (f"other={CLIP.partition('=')[2]}", f"mine={student}")]
    with pytest.raises(ValueError, match="no space in common.*clip .moved:/elsewhere.*ADAPTOR=MODEL"):
        common_columns(encoders, {})
    narrow = {"clip": adaptor("", 128) | {"feature_dim": 64}}
    encoders = [
        load_encoder(CLIP),
        load_encoder(save_student(tmp_path / "narrow", adaptors=narrow, num_cls_tokens=1, summary_idxs=[0])),
    ]
    with pytest.raises(ValueError, match="features of width 64, but those of clip have 192"):
        common_columns(encoders, {})
    wide = save_student(tmp_path / "wide", hidden_size=32, adaptors={})
    with pytest.raises(ValueError, match="'wide' cannot take the basis of 'mine'"):
        visualize("features", [student, wide], str(folder), None, tmp_path / "out", ["basis=models"])


@pytest.fixture
def shown(monkeypatch):
    """The columns of each figure that is written."""
    from transformers_radio.visualization import attention, heat_map, masks, teacher_student

    seen, write = {}, teacher_student.write_panels

    def write_and_keep(columns, path, *args, **options):
        seen[path.name] = columns
        return write(columns, path, *args, **options)

    for module in (teacher_student, attention, heat_map, masks):
        monkeypatch.setattr(module, "write_panels", write_and_keep)
    return seen


def test_every_kind_writes_its_picture(student, world, tmp_path, shown):
    models, settings = [CLIP, f"mine={student}"], ["images=2"]
    prompts = [f"text=open_clip:{TEACHERS / 'clip'}", 'prompts=["a photo of a star","a ring"]']
    written = visualize("all", models, world, None, tmp_path, [*settings, *prompts, "basis=models"])
    names = [
        "features.png",
        "attention.mine.png",
        "positions.png",
        "heat-map.clip.png",
        "heat-map.mine.png",
        "masks.png",
    ]
    assert [path.name for path in written] == names and all(Image.open(path).size[0] > 300 for path in written)
    assert [c.title for c in shown["features.png"]] == ["Input", "clip", "mine as clip"]
    assert [c.title for c in shown["attention.mine.png"]] == ["Input", "Token 0 (clip)", "Token 1 (second)"]
    assert [c.title for c in shown["heat-map.mine.png"]] == ["Input", "a photo of a star", "a ring"]
    assert [c.title for c in shown["masks.png"]] == ["Input", "SAM", "mine"]
    visualize("attention", [student], world, None, tmp_path, ["images=1", "heads=true", "token=1", "layer=0"])
    columns = shown["attention.mine.png"]
    assert [c.title for c in columns] == ["Input", "Head 1", "Head 2"] and "block 1 of 2, token 1" in columns[
        1
    ].subtitle


def test_what_a_model_or_setting_does_not_allow_is_left_out_aloud_or_refused(student, folder, tmp_path, caplog):
    written = visualize("all", [DINO], str(folder), None, tmp_path / "out", ["images=1"])
    assert [path.name for path in written] == ["features.png"]
    for kind in ("attention", "positions", "heat-map", "masks"):
        assert f"{kind} is left out: " in caplog.text
    for kind, models, settings, message in [
        ("faces", [student], [], "no picture 'faces': use one of features, attention"),
        ("features", [], [], "no model to show"),
        ("features", [student], ["basis=model"], "basis is 'model'"),
        ("features", [student], ["color=red"], "The settings are data, split"),
        ("features", [student, student], [], "Two models have one name"),
        ("attention", [student], ["heads=true", "token=2"], "class tokens 0 to 1"),
        ("heat-map", [student], [], "no text to look for"),
        ("heat-map", [student], ["prompts=[a]"], "does not say whose text tower"),
        ("masks", [student], [], "no boxes for 0.png"),
        ("positions", [CLIP], [], "of students only"),
    ]:
        with pytest.raises(ValueError, match=message):
            visualize(kind, models, str(folder), None, tmp_path / "refused", settings)
    assert not (tmp_path / "refused").exists()


def test_masks_take_given_boxes_and_images_of_several_sizes(student, folder, tmp_path, shown):
    visualize("masks", [student, SAM], str(folder), None, tmp_path, ["boxes=[[5,5,40,45],[0,0,50,50]]"])
    assert [tuple(panel.shape) for panel in shown["masks.png"][1].panels] == [(60, 90, 3), (90, 60, 3), (50, 50, 3)]


def test_each_model_sees_its_own_size_of_the_center(student, folder, tmp_path, monkeypatch):
    seen = {}

    def record(encoders, images):
        seen.update(images)
        return {name: (torch.rand(len(one), 16, 5), (4, 4)) for name, one in images.items()}

    monkeypatch.setattr(visualize_run, "own_columns", record)
    visualize("features", [DINO, student], str(folder), None, tmp_path, ["image_size=64"])
    assert seen["mine"].shape == (3, 3, 64, 64) and seen["DINOv2"].shape[2] == load_encoder(DINO).image_size
    center = Image.fromarray(picture((60, 90), 0)).crop((15, 0, 75, 60)).resize((64, 64), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(center)).permute(2, 0, 1) / 255
    torch.testing.assert_close(seen["mine"][0].cpu(), expected, atol=0.02, rtol=0)


def test_the_kinds_that_are_told_before_torch_is_loaded_are_those_there_are():
    assert tuple(visualize_run.KINDS) == PICTURES


def test_all_leaves_out_what_a_student_of_another_type_does_not_have(world, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(modeling.STUDENTS, "conv_student", "helpers.conv_student:ConvStudent")
    ConvStudent(ConvStudentConfig()).save_pretrained(tmp_path / "conv")
    written = visualize("all", [str(tmp_path / "conv")], str(world), output=tmp_path / "out", overrides=["images=2"])
    assert [path.suffix for path in written] == [".png"]  # its features
    assert "attention is left out: This student's summary is the mean" in caplog.text
    assert "positions is left out: conv has no position table" in caplog.text

"""`eval knn` against scikit-learn on summaries from the original models; killed, on two processes, refused."""

import json
import time
from importlib import resources

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from sklearn.neighbors import KNeighborsClassifier

from helpers.classification_world import pictures, run_processes, start_process, write_folders, write_parquet
from helpers.paths import ROOT
from transformers_radio.evaluation.images.labeled import LabeledSplit
from transformers_radio.evaluation.models.encoder import VisionStudent
from transformers_radio.evaluation.run import load_config, load_task, run_task
from transformers_radio.modeling import RadioConfig, RadioModel
from transformers_radio.modeling.image_processing_radio import RadioImageProcessor

torch.set_num_threads(1)  # as in the processes that the tests start: bits are equal only for the same number

CLIP = str(resources.files("transformers_radio") / "quickstart" / "teachers" / "clip")
TRAIN, VALIDATION = pictures(120, seed=0), pictures(60, seed=1)
SETTINGS = ["k=5", "batch_size=8", "num_workers=2", "memory_gb=0.001"]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    tiny = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "max_img_size": 64}
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("students") / "mine" / "student"
    config = RadioConfig.from_size("vit-ti-16", **tiny, num_registers=1, preferred_resolution=32)
    RadioModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = write_folders(tmp_path_factory.mktemp("sets") / "pictures", "train", TRAIN)
    return write_folders(folder, "val", VALIDATION, broken=1)


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    folder = write_parquet(tmp_path_factory.mktemp("sets") / "parquet", "train", TRAIN, files=6)
    return write_parquet(folder, "validation", VALIDATION, files=1)


def scikit_learn(summarize, resize, validation):
    """Percent, from one image at a time."""
    vectors = [
        np.stack([summarize(resize(Image.fromarray(pixels))) for pixels, _ in made]) for made in (TRAIN, validation)
    ]
    labels = [[label for _, label in made] for made in (TRAIN, validation)]
    neighbors = KNeighborsClassifier(
        5, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    )
    return 100 * neighbors.fit(vectors[0], labels[0]).score(vectors[1], labels[1])


def as_batch(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def cover(side):
    return lambda image: ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)


def student_summaries(folder):
    model = RadioModel.from_pretrained(folder).eval()
    with torch.no_grad():
        return lambda image: model(as_batch(image)).summary[0].detach().double().numpy()


def test_a_student_and_a_teacher_are_scikit_learns_figures(student, folders, tmp_path):
    models = [str(student), f"CLIP=open_clip:{CLIP}"]
    first, second = run_task("knn", models, str(folders), None, tmp_path, SETTINGS)
    expected = scikit_learn(student_summaries(student), cover(32), VALIDATION[:-1])
    assert first.metrics == {"k-NN": pytest.approx(expected, abs=1e-9)} and 40 < expected < 95
    clip = open_clip.create_model("local-dir:" + CLIP).eval()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def summarize(image):
        with torch.no_grad():
            return clip.encode_image((as_batch(image) - mean) / std)[0].double().numpy()

    expected = scikit_learn(summarize, cover(64), VALIDATION[:-1])
    assert second.metrics == {"k-NN": pytest.approx(expected, abs=1e-9)} and 40 < expected < 95
    assert (first.resolution, second.resolution) == (32, 64)
    assert first.counts == {
        "bank_images": 120, "query_images": 59, "classes": 3, "bank_skipped": 0, "query_skipped": 1
    }  # fmt: skip
    assert first.protocol == (
        "k = 5, votes exp(cosine similarity / 0.07); 32 x 32 px, scaled to cover, center cut out; bank of 120 images"
    )
    assert first.model == "mine/student" and first.data == "pictures"
    written = json.loads((tmp_path / "mine-student" / "knn.pictures.json").read_text())
    assert written["metrics"] == first.metrics and written["settings"]["bank"]["split"] == "train"


def test_what_is_finished_is_not_done_again(student, folders, tmp_path, monkeypatch):
    (first,) = run_task("knn", [str(student)], str(folders), None, tmp_path, SETTINGS)

    def never(self, images):
        raise AssertionError("nothing is left to encode")

    monkeypatch.setattr(VisionStudent, "summary", never)
    (again,) = run_task("knn", [str(student)], str(folders), None, tmp_path, SETTINGS)
    assert again == first
    with pytest.raises(ValueError, match="other settings; it differs in k .5 there, 6 here."):
        run_task("knn", [str(student)], str(folders), None, tmp_path, [*SETTINGS, "k=6"])
    (tmp_path / "mine-student" / "knn.pictures.json").unlink()
    (other,) = run_task("knn", [str(student)], str(folders), None, tmp_path, [*SETTINGS, "k=6"])  # from the summaries
    assert other.metrics != {} and other.settings["k"] == 6
    with pytest.raises(AssertionError, match="nothing is left"):
        run_task("knn", [str(student)], str(folders), None, tmp_path, [*SETTINGS, "overwrite=true"])


@pytest.mark.parametrize("size", ["32", "[32,48]"])
def test_other_sizes(size, student, parquet, tmp_path):
    (result,) = run_task("knn", [str(student)], str(parquet), None, tmp_path, [*SETTINGS, f"image_size={size}"])
    processor = RadioImageProcessor(size={"shortest_edge": 32}, size_divisor=8)

    def keep_aspect(image):
        height, width = processor(image, return_tensors="pt").pixel_values.shape[2:]
        return image.resize((width, height), Image.Resampling.BICUBIC)

    resize = keep_aspect if size == "32" else lambda image: ImageOps.fit(image, (48, 32), Image.Resampling.BICUBIC)
    expected = scikit_learn(student_summaries(student), resize, VALIDATION)
    assert result.metrics == {"k-NN": pytest.approx(expected, abs=1e-9)}
    assert result.resolution == json.loads(size)


def test_two_processes_write_the_result_of_one(student, folders, tmp_path):
    arguments = ("knn", [str(student)], str(folders), None)
    run_task(*arguments, tmp_path / "one", SETTINGS)
    run_processes(run_task, *arguments, tmp_path / "two", SETTINGS)
    one, two = (tmp_path / name / "mine-student" / "knn.pictures.json" for name in ("one", "two"))
    assert two.read_text() == one.read_text()


def test_killed_and_continued_is_the_same_result(student, parquet, tmp_path):
    settings = [*SETTINGS, "batch_size=1", "image_size=160"]
    arguments = ("knn", [str(student)], str(parquet), None)
    process = start_process(run_task, *arguments, tmp_path, settings)
    bank = tmp_path / "mine-student" / "knn.parquet" / "train"
    deadline = time.monotonic() + 60
    while process.is_alive() and not list(bank.glob("*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.join()
    before = {path: path.stat().st_mtime_ns for path in bank.parent.rglob("*.safetensors")}
    assert 2 <= len(before) < 7  # the queries and some of the six files of the bank
    (result,) = run_task(*arguments, tmp_path, settings)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    (whole,) = run_task(*arguments, tmp_path / "whole", settings)
    assert result == whole


def test_half_precision_summaries_halve_the_disk(student, parquet, tmp_path):
    run_task("knn", [str(student)], str(parquet), None, tmp_path, [*SETTINGS, "store_dtype=float16"])
    for path in (tmp_path / "mine-student" / "knn.parquet").rglob("*.safetensors"):
        assert load_file(path)["summaries"].dtype == torch.float16


def test_classes_that_the_bank_does_not_have_are_named(student, folders, parquet, tmp_path, monkeypatch):
    encoded = []
    summary = VisionStudent.summary
    monkeypatch.setattr(VisionStudent, "summary", lambda *images: encoded.append(images) or summary(*images))
    for data, missing in ((folders, "'green_Box!', 'red ball'"), (parquet, "'blue cone'")):
        with pytest.raises(ValueError, match=rf"no image in the bank \(train\): \[{missing}\]\. Raise train_limit"):
            run_task("knn", [str(student)], str(data), None, tmp_path, [*SETTINGS, "k=1", "train_limit=2"])
        assert bool(encoded) == (data == parquet)  # the names of class folders show it before


def test_more_neighbors_than_the_bank_has_are_refused_before_the_first_image(
    student, folders, parquet, tmp_path, monkeypatch
):
    monkeypatch.setattr(VisionStudent, "summary", None)  # cannot be called
    for data, limit, images in ((folders, "null", 120), (parquet, "7", 7)):
        with pytest.raises(ValueError, match=f"k is 121; expected 1 to {images}, "):
            run_task("knn", [str(student)], str(data), None, tmp_path, ["k=121", f"train_limit={limit}"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "promised"),
    [
        (["name=ImageNet-1k"], 1000),
        (["name=birds"], None),
    ],
)
def test_a_set_of_another_number_of_classes_than_its_name_has_warns(
    settings, promised, student, folders, parquet, tmp_path, caplog
):
    for data in (folders, parquet):
        caplog.clear()
        run_task("knn", [str(student)], str(data), None, tmp_path / data.name, [*SETTINGS, *settings])
        warned = f"should have {promised} classes, but {data} has 3: results are not those of the whole set"
        assert (warned in caplog.text) if promised else ("should have" not in caplog.text)


def test_labels_that_class_folders_show_are_those_of_their_rows(folders, parquet):
    for limit in (None, 10, 60):
        split = LabeledSplit(folders, "train", limit=limit)
        assert split.labels_of_folders() == {label for _, label in split.rows()}
    assert LabeledSplit(parquet, "train").labels_of_folders() is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["k=0"], "k is 0"),
        (["k=500"], "k is 500; expected 1 to 120"),
        (["temperature=-1"], "temperature is -1"),
        (["memory_gb=0.0000001"], "GB are too little"),
        (["split=test"], "has no split 'test'"),
        (["label_column=kind"], "no label column among .'kind'."),
        (["image_size=33"], "multiples of 8, not 33 x 33: use 32 x 32"),
        (["image_size=big"], "image_size is 'big'"),
        (["image_size=[32]"], r"image_size is \[32\]"),
        (["store_dtype=int8"], "dtype of the store is 'int8'"),
        (["batch_size=0"], "batch_size is 0"),
        (["train_limit=0"], "limit is 0"),
    ],
)
def test_bad_settings_are_named(overrides, message, student, parquet, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_task("knn", [str(student)], str(parquet), None, tmp_path, overrides)


def test_models_that_cannot_be_compared_are_named(student, folders, tmp_path):
    clip = f"open_clip:{CLIP}"
    with pytest.raises(ValueError, match=r"takes only squares.*use image_size=\[64,64\]"):
        run_task("knn", [clip], str(folders), None, tmp_path, ["image_size=64"])
    with pytest.raises(ValueError, match="built for 64 x 64 pixels and cannot take 64 x 80"):
        run_task("knn", [clip], str(folders), None, tmp_path, ["image_size=[64,80]"])
    with pytest.raises(ValueError, match="have one name"):
        run_task("knn", [clip, clip], str(folders), None, tmp_path, [])


@pytest.mark.parametrize(
    ("task", "override", "message"),
    [
        ("knn", "classes=[a,b,c]", "classes: .*The settings are data, .*, train_split, "),
        ("zero-shot", "train_split=train", "train_split: .*The settings are data, .*, classes, "),
    ],
)
def test_settings_of_the_other_task_are_refused(task, override, message, student, parquet, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_task(task, [str(student)], str(parquet), None, tmp_path, [override])


@pytest.mark.parametrize("task", ["knn", "zero-shot"])
def test_the_recipe_of_imagenet_is_for_both_tasks(task):
    recipe = ROOT / "recipes" / "evaluation" / "imagenet1k.yaml"
    schema, passed_over = load_task(task).config_class, load_task(task).passed_over
    config = load_config(schema, None, recipe, ["store_dtype=float16"], passed_over)
    assert (config.data, config.split, config.title) == ("ILSVRC/imagenet-1k", "validation", "ImageNet-1k")
    assert load_config(schema, "data/imagenet", recipe, [], passed_over).data == "data/imagenet"
    if task == "knn":
        assert (config.k, config.temperature, config.train_split) == (20, 0.07, "train")

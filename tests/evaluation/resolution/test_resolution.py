"""A student with two modes is flagged and the same one without is not; every figure against other libraries."""

import json
import shutil
import time
from importlib import resources

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.neighbors import KNeighborsClassifier

from helpers.classification_world import start_process
from transformers_radio.evaluation.images.labeled import LabeledSplit
from transformers_radio.evaluation.images.sampled import sample_labeled_files
from transformers_radio.evaluation.images.summaries import extract_summaries
from transformers_radio.evaluation.resolution import figure as resolution_plot
from transformers_radio.evaluation.resolution.figure import curves, parse_size, resolution_figure, size_name
from transformers_radio.evaluation.resolution.task import find_collapses
from transformers_radio.evaluation.result import Result
from transformers_radio.evaluation.run import run_task
from transformers_radio.modeling import RadioConfig, RadioModel

torch.set_num_threads(1)
CLIP = str(resources.files("transformers_radio") / "quickstart" / "teachers" / "clip")
COLORS = {"blue": (30, 40, 220), "green": (40, 200, 60), "red": (220, 30, 40), "white": (230, 230, 230)}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Class folders of noisy colors, wider than high."""
    root = tmp_path_factory.mktemp("data") / "colors"
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("validation", 4)):
        for name, color in COLORS.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(generator.normal(color, 40, (24, 36, 3)), 0, 255).astype(np.uint8)
                image = Image.fromarray(pixels).resize((72, 48), Image.Resampling.BICUBIC)
                image.save(root / split / name / f"{number}.png")
    (root / "validation" / "red" / "broken.png").write_bytes(b"no picture")
    return root


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    """One that sees alike at all sizes; and one with SAM's mode at the size of its position table.

    A checkerboard in the position table averages out when the table is halved, and is there when it is used as it is;
    two hidden units of the last MLP see it and drown the image: 128 pixels are another world than 64, as 1024 are
    than 432 for RADIO v2.1.
    """
    folder = tmp_path_factory.mktemp("students")
    tiny = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2.0, "patch_size": 8}
    torch.manual_seed(0)
    config = RadioConfig(**tiny, max_img_size=128, preferred_resolution=64, summary_type="mean", num_cls_tokens=1)
    model = RadioModel(config).eval()
    with torch.no_grad():
        model.embeddings.patch_projection.weight.mul_(4)
        model.save_pretrained(folder / "steady")
        row, column = torch.arange(16)[:, None], torch.arange(16)
        board = torch.where((row + column) % 2 == 0, 1.0, -1.0).flatten()[:, None]  # (16 * 16, 1)
        direction = F.normalize(torch.randn(32), dim=0)
        model.embeddings.position_embedding += 50 * board * direction
        mlp = model.encoder.layer[-1].mlp
        mlp.fc1.weight[:2] = torch.stack([direction, -direction])
        mlp.fc1.bias[:2] = -3  # of at most sqrt(32) behind the norm
        mlp.fc2.weight[:, :2] = 100 * torch.randn(32, 1)
        model.save_pretrained(folder / "two-modes")
    return folder


SETTINGS = ["sizes=[32,62,128,[32,64]]", "k=3", "feature_images=6", "batch_size=4"]


@pytest.fixture(scope="module")
def results(pictures, students, tmp_path_factory):
    output = tmp_path_factory.mktemp("results")
    models = [str(students / "steady"), str(students / "two-modes")]
    return run_task("resolution", models, str(pictures), None, output, SETTINGS), output


def test_a_mode_switch_is_flagged_and_its_absence_is_not(results):
    (steady, switching), _ = results
    assert steady.settings["flagged"] == {} and "Nothing collapses" in steady.protocol
    assert list(switching.settings["flagged"]) == ["128"]
    assert "k-NN, reference bank" in switching.settings["flagged"]["128"]
    assert switching.counts["sizes_flagged"] == 1 and "MODE SWITCH? Below 0.5 of the reference at 128" in (
        switching.protocol
    )
    for result in (steady, switching):
        assert result.metrics["k-NN @ 64"] == result.metrics["k-NN, reference bank @ 64"] >= 90
        assert result.metrics["Summary cosine @ 64"] == pytest.approx(1)
        assert result.metrics["Feature cosine @ 64"] == pytest.approx(1)
        assert result.resolution == 64
    # the bank at the same size hides what the bank at the reference shows
    assert switching.metrics["k-NN @ 128"] > 2 * switching.metrics["k-NN, reference bank @ 128"]
    assert "k-NN" not in switching.settings["flagged"]["128"]


def test_sizes_and_what_is_left_out_are_reported(results):
    (steady, _), _ = results
    assert steady.settings["used_sizes"] == {"32": "32", "62": "64", "128": "128", "32x64": "32x64"}
    assert set(curves(steady)["k-NN"]) == {(32, 32), (64, 64), (128, 128), (32, 64)}
    assert (
        list(steady.settings["left_out"]) == ["Zero-shot"] and "no adaptor" in steady.settings["left_out"]["Zero-shot"]
    )
    counts = {"images": 16, "bank_images": 32, "feature_images": 6, "skipped_images": 1, "classes": 4}
    assert counts.items() <= steady.counts.items() and steady.counts["classes_without_bank"] == 0


def load(folder, size):
    """All images of a split, class by class, and their labels."""
    images, labels = [], []
    for label, name in enumerate(COLORS):
        for path in sorted((folder / name).glob("[0-9]*.png")):
            image = Image.open(path).resize((size[1], size[0]), Image.Resampling.BICUBIC)
            images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255)
            labels.append(label)
    return torch.stack(images), np.array(labels)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """In float32, whose position table OpenCLIP can resize on a CPU."""
    folder = tmp_path_factory.mktemp("clip") / "clip"
    shutil.copytree(CLIP, folder)
    weights = load_file(folder / "open_clip_model.safetensors")
    save_file({name: tensor.float() for name, tensor in weights.items()}, folder / "open_clip_model.safetensors")
    return folder


@pytest.mark.parametrize("size", [(32, 32), (32, 64), (128, 128)])
def test_knn_and_cosines_are_those_of_other_libraries(results, pictures, students, size):
    (_, result), _ = results
    model = RadioModel.from_pretrained(students / "two-modes").eval()
    summaries = {}
    with torch.no_grad():
        for split in ("train", "validation"):
            for at in (size, (64, 64)):
                images, labels = load(pictures / split, at)
                output = model(images, adaptors=[])
                summaries[split, at] = F.normalize(output.summary, dim=1).double().numpy(), labels
    queries, labels = summaries["validation", size]
    weight = lambda distance: np.exp((1 - distance) / 0.07)  # noqa: E731
    for measure, at in (("k-NN", size), ("k-NN, reference bank", (64, 64))):
        knn = KNeighborsClassifier(3, metric="cosine", weights=weight, algorithm="brute").fit(*summaries["train", at])
        assert result.metrics[f"{measure} @ {size_name(size)}"] == pytest.approx(100 * knn.score(queries, labels))
    cosine = (queries * summaries["validation", (64, 64)][0]).sum(1).mean()
    assert result.metrics[f"Summary cosine @ {size_name(size)}"] == pytest.approx(cosine, abs=1e-5)


def test_teachers_skip_what_is_not_square_and_zero_shot_is_open_clips(pictures, clip, tmp_path):
    names = list(COLORS)
    overrides = [*SETTINGS, "templates=['a {} star']", f"classes=[{','.join(names)}]"]
    (result,) = run_task("resolution", [f"clip=open_clip:{clip}"], str(pictures), None, tmp_path, overrides)
    assert list(result.settings["left_out"]) == ["32x64"]
    assert "only squares" in result.settings["left_out"]["32x64"] and result.counts["sizes_left_out"] == 1
    assert "Left out: 32x64" in result.protocol and "k-NN @ 32x64" not in result.metrics

    tokenizer = open_clip.get_tokenizer(f"local-dir:{clip}")
    for size in (64, 128):
        model = open_clip.create_model(f"local-dir:{clip}", force_image_size=size).eval()
        config = open_clip.get_model_preprocess_cfg(model)
        mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
        images, labels = load(pictures / "validation", (size, size))
        with torch.no_grad():
            text = F.normalize(model.encode_text(tokenizer([f"a {name} star" for name in names])), dim=1)
            chosen = (model.encode_image((images - mean) / std) @ text.T).argmax(1).numpy()
        assert result.metrics[f"Zero-shot @ {size}"] == pytest.approx(100 * (chosen == labels).mean())


def test_a_finished_result_is_not_measured_again_and_the_picture_is_drawn(results, pictures, students, monkeypatch):
    (steady, switching), output = results
    monkeypatch.setattr(
        "transformers_radio.evaluation.resolution.task.extract_summaries", lambda *_, **__: pytest.fail("encoded")
    )
    picture = output / "resolution.colors.png"
    before = picture.read_bytes()
    models = [str(students / "steady"), str(students / "two-modes")]
    assert run_task("resolution", models, str(pictures), None, output, SETTINGS) == [steady, switching]
    assert picture.read_bytes() == before
    with pytest.raises(ValueError, match="k \\(3 there, 2 here\\)"):
        run_task("resolution", models, str(pictures), None, output, [*SETTINGS, "k=2"])


def test_a_killed_run_goes_on_at_the_first_size_that_is_not_whole(pictures, students, tmp_path, monkeypatch):
    settings = ["sizes=[32,48,80,96,112,128,[32,64]]", "k=3", "feature_images=6", "batch_size=1"]
    arguments = ("resolution", [str(students / "steady")], str(pictures), None)
    process = start_process(run_task, *arguments, tmp_path / "killed", settings)
    work = tmp_path / "killed" / "steady" / "resolution.colors"
    deadline = time.monotonic() + 200
    while not (work / "48.json").exists():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.join()
    whole = {path.stem for path in work.glob("*.json")} - {"settings"}
    assert {"64", "32", "48"} <= whole and len(whole) < 8 and not work.with_name("resolution.colors.json").exists()

    encoded = []

    def watched(*arguments, description, **options):
        encoded.append(description.split()[1])
        return extract_summaries(*arguments, description=description, **options)

    monkeypatch.setattr("transformers_radio.evaluation.resolution.task.extract_summaries", watched)
    (result,) = run_task(*arguments, tmp_path / "killed", settings)
    assert whole.isdisjoint(encoded) and len(set(encoded)) == 8 - len(whole)
    assert result == run_task(*arguments, tmp_path / "whole", settings)[0]
    assert not work.exists()


def test_other_files_are_another_result_and_work_of_theirs_is_refused(pictures, students, tmp_path, monkeypatch):
    data = shutil.copytree(pictures, tmp_path / "colors")
    arguments = ("resolution", [str(students / "steady")], str(data), None, tmp_path / "out")
    settings = ["sizes=[32]", "k=3", "feature_images=2"]
    (result,) = run_task(*arguments, settings)
    assert result.settings["seed"] == 0
    (data / "train" / "red" / "0.png").touch()
    with pytest.raises(ValueError, match=r"differs in bank.files \("):
        run_task(*arguments, settings)
    path = tmp_path / "out" / "steady" / "resolution.colors.json"
    path.unlink()
    claimed = tmp_path / "out" / "steady" / "resolution.colors" / "settings.json"
    claimed.parent.mkdir()
    claimed.write_text(json.dumps({key: result.settings[key] for key in ("bank", "queries")}))
    with pytest.raises(ValueError, match="holds work of other settings; it differs in .*bank"):
        run_task(*arguments, settings)


def test_classes_without_an_image_in_the_bank_are_named(pictures, students, tmp_path):
    data = shutil.copytree(pictures, tmp_path / "colors")
    for number in range(8):
        (data / "train" / "white" / f"{number}.png").unlink()
    (data / "train" / "white" / "broken.png").write_bytes(b"no picture")
    settings = ["sizes=[32]", "k=3", "feature_images=2"]
    (result,) = run_task("resolution", [str(students / "steady")], str(data), None, tmp_path / "out", settings)
    assert "The bank has no image of 1 of the classes, which k-NN therefore gets wrong: white." in result.protocol
    assert result.counts["classes_without_bank"] == 1 and result.metrics["k-NN @ 64"] <= 75


def red_pixels(path):
    pixels = np.array(Image.open(path).convert("RGB")).astype(int)
    return int(((pixels[..., 0] > 240) & (pixels[..., 1:] < 40).all(-1)).sum())


def test_the_picture_rings_what_is_flagged(tmp_path, monkeypatch):
    figures = []
    save = resolution_plot.save_figure
    monkeypatch.setattr(
        resolution_plot, "save_figure", lambda figure, path: figures.append(figure) or save(figure, path)
    )
    metrics = {"k-NN @ 64": 80.0, "k-NN @ 128": 2.0, "k-NN @ 64x128": 70.0, "Summary cosine @ 64": 1.0}
    plain = Result("resolution", "m", "d", metrics, "", {"reference": 64, "flagged": {}})
    flagged = Result("resolution", "m", "d", metrics, "", {"reference": 64, "flagged": {"128": ["k-NN"]}})
    rings = [red_pixels(resolution_figure([one], tmp_path / "picture.png")[0]) for one in (plain, flagged)]
    assert rings[0] == 0 and rings[1] > 20
    for axes in figures[0].axes:  # two side by side, with labels around them
        assert axes.get_position().width > 0.35 and axes.get_position().height > 0.5
    knn, cosine = figures[0].axes
    assert (knn.get_ylabel(), cosine.get_ylabel()) == ("k-NN (%)", "Summary cosine")
    assert knn.get_xlabel() == "Input size (pixels)" and knn.get_ylim()[0] == 0
    assert curves(plain) == {
        "k-NN": {(64, 64): 80.0, (128, 128): 2.0, (64, 128): 70.0},
        "Summary cosine": {(64, 64): 1.0},
    }
    assert [parse_size(size_name(size)) for size in ((64, 64), (64, 96))] == [(64, 64), (64, 96)]
    with pytest.raises(ValueError, match="no curve"):
        resolution_figure([Result("resolution", "m", "d", {"k-NN": 1.0}, "")], tmp_path / "none.png")


def test_collapse_is_relative_to_the_reference():
    """The published fall of RADIO v2.1."""
    zero_shot = {224: 78.89, 256: 80.78, 336: 82.32, 432: 82.80, 512: 82.88, 768: 1.29, 1024: 0.20}
    measured = {(side, side): {"Zero-shot": value, "other": 3.0} for side, value in zero_shot.items()}
    assert find_collapses(measured, (432, 432), 0.5) == {"768": ["Zero-shot"], "1024": ["Zero-shot"]}
    assert find_collapses(measured, (432, 432), 0.01) == {"1024": ["Zero-shot"]}


class TestSample:
    def test_of_class_folders_any_image_may_come_and_the_seed_decides(self, pictures):
        labels = sample_labeled_files(LabeledSplit(pictures, "train"), limit=12).labels.tolist()
        assert len(labels) == 12 and len(set(labels)) >= 3  # the first twelve are of two classes
        assert sample_labeled_files(LabeledSplit(pictures, "train"), limit=12).labels.tolist() == labels
        assert sample_labeled_files(LabeledSplit(pictures, "train"), limit=12, seed=1).labels.tolist() != labels

    def test_batches_are_the_whole_image_at_any_size(self, pictures):
        files = sample_labeled_files(LabeledSplit(pictures, "validation"))
        assert len(files.files) == 16 and files.skipped == {"undecodable": 1} and files.class_names == list(COLORS)
        batches = files.batches((40, 56), 6)
        assert [tuple(batch.shape) for batch in batches] == [(6, 3, 40, 56), (6, 3, 40, 56), (4, 3, 40, 56)]
        expected, labels = load(pictures / "validation", (40, 56))
        assert torch.equal(torch.cat(list(batches)).float() / 255, expected)
        assert files.labels.tolist() == labels.tolist()

    def test_a_broken_file_of_both_splits_is_one(self, pictures, students, tmp_path):
        settings = ["sizes=[32]", "k=3", "feature_images=2", "train_split=validation", "bank_images=12"]
        (result,) = run_task("resolution", [str(students / "steady")], str(pictures), None, tmp_path, settings)
        whole = sample_labeled_files(LabeledSplit(pictures, "validation"))
        assert result.counts["skipped_images"] == len(whole.unusable) == 1
        assert whole.unusable >= sample_labeled_files(LabeledSplit(pictures, "validation"), limit=12).unusable

    def test_bad_sources_are_named(self, pictures, tmp_path):
        with pytest.raises(ValueError, match="limit is 0"):
            sample_labeled_files(LabeledSplit(pictures, "train"), limit=0)
        with pytest.raises(ValueError, match="no label column"):
            LabeledSplit(pictures, "train", label_column="breed")


def test_bad_settings_are_refused_before_anything_is_encoded(pictures, students, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "transformers_radio.evaluation.resolution.task.extract_summaries", lambda *_, **__: pytest.fail("encoded")
    )
    for change, message in [
        ("sizes=[64,[1,2,3]]", r"sizes has \[1, 2, 3\]"),
        ("sizes=[wide]", "sizes has 'wide'"),
        ("k=0", "k is 0"),
        ("k=33", "fewer than k"),
        ("text=word2vec:news", "'word2vec:news' is not a text tower"),
        ("flag_below=1.5", "flag_below is 1.5"),
        ("classes=[a,b]", "2 class names, but .* has 4 classes"),
    ]:
        with pytest.raises(ValueError, match=message):
            run_task("resolution", [str(students / "steady")], str(pictures), None, tmp_path, [*SETTINGS, change])
    with pytest.raises(ValueError, match="one name"):
        run_task("resolution", [str(students / "steady")] * 2, str(pictures), None, tmp_path, SETTINGS)
    assert not list(tmp_path.rglob("*.json"))

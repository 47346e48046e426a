"""`eval zero-shot` against open_clip's and transformers' own towers and classifier; continued, on two processes."""

import gc
import json
import shutil
import weakref
from importlib import resources

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.zero_shot_classifier import build_zero_shot_classifier
from PIL import Image, ImageOps
from transformers import SiglipModel

from helpers.classification_world import CLASSES, pictures, run_processes, write_folders, write_parquet
from helpers.tiny_text_towers import siglip_embeddings, write_siglip
from transformers_radio.evaluation.classification import zero_shot_task as zero_shot
from transformers_radio.evaluation.models.encoder import VisionStudent
from transformers_radio.evaluation.run import run_task
from transformers_radio.modeling import RadioConfig, RadioModel

torch.set_num_threads(1)  # as in the processes that the tests start: bits are equal only for the same number

CLIP = str(resources.files("transformers_radio") / "quickstart" / "teachers" / "clip")
VALIDATION = pictures(60, seed=1)
NAMES = ["a red sphere", "green cube", "blue Cone!"]
TEMPLATES = ["a {}.", "the photo of_one {}"]
SETTINGS = ["batch_size=8", "num_workers=2"]


def as_batch(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def expected_accuracy(summarize, side, classifier):
    """Percent, from one image at a time; `classifier` (C, D)."""
    correct = 0
    with torch.no_grad():
        for pixels, label in VALIDATION:
            image = ImageOps.fit(Image.fromarray(pixels), (side, side), Image.Resampling.BICUBIC)
            correct += int((summarize(as_batch(image)) @ classifier.T).argmax() == label)
    return 100 * correct / len(VALIDATION)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    (folder / "names.txt").write_text("\n".join(NAMES) + "\n")
    (folder / "templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    return [f"classes={folder / 'names.txt'}", f"templates={folder / 'templates.txt'}"]


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    return write_parquet(tmp_path_factory.mktemp("sets") / "pictures", "validation", VALIDATION, files=3)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip")
    write_siglip(folder)
    return folder


def make_student(folder, **adaptors):
    tiny = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "max_img_size": 64}
    torch.manual_seed(3)
    entries = {
        name: {"feature_dim": 8, "hidden_dim": 16, "summary_token": 0, **adaptor} for name, adaptor in adaptors.items()
    }
    config = RadioConfig.from_size("vit-ti-16", **tiny, preferred_resolution=32, adaptors=entries)
    model = RadioModel(config).eval()
    with torch.no_grad():
        for parameter in model.adaptors.parameters():
            if parameter.ndim > 1:
                parameter.mul_(20)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def student(tmp_path_factory, siglip):
    """(folder, model) of a student with both teachers and one without a summary."""
    folder = tmp_path_factory.mktemp("students") / "mine" / "student"
    model = make_student(
        folder,
        clip={"summary_dim": 128, "teacher": f"open_clip:{CLIP}"},
        siglip2={"summary_dim": 24, "teacher": f"transformers:{siglip}"},
        sam={"summary_dim": None, "teacher": "segment_anything:sam.pth"},
    )
    return folder, model


@pytest.fixture(scope="module")
def clip_classifier():
    """(D, C) -> (C, D), by open_clip's own function."""
    clip = open_clip.create_model("local-dir:" + CLIP).eval()
    return build_zero_shot_classifier(clip, open_clip.get_tokenizer("local-dir:" + CLIP), NAMES, TEMPLATES).T


@pytest.fixture(scope="module")
def siglip_classifier(siglip):
    """(C, D), from the full model and texts written out by hand as SigLIP2 reads them."""
    model = SiglipModel.from_pretrained(siglip).eval()
    classes = []
    for name in ("a red sphere", "green cube", "blue cone"):
        rows = F.normalize(siglip_embeddings(model, [f"a {name}", f"the photo of one {name}"]), dim=1)
        classes.append(F.normalize(sum(rows), dim=0))
    return torch.stack(classes)


def test_teacher_and_student_in_open_clips_space(student, words, parquet, clip_classifier, tmp_path):
    models = [f"CLIP=open_clip:{CLIP}", str(student[0])]
    first, second = run_task("zero-shot", models, str(parquet), None, tmp_path, [*SETTINGS, *words])
    clip = open_clip.create_model("local-dir:" + CLIP).eval()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = expected_accuracy(lambda batch: clip.encode_image((batch - mean) / std), 64, clip_classifier)
    assert first.metrics == {"Zero-shot": pytest.approx(expected)} and 10 < expected < 100
    expected = expected_accuracy(lambda batch: student[1](batch).adaptors["clip"].summary, 32, clip_classifier)
    assert second.metrics == {"Zero-shot": pytest.approx(expected)} and 10 < expected < 100
    assert first.counts == {"images": 60, "classes": 3, "classes_without_images": 0, "skipped": 0}
    assert second.protocol == (
        f"3 classes, 2 templates, text tower open_clip:{CLIP}; 32 x 32 px, scaled to cover, center cut out"
    )
    assert (first.resolution, second.resolution, second.settings["adaptor"]) == (64, 32, "clip")
    assert json.loads((tmp_path / "mine-student" / "zero-shot.pictures.json").read_text())["metrics"] == second.metrics
    (kept,) = (tmp_path / "classifiers").glob("*.safetensors")  # one tower, one classifier
    made = zero_shot.load_file(kept)["classifier"]
    torch.testing.assert_close(made, clip_classifier)


def test_teacher_and_student_in_siglips_space(siglip, student, words, parquet, siglip_classifier, tmp_path):
    models = [f"SigLIP2=transformers:{siglip}", str(student[0])]
    settings = [*SETTINGS, *words, "adaptor=siglip2"]
    first, second = run_task("zero-shot", models, str(parquet), None, tmp_path, settings)
    model = SiglipModel.from_pretrained(siglip).eval()
    expected = expected_accuracy(
        lambda batch: model.get_image_features((batch - 0.5) / 0.25).pooler_output, 32, siglip_classifier
    )
    assert first.metrics == {"Zero-shot": pytest.approx(expected)} and 10 < expected < 100
    expected = expected_accuracy(lambda batch: student[1](batch).adaptors["siglip2"].summary, 32, siglip_classifier)
    assert second.metrics == {"Zero-shot": pytest.approx(expected)} and 10 < expected < 100
    assert second.settings["text"] == f"transformers:{siglip}"


def test_names_of_the_data_and_openais_80_templates_are_the_default(student, parquet, tmp_path):
    (result,) = run_task("zero-shot", [str(student[0])], str(parquet), None, tmp_path, SETTINGS)
    clip = open_clip.create_model("local-dir:" + CLIP).eval()
    tokenizer = open_clip.get_tokenizer("local-dir:" + CLIP)
    classifier = build_zero_shot_classifier(clip, tokenizer, CLASSES, open_clip.OPENAI_IMAGENET_TEMPLATES).T
    expected = expected_accuracy(lambda batch: student[1](batch).adaptors["clip"].summary, 32, classifier)
    assert result.metrics == {"Zero-shot": pytest.approx(expected)} and "80 templates" in result.protocol


def test_a_text_tower_can_be_named(words, parquet, clip_classifier, tmp_path):
    model = make_student(tmp_path / "released", clip={"summary_dim": 128, "teacher": "dfn5b"})
    settings = [*SETTINGS, *words]
    with pytest.raises(ValueError, match="does not say whose text tower it speaks"):
        run_task("zero-shot", [str(tmp_path / "released")], str(parquet), None, tmp_path, settings)
    settings.append(f"text=open_clip:{CLIP}")
    (result,) = run_task("zero-shot", [str(tmp_path / "released")], str(parquet), None, tmp_path, settings)
    expected = expected_accuracy(lambda batch: model(batch).adaptors["clip"].summary, 32, clip_classifier)
    assert result.metrics == {"Zero-shot": pytest.approx(expected)}


@pytest.mark.parametrize("kind", ["open_clip", "transformers"])
def test_a_teacher_that_has_moved_is_asked_for_by_the_setting(kind, words, parquet, tmp_path):
    make_student(tmp_path / "student", clip={"summary_dim": 128, "teacher": f"{kind}:{tmp_path / 'gone' / 'clip'}"})
    with pytest.raises(
        (ValueError, OSError), match=rf"text tower {kind}:.*gone/clip .*text=TYPE:CHECKPOINT\.$"
    ) as error:
        run_task("zero-shot", [str(tmp_path / "student")], str(parquet), None, tmp_path / "out", [*SETTINGS, *words])
    assert "\n" not in str(error.value)


def test_while_a_student_looks_no_teacher_is_in_memory(student, words, parquet, tmp_path, monkeypatch):
    made, alive = [], []
    create_model, language = open_clip.create_model, VisionStudent.language

    def create(*arguments, **options):
        model = create_model(*arguments, **options)
        made.extend(weakref.ref(one) for one in (model.visual, model.transformer, model))
        return model

    def watched(self, images):
        if not alive:
            gc.collect()
        alive.append(sum(reference() is not None for reference in made))
        return language(self, images)

    monkeypatch.setattr(open_clip, "create_model", create)
    monkeypatch.setattr(VisionStudent, "language", watched)
    run_task("zero-shot", [str(student[0])], str(parquet), None, tmp_path, [*SETTINGS, *words])
    assert len(made) == 3 and len(alive) > 3 and set(alive) == {0}


def test_a_continued_run_encodes_nothing_twice(student, words, parquet, tmp_path, monkeypatch):
    arguments = ("zero-shot", [str(student[0])], str(parquet), None, tmp_path, [*SETTINGS, *words])
    (first,) = run_task(*arguments)
    images = []
    language = VisionStudent.language
    monkeypatch.setattr(VisionStudent, "language", lambda self, batch: images.extend(batch) or language(self, batch))
    monkeypatch.setattr(zero_shot, "zero_shot_classifier", None)  # cannot be called
    assert run_task(*arguments) == [first] and len(images) == 1  # one that shows the width of a summary
    work = tmp_path / "mine-student" / "zero-shot.pictures"
    (tmp_path / "mine-student" / "zero-shot.pictures.json").unlink()
    (work / "00001-00000.safetensors").unlink()  # as a kill leaves it
    assert run_task(*arguments) == [first] and len(images) == 1 + 2 + 20
    with pytest.raises(TypeError):  # other words are another classifier
        run_task(*arguments[:-1], [*SETTINGS, words[0], "templates=['{}']"])


def test_another_text_tower_under_the_same_name_is_another_result(student, words, parquet, tmp_path):
    clip = shutil.copytree(CLIP, tmp_path / "clip")
    make_student(tmp_path / "student", clip={"summary_dim": 128, "teacher": f"open_clip:{clip}"})
    arguments = ("zero-shot", [str(tmp_path / "student")], str(parquet), None, tmp_path / "out", [*SETTINGS, *words])
    run_task(*arguments)
    weights = zero_shot.load_file(clip / "open_clip_model.safetensors")
    weights["text_projection"] = weights["text_projection"].flip(0)
    zero_shot.save_file(weights, clip / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match="other settings; it differs in classifier"):
        run_task(*arguments)


def test_two_processes_write_the_result_of_one(student, words, parquet, tmp_path):
    arguments = ("zero-shot", [str(student[0])], str(parquet), None)
    run_task(*arguments, tmp_path / "one", [*SETTINGS, *words])
    run_processes(run_task, *arguments, tmp_path / "two", [*SETTINGS, *words])
    one, two = (tmp_path / name / "mine-student" / "zero-shot.pictures.json" for name in ("one", "two"))
    assert two.read_text() == one.read_text()


def test_what_cannot_be_used_is_named_before_the_first_image(student, siglip, words, parquet, tmp_path, monkeypatch):
    folder = str(student[0])

    def refused(message, models, *overrides, data=parquet):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run_task("zero-shot", models, str(data), None, tmp_path, [*SETTINGS, *overrides])
        assert not list(tmp_path.rglob("*-*.safetensors"))

    refused("There is no file nowhere.txt", [folder], "classes=nowhere.txt")
    refused("2 class names, but .* has 3 classes", [folder], "classes=[a,b]")
    refused("needs one {} for the class name", [folder], "templates=[photo]")
    refused("no adaptor 'sam' with a summary", [folder], "adaptor=sam")
    refused("is not a text tower; expected TYPE:CHECKPOINT", [folder], "text=ViT-B-32", *words)
    refused(r"classifier is \(3, 24\) and the embeddings have 128", [folder], f"text=transformers:{siglip}", *words)
    make_student(tmp_path / "mute")
    refused("no adaptor to a teacher with a text tower", [str(tmp_path / "mute")], *words)
    labels = write_parquet(tmp_path / "labels", "validation", VALIDATION, files=1, names=None)
    refused("does not state the names of its classes", [folder], data=labels)
    refused("label_column|no label column", [folder], "label_column=kind", *words)


def test_labels_beyond_the_class_names_are_named(student, tmp_path):
    data = write_parquet(tmp_path / "labels", "validation", VALIDATION, files=1, names=None)
    with pytest.raises(ValueError, match="2 in column 'label'.*not a class index; expected an integer from 0 to 1"):
        run_task("zero-shot", [str(student[0])], str(data), None, tmp_path, [*SETTINGS, "classes=[a,b]"])


def test_a_split_without_some_classes_says_so(student, words, tmp_path):
    two = [(pixels, label) for pixels, label in VALIDATION if label != 1]
    data = write_parquet(tmp_path / "two", "validation", two, files=1)
    (result,) = run_task("zero-shot", [str(student[0])], str(data), None, tmp_path, [*SETTINGS, *words])
    assert result.counts["classes_without_images"] == 1 and result.counts["images"] == len(two)
    broken = write_folders(tmp_path / "broken", "validation", VALIDATION[:6], broken=6)
    with pytest.raises(ValueError, match="no readable image"):
        run_task("zero-shot", [str(student[0])], str(broken), None, tmp_path, [*SETTINGS, *words])

"""The task heads against transformers' own RADIO backbone, closed-form losses, the Trainer and remote code."""

import json
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn
from torch.nn import functional as F

from helpers.reloaded import assert_same_but_for_rounding, assert_same_weights
from transformers_radio.modeling.configuration_radio import RadioConfig
from transformers_radio.modeling.image_processing_radio import RadioImageProcessor
from transformers_radio.modeling.modeling_radio import RadioModel
from transformers_radio.modeling.modeling_radio_heads import RadioForImageClassification, RadioForSemanticSegmentation

HEAD_KEYS = {
    RadioForImageClassification: {
        *("summary_norm.weight", "summary_norm.bias", "classifier.weight", "classifier.bias"),
    },
    RadioForSemanticSegmentation: {
        *("batch_norm.weight", "batch_norm.bias", "batch_norm.running_mean", "batch_norm.running_var"),
        *("batch_norm.num_batches_tracked", "classifier.weight", "classifier.bias"),
    },
}


def tiny_config(**overrides) -> RadioConfig:
    adaptor = {"summary_dim": 8, "feature_dim": 12, "hidden_dim": 16, "summary_token": 1, "teacher": "clip"}
    options = {
        **{"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "max_img_size": 128},
        **{"num_cls_tokens": 2, "num_registers": 2, "summary_idxs": [0, 1], "adaptors": {"clip": adaptor}},
        **overrides,
    }
    return RadioConfig(**options)


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("student")
    RadioModel(tiny_config()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def native(student_folder):
    return transformers.RadioModel.from_pretrained(student_folder).eval()


def randomise(head: nn.Module) -> nn.Module:
    """Head weights and running statistics that would show if one of them were left out."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, tensor in head.state_dict().items():
            if not name.startswith("model.") and tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.1)
    return head.eval()


def test_image_logits_are_a_linear_map_of_the_normed_native_summary(student_folder, native):
    model = randomise(RadioForImageClassification.from_pretrained(student_folder, num_labels=5))
    pixel_values = torch.rand(3, 3, 32, 64)
    summary = native(pixel_values).summary
    normed = (summary - summary.mean(1, keepdim=True)) / (summary.var(1, keepdim=True, correction=0) + 1e-6).sqrt()
    normed = normed * model.summary_norm.weight + model.summary_norm.bias
    expected = normed @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(model(pixel_values).logits, expected)


def test_segmentation_is_the_papers_linear_head_on_native_features(student_folder, native):
    model = randomise(RadioForSemanticSegmentation.from_pretrained(student_folder, num_labels=3))
    pixel_values = torch.rand(2, 3, 32, 64)
    features = native(pixel_values).features.reshape(2, 2, 4, 32)
    norm = model.batch_norm
    normed = (features - norm.running_mean) / (norm.running_var + 1e-5).sqrt() * norm.weight + norm.bias
    expected = normed @ model.classifier.weight[:, :, 0, 0].T + model.classifier.bias

    labels = torch.randint(0, 3, (2, 40, 50))
    labels[:, :10] = 255
    output = model(pixel_values, labels=labels)
    torch.testing.assert_close(output.logits, expected.permute(0, 3, 1, 2))
    scores = F.interpolate(output.logits, size=(40, 50), mode="bilinear", align_corners=False)
    log_probabilities = scores.log_softmax(1).permute(0, 2, 3, 1)[:, 10:]  # without the ignored rows
    picked = log_probabilities.gather(-1, labels[:, 10:, :, None])
    torch.testing.assert_close(output.loss, -picked.mean())


def test_segmentation_ignore_index(student_folder):
    model = RadioForSemanticSegmentation.from_pretrained(student_folder, num_labels=3).eval()
    model.config.semantic_loss_ignore_index = 0
    pixel_values = torch.rand(1, 3, 32, 32)
    labels = torch.zeros(1, 32, 32, dtype=torch.long)
    loss = model(pixel_values, labels=labels).loss
    assert loss == 0 and loss.requires_grad  # nothing to learn from, and no NaN that would spoil the weights
    labels[0, 5, 7] = 2
    scores = F.interpolate(model(pixel_values).logits, size=(32, 32), mode="bilinear", align_corners=False)
    torch.testing.assert_close(model(pixel_values, labels=labels).loss, -scores.log_softmax(1)[0, 2, 5, 7])
    for dtype in (torch.uint8, torch.int32):
        assert torch.equal(model(pixel_values, labels=labels.to(dtype)).loss, model(pixel_values, labels=labels).loss)
    with pytest.raises(ValueError, match="dtype torch.float32; expected one map of integers"):
        model(pixel_values, labels=labels.float())


@pytest.mark.parametrize("head", HEAD_KEYS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_a_label_that_is_not_a_class_is_named(student_folder, head, dtype):
    model = head.from_pretrained(student_folder, num_labels=3).eval()
    pixel_values = torch.rand(2, 3, 32, 32)
    ignored = -100 if head is RadioForImageClassification else 255
    for value in (3, 150, 255, -1, -100):
        if value == ignored or (dtype == torch.uint8 and value < 0):
            continue
        shape = (2,) if head is RadioForImageClassification else (2, 20, 30)
        labels = torch.zeros(shape, dtype=dtype)
        labels[-1] = value
        with pytest.raises(ValueError, match=rf"labels hold {value}, but num_labels is 3.* {ignored} is ignored"):
            model(pixel_values, labels=labels)
        labels[-1] = 2
        assert model(pixel_values, labels=labels).loss.isfinite()


def test_ignored_classes_do_not_count(student_folder):
    model = RadioForImageClassification.from_pretrained(student_folder, num_labels=3).eval()
    pixel_values = torch.rand(3, 3, 32, 32)
    output = model(pixel_values, labels=torch.tensor([2, -100, 0]))
    log_probabilities = output.logits.log_softmax(1)
    torch.testing.assert_close(output.loss, -(log_probabilities[0, 2] + log_probabilities[2, 0]) / 2)
    assert model(pixel_values, labels=torch.full((3,), -100)).loss == 0  # not NaN
    with pytest.raises(ValueError, match=r"\(3, 3\) and dtype torch.int64; expected one class index per image"):
        model(pixel_values, labels=torch.ones(3, 3, dtype=torch.long))


def test_pipelines_find_what_they_need(tmp_path, student_folder, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8))
    processor = RadioImageProcessor(size={"height": 32, "width": 48})
    pixel_values = processor(image, return_tensors="pt").pixel_values
    student = RadioModel.from_pretrained(student_folder).eval()
    extract = transformers.pipeline("image-feature-extraction", model=student, image_processor=processor)
    with torch.no_grad():
        summary = student(pixel_values).summary
    torch.testing.assert_close(torch.tensor(extract(image, pool=True)), summary)
    model = randomise(RadioForSemanticSegmentation.from_pretrained(student_folder, num_labels=3))
    segment = transformers.pipeline("image-segmentation", model=model, image_processor=processor)
    with torch.no_grad():
        logits = F.interpolate(model(pixel_values).logits, size=(32, 48), mode="bilinear", align_corners=False)
    found = {part["label"]: np.asarray(part["mask"]) > 0 for part in segment(image)}
    classes = logits[0].argmax(0).numpy()
    assert {f"LABEL_{index}" for index in np.unique(classes)} == set(found)
    for label, mask in found.items():
        assert (mask == (classes == int(label.removeprefix("LABEL_")))).all()
    classify = transformers.pipeline(
        "image-classification", model=RadioForImageClassification(student.config), image_processor=processor
    )
    assert len(classify(image)) == 2
    assert "not supported" not in caplog.text


@pytest.mark.parametrize("problem", ["regression", "single_label_classification", "multi_label_classification"])
def test_loss_of_each_problem_type(student_folder, problem):
    num_labels = 1 if problem == "regression" else 4
    model = RadioForImageClassification.from_pretrained(student_folder, num_labels=num_labels)
    model = randomise(model)
    pixel_values = torch.rand(3, 3, 32, 32)
    logits = model(pixel_values).logits
    if problem == "regression":
        labels = torch.tensor([0.5, -1.0, 2.0])
        expected = ((logits[:, 0] - labels) ** 2).mean()
    elif problem == "single_label_classification":
        labels = torch.tensor([3, 0, 1])
        expected = -logits.log_softmax(1)[range(3), labels].mean()
    else:
        labels = torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1]])
        positive, negative = logits.sigmoid().log(), (-logits).sigmoid().log()
        expected = -(labels * positive + (1 - labels) * negative).mean()
    assert model.config.problem_type is None  # found from the labels
    torch.testing.assert_close(model(pixel_values, labels=labels).loss, expected)
    assert model.config.problem_type == problem


@pytest.mark.parametrize("final_norm", [False, True])
@pytest.mark.parametrize("head", HEAD_KEYS)
def test_a_student_gets_a_new_head_and_back(tmp_path, head, final_norm):
    torch.manual_seed(0)
    student = RadioModel(tiny_config(final_norm=final_norm, summary_idxs=[1])).eval()
    if final_norm:
        nn.init.uniform_(student.norm.weight)
    student.save_pretrained(tmp_path / "student")
    model, info = head.from_pretrained(tmp_path / "student", num_labels=6, output_loading_info=True)
    assert set(info["missing_keys"]) == HEAD_KEYS[head]
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert list(model.config.adaptors) == ["clip"] and model.config.num_labels == 6
    assert not model.classifier.bias.any() and 0.01 < model.classifier.weight.std() < 0.03  # initialized, not garbage
    if head is RadioForSemanticSegmentation:
        assert (model.batch_norm.running_mean == 0).all() and (model.batch_norm.running_var == 1).all()

    pixel_values = torch.rand(1, 3, 48, 32)
    expected = student(pixel_values)
    summary = expected.summary
    assert torch.equal(model.eval().model(pixel_values).summary, summary)
    randomise(model).save_pretrained(tmp_path / "head")
    again, info = head.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_weights(again, model)
    assert_same_but_for_rounding(again.eval()(pixel_values).logits, model(pixel_values).logits)
    back = RadioModel.from_pretrained(tmp_path / "head").eval()
    assert torch.equal(back(pixel_values).summary, summary)
    assert torch.equal(back(pixel_values).adaptors["clip"].features, expected.adaptors["clip"].features)


@pytest.mark.parametrize("head", HEAD_KEYS)
def test_adaptors_are_kept_but_not_computed_unless_they_are_dropped(tmp_path, student_folder, head, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("an adaptor was computed")

    model = head.from_pretrained(student_folder, num_labels=3)
    adaptors = list(model.model.adaptors.parameters())
    assert adaptors and not any(parameter.requires_grad for parameter in adaptors)
    labels = torch.tensor([1]) if head is RadioForImageClassification else torch.ones(1, 4, 4, dtype=torch.long)
    with monkeypatch.context() as patch:
        patch.setattr(type(model.model.adaptors["clip"]), "forward", refuse)
        model(torch.rand(1, 3, 32, 32), labels=labels).loss.backward()
    # as DistributedDataParallel needs it: all that can be trained has a gradient
    assert [name for name, one in model.named_parameters() if one.requires_grad and one.grad is None] == []

    model.save_pretrained(tmp_path / "kept")
    assert list(RadioModel.from_pretrained(tmp_path / "kept").adaptors) == ["clip"]
    bare = head.from_pretrained(tmp_path / "kept", adaptors={})
    assert not list(bare.model.adaptors.parameters())
    bare.save_pretrained(tmp_path / "dropped")
    assert json.loads((tmp_path / "dropped" / "config.json").read_text())["adaptors"] == {}
    weights = {key: one for key, one in model.state_dict().items() if "adaptors.clip.feature" not in key}
    model.save_pretrained(tmp_path / "half", state_dict=weights)
    with pytest.raises(ValueError, match="would be random: model.adaptors.clip.feature_head"):
        head.from_pretrained(tmp_path / "half")


def test_average_pooled_student(tmp_path):
    config = tiny_config(summary_type="mean", num_cls_tokens=0, num_registers=0, adaptors={}, summary_idxs=[])
    RadioModel(config).save_pretrained(tmp_path)
    model = randomise(RadioForImageClassification.from_pretrained(tmp_path, num_labels=2))
    pixel_values = torch.rand(2, 3, 32, 32)
    features = model.model(pixel_values).features
    expected = model.classifier(model.summary_norm(features.mean(1)))
    torch.testing.assert_close(model(pixel_values).logits, expected)


def test_missing_backbone_weights_are_an_error(tmp_path, student_folder):
    model = RadioForImageClassification.from_pretrained(student_folder)
    weights = {key: value for key, value in model.state_dict().items() if "encoder.layer.2" not in key}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match="encoder.layer.2"):
        RadioForImageClassification.from_pretrained(tmp_path)


def test_a_frozen_student_gives_the_same_features_while_the_head_trains(student_folder):
    pixel_values = torch.rand(4, 3, 64, 64)
    model = RadioForSemanticSegmentation.from_pretrained(student_folder, num_labels=3).train()
    assert not torch.equal(model(pixel_values).logits, model(pixel_values).logits)  # random position crops
    model.model.requires_grad_(False)
    model.train()
    assert model.batch_norm.training and not model.model.training
    assert torch.equal(model(pixel_values).logits, model(pixel_values).logits)
    model.model.requires_grad_(True)
    assert model.train().model.training


class ColouredImages(torch.utils.data.Dataset):
    """Red, green or blue images: the class is the color; its map is that class everywhere."""

    def __init__(self, maps: bool):
        self.maps = maps

    def __len__(self):
        return 24

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        label = index % 3
        image = torch.rand(3, 32, 32, generator=generator) * 0.3
        image[label] += 0.7
        labels = torch.full((32, 32), label) if self.maps else torch.tensor(label)
        return {"pixel_values": image, "labels": labels}


@pytest.mark.parametrize("head", HEAD_KEYS)
def test_the_trainer_lowers_the_loss(tmp_path, student_folder, head):
    torch.manual_seed(0)
    model = head.from_pretrained(student_folder, num_labels=3, cpe_sampling=False)
    segmentation = head is RadioForSemanticSegmentation
    if segmentation:
        model.model.requires_grad_(False)
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    data = ColouredImages(maps=segmentation)
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path / "run"),
            max_steps=3 if segmentation else 8,  # the whole network needs a few more steps
            learning_rate=0.1 if segmentation else 0.002,
            per_device_train_batch_size=6,
            gradient_accumulation_steps=2,
            logging_steps=1,
            warmup_steps=0,
            lr_scheduler_type="constant",
            use_cpu=True,
            report_to=[],
            seed=0,
        ),
        train_dataset=data,
        eval_dataset=data,
    )
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    end = trainer.evaluate()["eval_loss"]
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) >= 3 and logged[-1] < logged[0]
    assert end < 0.8 * start, (start, end)
    changed = [key for key, value in model.model.state_dict().items() if not torch.equal(value, before[key])]
    assert bool(changed) != segmentation  # a frozen student stays as it is

    trainer.save_model(str(tmp_path / "saved"))
    again = head.from_pretrained(tmp_path / "saved").eval()
    pixel_values = data[0]["pixel_values"][None]
    assert torch.equal(again(pixel_values).logits, model.eval()(pixel_values).logits)


def test_hidden_states_attentions_and_tuples(student_folder):
    model = RadioForImageClassification.from_pretrained(student_folder, attn_implementation="eager").eval()
    pixel_values, labels = torch.rand(1, 3, 32, 32), torch.tensor([1])
    output = model(pixel_values, labels=labels, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 5 and len(output.attentions) == 4
    loss, logits = model(pixel_values, labels=labels, return_dict=False)
    assert torch.equal(logits, output.logits) and torch.equal(loss, output.loss)
    assert model(pixel_values).hidden_states is None


def test_wrong_input_is_named(student_folder):
    classifier = RadioForImageClassification.from_pretrained(student_folder)
    with pytest.raises(ValueError, match="3 labels for 2 images"):
        classifier(torch.rand(2, 3, 32, 32), labels=torch.tensor([0, 1, 0]))
    with pytest.raises(ValueError, match="33"):
        classifier(torch.rand(1, 3, 33, 32))
    segmenter = RadioForSemanticSegmentation.from_pretrained(student_folder)
    with pytest.raises(ValueError, match=r"\(2, 1, 32, 32\)"):
        segmenter(torch.rand(2, 3, 32, 32), labels=torch.zeros(2, 1, 32, 32, dtype=torch.long))


def test_loads_as_remote_code_in_a_process_without_our_package(tmp_path, student_folder):
    pixel_values = torch.rand(1, 3, 32, 48)
    torch.save(pixel_values, tmp_path / "in.pt")
    expected = {}
    for head in HEAD_KEYS:
        model = randomise(head.from_pretrained(student_folder, num_labels=4))
        model.save_pretrained(tmp_path / head.__name__)
        expected[head.__name__] = model(pixel_values).logits
    code = (
        "import sys, torch; sys.modules['transformers_radio'] = None\n"
        "from transformers import AutoModelForImageClassification, AutoModelForSemanticSegmentation\n"
        "pixel_values = torch.load('in.pt')\n"
        "for name, auto in (('RadioForImageClassification', AutoModelForImageClassification),\n"
        "                   ('RadioForSemanticSegmentation', AutoModelForSemanticSegmentation)):\n"
        "    model = auto.from_pretrained(name, trust_remote_code=True).eval()\n"
        "    torch.save(model(pixel_values).logits, name + '.pt')\n"
    )
    environment = {
        "PATH": "",
        "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=tmp_path)
    for name, logits in expected.items():
        torch.testing.assert_close(torch.load(tmp_path / f"{name}.pt"), logits)

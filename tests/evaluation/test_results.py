"""Results as entries of a Hub model card, through the card's YAML and back."""

import json

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results

from transformers_radio.evaluation.report.model_card import eval_results
from transformers_radio.evaluation.result import Result


def test_what_makes_the_numbers_comparable_goes_with_them():
    read = {"summary": "class tokens [0]", "features": "last patch tokens", "adaptor": "clip", "batch_size": 8}
    settings = {**read, "method": "probe", "probe": {"seed": 7}}
    scores, counts = {"mIoU": 51.3, "mAcc": 60.0, "aAcc": 80.0}, {"validation_images": 2000}
    result = Result("segmentation", "m", "ADE20K", scores, "linear probe: 5 classes", settings, counts, 9, 512)
    index = yaml.safe_load(ModelCardData(model_name="m", eval_results=eval_results(result)).to_yaml())["model-index"]
    _, entries = model_index_to_eval_results(index)
    assert [(e.task_type, e.dataset_name, e.metric_type, e.metric_value) for e in entries] == [
        ("image-segmentation", "ADE20K", "mean_iou", 51.3),
        ("image-segmentation", "ADE20K", "mean_accuracy", 60.0),
        ("image-segmentation", "ADE20K", "accuracy", 80.0),
    ]
    stated = {
        "protocol": "linear probe: 5 classes",
        **{key: read[key] for key in ("summary", "features", "adaptor")},
        "resolution": 512,
        "seed": 7,
        "validation_images": 2000,
    }
    assert [(e.metric_args, e.metric_config) for e in entries] == [(stated, "512 px")] * 3
    # without a trained probe nothing is random, and what is not known is not there
    words = Result("segmentation", "m", "ADE20K", scores, "words", {**settings, "method": "summary_head"})
    assert not {"seed", "resolution"} & set(eval_results(words)[0].metric_args)


@pytest.mark.parametrize(
    ("task", "metrics", "types"),
    [
        ("knn", {"k-NN": 80.0}, ["accuracy"]),
        ("sam-coco", {"SAM COCO": 70.0}, ["mean_iou"]),
        # no small object: no figure
        ("sam-coco", {"mask AP": 40.0, "mask AP50": 0.0, "mask AP_small": -1}, ["mean_average_precision"] * 2),
        ("llava", {"GQA": 60.0, "POPE accuracy": 85.0, "POPE F1": 80.0}, ["accuracy", "accuracy", "f1"]),
        ("llava", {"my precision": 60.0, "my recall": 8.0, "my yes": 5.0}, ["precision", "recall", "yes_ratio"]),
        ("throughput", {"Throughput": 8.0}, []),
    ],
)
def test_a_metric_is_called_what_it_is(task, metrics, types):
    assert [entry.metric_type for entry in eval_results(Result(task, "m", "set", metrics, "so"))] == types


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"model": "runs/mine/student", "features": "last patch tokens, 8 wide"}, "student"),
        ({"model": "CLIP=open_clip:ViT-H-14:dfn5b"}, "teacher"),
        ({"model": "weights/dinov2", "features": "the teacher's own patch features, 8 wide"}, "teacher"),
    ],
)
def test_a_file_of_an_earlier_version_has_its_kind_from_the_settings(settings, kind, tmp_path):
    path = tmp_path / "knn.birds.json"
    result = Result("knn", "m", "birds", {"k-NN": 5.0}, "so", settings, kind="student")
    result.write(path)
    assert Result.read(path) == result
    content = json.loads(path.read_text())
    del content["kind"]
    path.write_text(json.dumps(content))
    assert Result.read(path).kind == kind


def test_what_is_no_number_is_no_result():
    with pytest.raises(ValueError, match="mIoU = nan"):
        Result("segmentation", "m", "ADE20K", {"mIoU": np.nan}, "")

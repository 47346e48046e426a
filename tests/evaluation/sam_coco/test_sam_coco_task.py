"""`eval sam-coco` does not give one set's figures, or one decoder's, for another's."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from helpers.coco_files import Dataset
from helpers.tiny_sam import make_student, picture
from transformers_radio.evaluation.run import run_task


@pytest.fixture
def world(tmp_path, sam_file):
    """A folder of COCO, a SAM and a student; and the call that measures the student."""
    Dataset(tmp_path)
    (tmp_path / "sam.pth").write_bytes(Path(sam_file).read_bytes())
    make_student().save_pretrained(tmp_path / "student")
    settings = [f"sam={tmp_path / 'sam.pth'}", "image_size=64"]
    return tmp_path, lambda: run_task(
        "sam-coco", [f"m={tmp_path / 'student'}"], str(tmp_path), None, tmp_path / "out", settings
    )


def edit_annotations(folder):
    path = folder / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"].pop()
    path.write_text(json.dumps(content))


def edit_image(folder):
    Image.fromarray(picture((40, 56), 99)).save(folder / "val2017" / "deep" / "7.png")


def edit_decoder(folder):
    weights = torch.load(folder / "sam.pth", weights_only=True)
    weights["mask_decoder.iou_token.weight"] += 1
    torch.save(weights, folder / "sam.pth")


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (edit_annotations, "annotations_digest"),
        (edit_image, "images_digest"),
        (edit_decoder, "decoder_weights"),
    ],
)
def test_a_finished_result_is_of_its_files_and_its_decoder(edit, named, world):
    folder, measure = world
    (result,) = measure()
    assert measure() == [result]
    edit(folder)
    with pytest.raises(ValueError, match=rf"holds a result of other settings; it differs in {named} \("):
        measure()
    # nor does unfinished work go on with them
    (folder / "out" / "m" / "sam-coco.COCO-2017.json").unlink()
    with pytest.raises(ValueError, match="comes from another run"):
        measure()

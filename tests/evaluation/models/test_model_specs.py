"""A mistyped path is named as one, whatever the Hub's libraries say of it."""

import datasets
import pytest
import transformers

from transformers_radio.data.errors import FileError
from transformers_radio.evaluation.images.labeled import LabeledSplit
from transformers_radio.evaluation.models.encoder import load_encoder
from transformers_radio.evaluation.segmentation.config import SegmentationData, SplitSource
from transformers_radio.evaluation.segmentation.data import SegmentationSplit


def segmentation(path):
    parts = {"validation": [SplitSource(split="validation")]}
    return SegmentationSplit(SegmentationData(name="x", path=path, classes=["a"], splits=parts), "validation")


OPENERS = {
    "model": load_encoder,
    "data": lambda path: LabeledSplit(path, "validation"),
    "segmentation": segmentation,
}


@pytest.fixture
def hub(monkeypatch):
    """The Hub, which cannot be reached."""

    def fail(*_, **__):
        raise OSError("no connection to the Hub\nsee the documentation of the library")

    monkeypatch.setattr(transformers.PretrainedConfig, "get_config_dict", fail)
    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    monkeypatch.setattr(datasets, "load_dataset", fail)


@pytest.mark.parametrize("open_", OPENERS.values(), ids=OPENERS)
def test_there_is_no_such_folder_either(open_, hub):
    with pytest.raises(
        FileNotFoundError, match=r"^There is no folder nothere, .*: no connection to the Hub\. Check.*$"
    ):
        open_("nothere")


@pytest.mark.parametrize("open_", [OPENERS["data"], OPENERS["segmentation"]])
def test_errors_of_folders_that_are_there_are_not_those_of_missing_ones(open_, hub, tmp_path):
    (tmp_path / "rows.csv").write_text("image,label\n")  # what only `datasets` reads
    with pytest.raises((OSError, FileError), match="no connection") as caught:
        open_(str(tmp_path))
    assert "There is no folder" not in str(caught.value)


def test_a_path_that_can_be_no_name_on_the_hub():
    with pytest.raises(FileNotFoundError, match="There is no folder /no/such/place"):
        LabeledSplit("/no/such/place", "train")
    with pytest.raises(FileNotFoundError, match="There is no folder /no/such/place"):
        load_encoder("/no/such/place")

import pytest

from helpers.tiny_sam import write_sam
from transformers_radio.teachers.segment_anything import load_sam


@pytest.fixture(scope="session")
def sam(tmp_path_factory):
    return load_sam(str(write_sam(tmp_path_factory.mktemp("sam") / "sam.pth")))

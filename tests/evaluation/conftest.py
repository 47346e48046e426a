import pytest

from helpers.tiny_sam import write_sam
from transformers_radio.teachers.segment_anything import load_sam


@pytest.fixture(scope="session")
def sam_file(tmp_path_factory):
    return write_sam(tmp_path_factory.mktemp("sam") / "sam.pth")


@pytest.fixture(scope="session")
def sam(sam_file):
    return load_sam(str(sam_file))

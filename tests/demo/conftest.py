import pytest
from PIL import Image

from helpers.taught_student import save_taught_student
from helpers.tiny_sam import picture
from helpers.watched_run import make_run


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory):
    return save_taught_student(tmp_path_factory.mktemp("taught") / "student")


@pytest.fixture(scope="session")
def models(student_folder):
    from transformers_radio.demo.models import load_models

    return load_models(student_folder)


@pytest.fixture(scope="session")
def image():
    """Smooth colors, 96 pixels wide and 80 high."""
    return Image.fromarray(picture((80, 96)))


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path)

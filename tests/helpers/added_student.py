"""helpers/conv_student.py as a file of modeling/ and a line of STUDENTS, in this process or in one that trains."""

from pathlib import Path

from helpers.forked import train
from transformers_radio import modeling

LINE = ("conv_student", "transformers_radio.modeling.conv_student:ConvStudent")
REGISTERED = '\n\nConvStudentConfig.register_for_auto_class()\nConvStudent.register_for_auto_class("AutoModel")\n'


def write_modeling(folder):
    """Copies modeling/ into a folder, the student among its files: saving a model takes its remote code from there."""
    for file in Path(modeling.__file__).parent.glob("*.py"):
        if file.name != "__init__.py":
            (folder / file.name).write_text(file.read_text())
    student = Path(__file__).with_name("conv_student.py").read_text()
    (folder / "conv_student.py").write_text(
        student.replace("from transformers_radio.modeling.", "from .") + REGISTERED
    )


def train_added(folder, *arguments):
    """`python -m transformers_radio.training ARGUMENTS --trust-code`, with the student of `write_modeling`."""
    modeling.__path__.append(folder)
    modeling.STUDENTS.update([LINE])
    return train(*arguments)

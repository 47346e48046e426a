"""A trained student of this package as the teacher of another one."""

from typing import Any

import torch

from transformers_radio.hub.convert import load_nvidia_checkpoint
from transformers_radio.modeling import student_class
from transformers_radio.teachers.base import Teacher, TeacherOutput, resolve_image_size, torch_dtype

from .pretrained import config_dict, load_pretrained


class RadioTeacher(Teacher):
    """A student of any type in `STUDENTS`, or a release of NVIDIA (folder or Hub id); it normalizes its input itself.

    summary and features: the backbone's, or with `adaptor` those in that teacher's space.

    Args:
        student: the model, with all its adaptors.
        image_size: side of the input in pixels; None for the student's preferred one.
        adaptor: name of one of its adaptors.

    Raises:
        ValueError: for an adaptor that the student does not have, or one without features.
    """

    def __init__(self, student: Any, image_size: int | None = None, adaptor: str | None = None):
        summary_dim, feature_dim = student.summary_dim, student.feature_dim
        if adaptor is not None:
            adaptors = student.config.adaptors
            if adaptor not in adaptors:
                raise ValueError(
                    f"adaptor={adaptor!r} is unknown: the student has {', '.join(adaptors) or 'no adaptors'}"
                )
            summary_dim, feature_dim = adaptors[adaptor]["summary_dim"], adaptors[adaptor]["feature_dim"]
            if feature_dim is None:
                raise ValueError(f"adaptor {adaptor!r} of the student has no features, which a teacher must give")
        super().__init__(
            student,
            image_size=resolve_image_size(image_size, student.preferred_resolution, student.min_resolution_step),
            patch_size=student.patch_size,
            summary_dim=summary_dim,
            feature_dim=feature_dim,
            normalization=((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        )
        self.adaptor = adaptor

    @classmethod
    def from_checkpoint(
        cls, checkpoint: str, image_size: int | None = None, dtype: str = "float32", adaptor: str | None = None
    ) -> Teacher:
        written = config_dict(checkpoint)
        if "args" in written:  # a release of NVIDIA
            return cls(load_nvidia_checkpoint(checkpoint).to(torch_dtype(dtype)), image_size, adaptor)
        student = student_class(written["model_type"])
        return cls(load_pretrained(checkpoint, student, dtype), image_size, adaptor)

    def encode(self, pixel_values: torch.Tensor) -> TeacherOutput:
        if self.adaptor is None:
            output = self.model(pixel_values, adaptors=[])
        else:
            output = self.model(pixel_values, adaptors=[self.adaptor]).adaptors[self.adaptor]
        return TeacherOutput(output.summary, output.features, output.grid)

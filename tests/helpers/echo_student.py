"""A student whose adaptor returns a teacher's own features: swapped in for the teacher, it must change nothing."""

import copy
from types import SimpleNamespace

import torch
from torch import nn

from transformers_radio.modeling.adaptors_radio import AdaptorOutput
from transformers_radio.modeling.student_radio import RadioModelOutput, RadioStudentMixin


class EchoStudent(RadioStudentMixin, nn.Module):
    """Runs `encode`, images in [0, 1] -> (summary | None, features (B, h*w, C), (h, w)), in place of an adaptor."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, name, patch_size, encode, feature_dim, **entry):
        super().__init__()
        entry = {"summary_dim": None, "feature_dim": feature_dim, "teacher": "", **entry}
        self.config = SimpleNamespace(
            adaptors={name: entry},
            patch_size=patch_size,
            model_type="echo",
            hidden_size=feature_dim,
            preferred_resolution=64,
        )
        self.encode = encode

    def forward(self, pixel_values, adaptors=None):
        assert 0 <= pixel_values.min() and pixel_values.max() <= 1
        summary, features, grid = self.encode(pixel_values)
        heads = {name: AdaptorOutput(summary=summary, features=features, grid=grid) for name in adaptors}
        return RadioModelOutput(features=features, adaptors=heads, grid=grid)


def echo_of_sam(sam, features="trunk"):
    """The echo of a segment_anything Sam, through this package's teacher."""
    from transformers_radio.teachers.segment_anything import SegmentAnythingTeacher

    teacher = SegmentAnythingTeacher(copy.deepcopy(sam.image_encoder), features=features)

    def encode(images):
        output = teacher(images)
        return None, output.features, output.grid

    return EchoStudent("sam", teacher.patch_size, encode, teacher.feature_dim)

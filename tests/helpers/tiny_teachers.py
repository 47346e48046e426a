"""Teachers that need no weights, for `type: python`; the training processes that tests start import them too."""

import torch
from torch import nn

from transformers_radio.teachers import Teacher, TeacherOutput


class PatchTeacher(Teacher):
    """A fixed random projection of each patch; the summary is the mean. The features are NaN after `broken` calls."""

    def __init__(self, checkpoint, image_size=None, dtype="float32", *, width=24, summary=True, broken=None):
        with torch.random.fork_rng():
            torch.manual_seed(width)
            convolution = nn.Conv2d(3, width, kernel_size=8, stride=8)
        super().__init__(
            convolution,
            image_size=image_size or 32,
            patch_size=8,
            summary_dim=width if summary else None,
            feature_dim=width,
            normalization=((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        )
        self.cast(dtype)
        self.broken, self.calls = broken, 0

    @classmethod
    def from_checkpoint(cls, checkpoint, image_size=None, dtype="float32", *, width=24, summary=True, broken=None):
        return cls(checkpoint, image_size, dtype, width=width, summary=summary, broken=broken)

    def encode(self, pixel_values):
        maps = self.model(pixel_values)
        features = maps.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, h*w, C)
        self.calls += 1
        if self.broken is not None and self.calls > self.broken:
            features = features * float("nan")
        return TeacherOutput(
            features.mean(dim=1) if self.summary_dim else None, features, (maps.shape[2], maps.shape[3])
        )

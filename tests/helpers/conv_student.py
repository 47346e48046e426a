"""A student that is not a transformer: two strided convolutions, stride 8, a pooled summary, and adaptors."""

from dataclasses import field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from transformers_radio.modeling.adaptors_radio import RadioAdaptor
from transformers_radio.modeling.fields_radio import complete_adaptors
from transformers_radio.modeling.inputs_radio import check_adaptors
from transformers_radio.modeling.student_radio import RadioInputConditioner, RadioModelOutput, RadioStudentMixin


class ConvStudentConfig(PreTrainedConfig):
    model_type = "conv_student"

    adaptors: dict[str, dict[str, Any]] = field(default_factory=dict)
    hidden_size: int = 16
    num_channels: int = 3
    patch_size: int = 8
    max_img_size: int = 256
    preferred_resolution: int = 64
    norm_mean: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    norm_std: list[float] = field(default_factory=lambda: [0.25, 0.25, 0.25])

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.validate()

    def validate(self):
        super().validate()
        self.adaptors = complete_adaptors(type(self).__name__, self.adaptors, tokens=1)

    @classmethod
    def for_training(cls, size: str, adaptors: dict[str, dict[str, Any]], summary: str = "mean", **fields):
        if summary != "mean":
            raise ValueError(f"summary is {summary!r}; this student has no CLS tokens: use mean")
        widths = {"small": 16, "large": 32}
        if size not in widths:
            raise ValueError(f"size is {size!r}; choose one of {', '.join(widths)}")
        return cls(**{"adaptors": adaptors, "hidden_size": widths[size], **fields})


class ConvStudent(RadioStudentMixin, PreTrainedModel):
    config_class = ConvStudentConfig
    main_input_name = "pixel_values"

    def __init__(self, config: ConvStudentConfig):
        super().__init__(config)
        config.validate()
        width = config.hidden_size
        self.input_conditioner = RadioInputConditioner(config)
        self.stem = nn.Conv2d(config.num_channels, width, kernel_size=4, stride=4)
        self.stage = nn.Conv2d(width, width, kernel_size=2, stride=2)
        self.adaptors = nn.ModuleDict({name: RadioAdaptor(width, entry) for name, entry in config.adaptors.items()})
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, adaptors: list[str] | None = None) -> RadioModelOutput:
        names = check_adaptors(adaptors, list(self.adaptors))
        self.check_images(pixel_values)
        maps = self.stage(nn.functional.gelu(self.stem(self.input_conditioner(pixel_values))))  # (B, D, h, w)
        grid = self.grid(*pixel_values.shape[-2:])
        features = maps.flatten(2).transpose(1, 2)  # (B, h*w, D)
        summary = features.mean(1)
        heads = {name: self.adaptors[name](summary[:, None], features, [grid]) for name in names}
        return RadioModelOutput(summary=summary, features=features, adaptors=heads, grid=grid)

"""A student as somebody may add it to modeling/: convolutions of stride 8, a pooled summary, no tokens, no blocks."""

from dataclasses import field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .adaptors_radio import RadioAdaptor
from .fields_radio import complete_adaptors
from .inputs_radio import check_adaptors
from .student_radio import RadioInputConditioner, RadioModelOutput, RadioStudentMixin


class ToyConfig(PreTrainedConfig):
    model_type = "toy"

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
    def for_training(cls, size: str, adaptors: dict[str, dict[str, Any]], summary: str, **fields):
        widths = {"toy-16": 16, "toy-32": 32}
        if size not in widths:
            raise ValueError(f"Unknown size {size!r}; choose one of {', '.join(widths)}.")
        if summary != "mean":
            raise ValueError(f"summary is {summary!r}, but a ToyModel has no CLS tokens: choose mean.")
        return cls(**{"hidden_size": widths[size], "adaptors": adaptors, **fields})


class ToyModel(RadioStudentMixin, PreTrainedModel):
    config_class = ToyConfig
    main_input_name = "pixel_values"

    def __init__(self, config: ToyConfig):
        super().__init__(config)
        config.validate()  # its adaptors may have been set after construction
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
        features, grid = maps.flatten(2).transpose(1, 2), tuple(maps.shape[2:])  # (B, h*w, D)
        summary = features.mean(dim=1)  # (B, D)
        heads = {name: self.adaptors[name](summary[:, None], features, [grid]) for name in names}
        return RadioModelOutput(summary=summary, features=features, adaptors=heads, grid=grid)


ToyConfig.register_for_auto_class()
ToyModel.register_for_auto_class("AutoModel")

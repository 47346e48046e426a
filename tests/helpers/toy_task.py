"""A task as somebody else writes it: the mean of a model's features over made images."""

from dataclasses import dataclass, field

import torch

from transformers_radio.evaluation.models.encoder import ENCODER_COUNTED, load_encoder
from transformers_radio.evaluation.task import Job, Measured, Task


@dataclass
class ToyConfig:
    images: int = field(default=2, metadata={"help": "How many images are made."})
    note: str = field(default="", metadata={"help": "Changes nothing."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the result."})


class Toy(Task):
    name = "toy"
    config_class = ToyConfig
    counted = (*ENCODER_COUNTED, "images")
    columns = ("Mean",)
    hub_task = ("image-feature-extraction", "Mean of the features")
    hub_metrics = {"Mean": "mean"}

    def open(self, models):
        if self.config.images < 1:
            raise ValueError(f"images is {self.config.images}; expected at least 1.")
        settings = {"images": self.config.images, "note": self.config.note}
        encoders = [load_encoder(spec) for spec in models]
        return [Job.of(encoder, "gray", {**encoder.settings(), **settings}) for encoder in encoders]

    def measure(self, job, folder):
        images = torch.full((self.config.images, 3, job.encoder.image_size, job.encoder.image_size), 0.5)
        mean = job.encoder.features(images)[0].mean().item()
        return Measured({"Mean": mean, "Twice the mean": 2 * mean}, "gray images", {"images": len(images)})

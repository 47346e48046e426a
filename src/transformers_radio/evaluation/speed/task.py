"""`eval throughput`: images/s, latency, FLOPs and memory of several models, interleaved in one run."""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from transformers_radio.evaluation.models.encoder import ENCODER_COUNTED, VisionEncoder, load_encoder
from transformers_radio.evaluation.models.specs import ModelSpec
from transformers_radio.evaluation.sam_coco.prompting import SamEncoder, StudentEncoder, predict_masks
from transformers_radio.evaluation.segmentation.probe import LinearHead
from transformers_radio.evaluation.task import Job, Measured, Task
from transformers_radio.precision import DTYPES
from transformers_radio.teachers import digest_weights, load_sam

from .cost import FLOPS_RULE, count_flops, memory_rule, module_tensors, peak_memory
from .timing import device_name, latencies, throughput_conditions

# Decoder -> the number of classes it tells apart unless the settings give one: ADE20K's, ImageNet's.
DECODERS = {"none": 0, "linear": 150, "zero-shot": 1000, "sam": 0}
TIMED_WITH = {
    "none": "model alone",
    "linear": "model alone, and with a linear segmentation head and its arg-max at the image's size",
    "zero-shot": "model alone, and with its language adaptor and the similarity to the classes' texts",
    "sam": "model alone, and with its SAM adaptor, SAM's neck and mask decoder for one box per image",
}


@dataclass
class ThroughputConfig:
    """Settings of the task. Its images are random: speed does not depend on what they show."""

    image_size: int | None = field(
        default=None, metadata={"help": "Side in pixels. null: each model's own, with decoder=sam that of SAM."}
    )
    window_size: int | None = field(
        default=None, metadata={"help": "Of students' attention, in patches. null: their default; 0: global."}
    )
    batch_sizes: list[int] = field(default_factory=lambda: [1, 32], metadata={"help": "Images; 1 must be among them."})
    dtype: str = field(default="float32", metadata={"help": "Of the models.", "choices": tuple(DTYPES)})
    device: str | None = field(
        default=None, metadata={"help": 'Such as "cpu" or "cuda:1". null: the first GPU if there is one.'}
    )
    decoder: str = field(
        default="none",
        metadata={
            "help": "Timed besides the model alone. linear: a segmentation head and its arg-max at the image's size. "
            "zero-shot: the similarity to the classes' texts, which are encoded once. sam: SAM's neck and mask "
            "decoder for one box per image.",
            "choices": tuple(DECODERS),
        },
    )
    classes: int | None = field(
        default=None,
        metadata={"help": "Classes of the decoders linear and zero-shot. null: 150 (ADE20K) and 1000 (ImageNet)."},
    )
    sam: str = field(
        default="sam_vit_h_4b8939.pth",
        metadata={"help": "segment_anything's own file, for decoder=sam; must be the adaptor's teacher."},
    )
    adaptor: str | None = field(
        default=None, metadata={"help": 'The student\'s, for the decoder. null: the one to its text tower, or "sam".'}
    )
    repeats: int = field(default=20, metadata={"help": "Rounds that count."})
    warmup: int = field(default=3, metadata={"help": "Rounds before these."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the results."})


@dataclass
class Forward:
    """What is timed: a callable, the dtype of the images it takes, and the weights it reads."""

    run: Callable[[torch.Tensor], object]
    input_dtype: torch.dtype
    weights: list[torch.Tensor]


class Throughput(Task):
    """The metric "Throughput" is images/s of the model alone at the largest batch.

    Raises:
        FileNotFoundError, ValueError: settings or a model that cannot be used; before anything is timed.
    """

    name = "throughput"
    config_class = ThroughputConfig
    config: ThroughputConfig
    counted = (
        *ENCODER_COUNTED,
        *("image_size", "batch_sizes", "decoder", "classes", "repeats", "warmup", "interleaved", "sam"),
        *("device", "torch", "FLOPs", "memory"),
    )
    measured_together = True  # the ratios of several models are those of one run

    def open(self, models: list[str]) -> list[Job]:
        config = self.config
        _check(config)
        self.device = torch.device(config.device) if config.device else Accelerator(mixed_precision="no").device
        self.sam: Any = load_sam(config.sam).to(self.device) if config.decoder == "sam" else None
        side = config.image_size
        if side is None and self.sam is not None:
            side = self.sam.image_encoder.img_size
        self.encoders = [self._load(spec, side) for spec in models]
        return [self._job(encoder) for encoder in self.encoders]

    def recognized(self, settings: dict[str, Any]) -> dict[str, Any]:
        # earlier versions wrote where the models lay, and not their names
        return {**settings, "interleaved": [ModelSpec.parse(model).title for model in settings.get("interleaved", [])]}

    def measure(self, job: Job, folder: Path) -> Measured:
        config, models = self.config, len(self.encoders)
        metrics, largest = self.metrics[job.model], max(config.batch_sizes)
        images = _images(job.encoder, largest, torch.float32)
        protocol = (
            f"{throughput_conditions(job.encoder.model, images)}{_windows(job.encoder, config)}; "
            f"{TIMED_WITH[config.decoder]}; median of {config.repeats} rounds after {config.warmup} to warm up, "
            f"{models} model{'s' if models > 1 else ''} in turn in each"
        )
        return Measured(
            {"Throughput": metrics[f"images/s, batch {largest}"], **metrics},
            protocol,
            {"rounds": config.repeats, "models": models},
        )

    @cached_property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Model -> its metrics, from one run in which all models take turns."""
        config = self.config
        forwards: dict[tuple[str, str], Forward] = {}  # (model, what follows it) -> what is timed
        batches: dict[tuple[str, str, int], torch.Tensor] = {}  # the same with the batch size -> its images
        for encoder in self.encoders:
            parts = {"": _alone(encoder)}
            if config.decoder != "none":
                parts[f" + {config.decoder}"] = _with_decoder(encoder, config, self.sam)
            for part, forward in parts.items():
                forwards[encoder.name, part] = forward
                for size in config.batch_sizes:
                    batches[encoder.name, part, size] = _images(encoder, size, forward.input_dtype)
        metrics: dict[str, dict[str, float]] = {one.name: {} for one in self.encoders}
        for (name, part), forward in forwards.items():
            metrics[name][f"GFLOPs an image{part}"] = count_flops(forward.run, batches[name, part, 1]) / 1e9
            metrics[name][f"Parameters (M){part}"] = _count_parameters(forward.weights) / 1e6
            for size in config.batch_sizes:
                peak = peak_memory(forward.run, batches[name, part, size], forward.weights)
                metrics[name][f"Peak MiB, batch {size}{part}"] = peak / 2**20
        # `latencies` takes strings as names
        keys = {f"{name}{part}, batch {size}": (name, part, size) for name, part, size in batches}
        seconds = latencies(
            {label: forwards[key[:2]].run for label, key in keys.items()},
            {label: batches[key] for label, key in keys.items()},
            config.repeats,
            config.warmup,
        )
        for label, (name, part, size) in keys.items():
            median = statistics.median(seconds[label])
            metrics[name][f"images/s, batch {size}{part}"] = size / median
            metrics[name][f"ms, batch {size}{part}"] = 1000 * median
            slow = torch.tensor(seconds[label], dtype=torch.float64).quantile(0.95).item()
            metrics[name][f"ms (95%), batch {size}{part}"] = 1000 * slow
        return metrics

    def _load(self, spec: str, side: int | None) -> VisionEncoder:
        config = self.config
        language = config.adaptor if config.decoder == "zero-shot" else None
        encoder = load_encoder(spec, side, config.dtype, self.device, language, config.window_size)
        if config.decoder == "zero-shot":
            encoder.text_tower()  # raises if there is none
        return encoder

    def _job(self, encoder: VisionEncoder) -> Job:
        config, side = self.config, encoder.image_size
        left_out = {"overwrite", "device", "sam"} | ({"window_size"} if config.window_size is None else set())
        settings = {
            **{key: value for key, value in asdict(config).items() if key not in left_out},
            **encoder.settings(),
            "image_size": side,
            "device": device_name(self.device),
            "torch": torch.__version__,
            "interleaved": [one.name for one in self.encoders],
            "sam": None if self.sam is None else digest_weights(self.sam),
            "FLOPs": FLOPS_RULE,
            "memory": memory_rule(self.device),
        }
        device = device_name(encoder.device)
        decoder = "" if config.decoder == "none" else f", {config.decoder} decoder"
        data = f"{side}x{side}, {config.dtype}, {device}{_windows(encoder, config)}{decoder}"
        return Job.of(encoder, data, settings)


def _check(config: ThroughputConfig) -> None:
    if config.decoder not in DECODERS:
        raise ValueError(f"decoder is {config.decoder!r}; expected one of {', '.join(DECODERS)}.")
    if config.dtype not in DTYPES:
        raise ValueError(f"dtype is {config.dtype!r}; expected one of {', '.join(DTYPES)}.")
    if not config.batch_sizes or min(config.batch_sizes) < 1 or len(set(config.batch_sizes)) < len(config.batch_sizes):
        raise ValueError(f"batch_sizes is {config.batch_sizes}; expected different numbers of images, at least 1.")
    if 1 not in config.batch_sizes:
        raise ValueError(f"batch_sizes is {config.batch_sizes}; put 1 into it, the latency of a single image.")
    if config.window_size is not None and config.window_size < 0:
        raise ValueError(f"window_size is {config.window_size}; expected patches, or 0 for global attention.")
    if config.repeats < 1 or config.warmup < 0:
        raise ValueError(f"repeats is {config.repeats} and warmup {config.warmup}; expected at least 1 and 0.")
    if config.classes is not None and config.classes < 1:
        raise ValueError(f"classes is {config.classes}; expected at least 1.")
    if config.decoder == "sam" and not Path(config.sam).is_file():
        raise FileNotFoundError(f"There is no file {config.sam}: name SAM's checkpoint with sam=FILE.")


def _alone(encoder: VisionEncoder) -> Forward:
    """One forward pass gives summary and features; a student's adaptors do not run."""
    without = "adaptors." if encoder.is_student else None
    return Forward(encoder.features, torch.float32, module_tensors(encoder.model, without))


def _with_decoder(encoder: VisionEncoder, config: ThroughputConfig, sam: Any) -> Forward:
    device = encoder.device
    weights = _alone(encoder).weights
    classes = config.classes or DECODERS[config.decoder]
    image = _images(encoder, 1, torch.float32)
    if config.decoder == "linear":
        head = LinearHead(encoder.features(image)[0].shape[2], classes).eval().to(device)

        def segment(images: torch.Tensor) -> torch.Tensor:
            features, grid = encoder.features(images)
            logits = head(features.transpose(1, 2).unflatten(2, grid))  # (B, h*w, C) -> (B, C, h, w) -> (B, K, h, w)
            return F.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=False).argmax(dim=1)

        return Forward(segment, torch.float32, weights + module_tensors(head))
    if config.decoder == "zero-shot":
        texts = F.normalize(torch.randn(classes, encoder.language(image).shape[1], device=device), dim=1)

        def classify(images: torch.Tensor) -> torch.Tensor:
            return (F.normalize(encoder.language(images), dim=1) @ texts.T).argmax(dim=1)

        adaptor = module_tensors(encoder.model.adaptors[encoder.adaptor]) if encoder.is_student else []
        return Forward(classify, torch.float32, [*weights, *adaptor, texts])
    embed, weights = _sam_encoder(encoder, sam, config, weights)
    size = (encoder.image_size, encoder.image_size)
    box = 0.25 * encoder.image_size * torch.tensor([[1.0, 1.0, 3.0, 3.0]]).numpy()  # x0, y0, x1, y1

    def draw_masks(images: torch.Tensor) -> list[torch.Tensor]:
        # SAM's own parts stay in float32; in another dtype their products are computed in it, as autocast does
        with torch.autocast(device.type, DTYPES[config.dtype], enabled=config.dtype != "float32"):
            return [predict_masks(sam, embedding[None], box, size)[0] for embedding in embed(images)]

    decoder = module_tensors(sam.prompt_encoder) + module_tensors(sam.mask_decoder)
    return Forward(draw_masks, torch.uint8, weights + decoder)


def _sam_encoder(
    encoder: VisionEncoder, sam: Any, config: ThroughputConfig, weights: list[torch.Tensor]
) -> tuple[SamEncoder | StudentEncoder, list[torch.Tensor]]:
    """The encoder of SAM's embeddings, and its weights."""
    if encoder.is_student:
        adaptor = config.adaptor or "sam"
        student = StudentEncoder(encoder.model, sam, adaptor, encoder.image_size)
        heads = module_tensors(encoder.model.adaptors[adaptor])
        return student, weights + heads + module_tensors(student.neck)
    kind, checkpoint = encoder.spec.kind, encoder.spec.checkpoint
    if kind != "segment_anything" or Path(checkpoint).resolve() != Path(config.sam).resolve():
        raise ValueError(
            f"{encoder.name} cannot feed SAM's decoder: decoder=sam takes students with an adaptor to SAM, and "
            f"segment_anything:{config.sam} itself."
        )
    own = SamEncoder(sam)
    if encoder.image_size != own.image_size:
        raise ValueError(
            f"SAM decodes at its own {own.image_size} pixels, not at {encoder.image_size}: leave image_size out."
        )
    return own, module_tensors(own.image_encoder)


def _count_parameters(weights: list[torch.Tensor]) -> int:
    return sum(weight.numel() for weight in weights if isinstance(weight, nn.Parameter))


def _images(encoder: VisionEncoder, batch: int, dtype: torch.dtype) -> torch.Tensor:
    """Random (batch, 3, side, side), float in [0, 1] or uint8."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, encoder.image_size, encoder.image_size, generator=generator)
    images = images if dtype == torch.float32 else (255 * images).to(dtype)
    return images.to(encoder.device)


def _windows(encoder: VisionEncoder, config: ThroughputConfig) -> str:
    """The windows that the settings ask for, if they do and the model is a student."""
    if config.window_size is None or not encoder.is_student:
        return ""
    return f", windows of {config.window_size} patches" if config.window_size else ", global attention"

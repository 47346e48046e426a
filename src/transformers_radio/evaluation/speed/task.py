"""`eval throughput`: images/s, latency, FLOPs and memory of several models, interleaved in one run."""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from transformers_radio.evaluation.models.encoder import ENCODER_COUNTED, VisionEncoder, load_encoder
from transformers_radio.evaluation.models.specs import ModelSpec
from transformers_radio.evaluation.result import Result, done, result_path
from transformers_radio.evaluation.sam_coco.prompting import SamEncoder, StudentEncoder, predict_masks
from transformers_radio.evaluation.segmentation.probe import LinearHead
from transformers_radio.precision import DTYPES
from transformers_radio.teachers import digest_weights, load_sam

from .cost import FLOPS_RULE, count_flops, memory_rule, module_tensors, peak_memory
from .timing import device_name, latencies, throughput_conditions

# decoder -> classes it tells apart where the settings name no number: ADE20K's, ImageNet's
DECODERS = {"none": 0, "linear": 150, "zero-shot": 1000, "sam": 0}

# What a result is known by, of its settings.
RESULT_COUNTED = (
    *ENCODER_COUNTED,
    *("image_size", "batch_sizes", "decoder", "classes", "repeats", "warmup", "interleaved", "sam"),
    *("device", "torch", "FLOPs", "memory"),
)


@dataclass
class ThroughputConfig:
    """Settings of the task. Its images are random: speed does not depend on what they show."""

    image_size: int | None = None  # side in pixels; null: each model's own, with decoder=sam that of SAM
    window_size: int | None = None  # of students, in patches; null: their default; 0: global attention
    batch_sizes: list[int] = field(default_factory=lambda: [1, 32])
    dtype: str = "float32"
    device: str | None = None  # such as "cpu" or "cuda:1"; null: the first GPU if there is one
    # Measured besides the model alone: none; linear: a segmentation head and its arg-max at the image's size;
    # zero-shot: the similarity to the classes' texts, which are encoded once; sam: SAM's neck and mask decoder for one
    # box an image.
    decoder: str = "none"
    classes: int | None = None  # of linear and zero-shot; null: 150 (ADE20K) and 1000 (ImageNet)
    sam: str = "sam_vit_h_4b8939.pth"  # segment_anything's own file; must be the adaptor's teacher
    adaptor: str | None = None  # the student's, for the decoder; null: the one to its text tower, or "sam"
    repeats: int = 20  # rounds that count
    warmup: int = 3  # rounds before them
    overwrite: bool = False


@dataclass
class Forward:
    """What is timed: a callable, the dtype of the images it takes, and the weights it reads."""

    run: Callable[[torch.Tensor], object]
    input_dtype: torch.dtype
    weights: list[torch.Tensor]


def run(models: list[str], config: ThroughputConfig, output: Path) -> list[Result]:
    """One `Result` a model; "Throughput" is images/s of the model alone at the largest batch.

    Raises:
        FileNotFoundError, ValueError: settings or a model that cannot be used; before anything is timed.
    """
    _check(config)
    device = torch.device(config.device) if config.device else Accelerator(mixed_precision="no").device
    sam = load_sam(config.sam).to(device) if config.decoder == "sam" else None
    side = sam.image_encoder.img_size if sam is not None and config.image_size is None else config.image_size
    encoders = [_load(spec, side, config, device) for spec in models]
    names = [encoder.name for encoder in encoders]
    settings = [_settings(encoder, names, config, device, sam) for encoder in encoders]
    paths = [result_path(output, encoder.name, "throughput", _data_name(encoder, config)) for encoder in encoders]
    found = [
        done(path, own, RESULT_COUNTED, config.overwrite, _before) for path, own in zip(paths, settings, strict=True)
    ]
    finished = [result for result in found if result is not None]
    if len(finished) == len(encoders):
        return finished  # else all of them again: their ratios are of one run

    forwards: dict[tuple[str, str], Forward] = {}  # (model, what follows it) -> what is timed
    for encoder in encoders:
        forwards[encoder.name, ""] = _alone(encoder)
        if config.decoder != "none":
            forwards[encoder.name, f" + {config.decoder}"] = _with_decoder(encoder, config, sam)
    batches = {
        (encoder.name, part, size): _images(encoder, size, forwards[encoder.name, part].input_dtype)
        for encoder in encoders
        for name, part in forwards
        if name == encoder.name
        for size in config.batch_sizes
    }
    metrics: dict[str, dict[str, float]] = {name: {} for name in names}
    for (name, part), forward in forwards.items():
        metrics[name][f"GFLOPs an image{part}"] = count_flops(forward.run, batches[name, part, 1]) / 1e9
        metrics[name][f"Parameters (M){part}"] = _count_parameters(forward.weights) / 1e6
        for size in config.batch_sizes:
            peak = peak_memory(forward.run, batches[name, part, size], forward.weights)
            metrics[name][f"Peak MiB, batch {size}{part}"] = peak / 2**20
    # `latencies` takes names of one string
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
    largest = max(config.batch_sizes)
    return [
        Result(
            "throughput",
            encoder.name,
            _data_name(encoder, config),
            {"Throughput": metrics[encoder.name][f"images/s, batch {largest}"], **metrics[encoder.name]},
            _protocol(encoder, batches[encoder.name, "", largest], config, len(encoders)),
            own,
            {"rounds": config.repeats, "models": len(encoders)},
            encoder.params,
            encoder.image_size,
        ).write(path)
        for encoder, own, path in zip(encoders, settings, paths, strict=True)
    ]


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


def _load(spec: str, side: int | None, config: ThroughputConfig, device: torch.device) -> VisionEncoder:
    language = config.adaptor if config.decoder == "zero-shot" else None
    encoder = load_encoder(spec, side, config.dtype, device, language, config.window_size)
    if config.decoder == "zero-shot":
        encoder.text_tower()  # raises where there is none
    return encoder


def _alone(encoder: VisionEncoder) -> Forward:
    """One forward pass gives summary and features; a student's adaptors do not run."""
    without = "adaptors." if encoder.is_student else None
    return Forward(encoder.features, torch.float32, module_tensors(encoder.model, without))


def _with_decoder(encoder: VisionEncoder, config: ThroughputConfig, sam: Any) -> Forward:
    device = next(encoder.model.parameters()).device
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
    """What makes SAM's embeddings, and its weights."""
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
    return images.to(next(encoder.model.parameters()).device)


def _data_name(encoder: VisionEncoder, config: ThroughputConfig) -> str:
    side = encoder.image_size
    device = device_name(next(encoder.model.parameters()).device)
    decoder = "" if config.decoder == "none" else f", {config.decoder} decoder"
    return f"{side}x{side}, {config.dtype}, {device}{_windows(encoder, config)}{decoder}"


def _windows(encoder: VisionEncoder, config: ThroughputConfig) -> str:
    """What the settings ask for, for a student; nothing where they ask for nothing."""
    if config.window_size is None or not encoder.is_student:
        return ""
    return f", windows of {config.window_size} patches" if config.window_size else ", global attention"


def _settings(
    encoder: VisionEncoder, names: list[str], config: ThroughputConfig, device: torch.device, sam: Any
) -> dict:
    left_out = {"overwrite", "device", "sam"} | ({"window_size"} if config.window_size is None else set())
    return {
        **{key: value for key, value in asdict(config).items() if key not in left_out},
        **encoder.settings(),
        "image_size": encoder.image_size,
        "device": device_name(device),
        "torch": torch.__version__,
        "interleaved": names,
        "sam": None if sam is None else digest_weights(sam),
        "FLOPs": FLOPS_RULE,
        "memory": memory_rule(device),
    }


def _before(there: dict[str, Any]) -> dict[str, Any]:
    """Earlier versions wrote where the models lay, and not their names."""
    return {**there, "interleaved": [ModelSpec.parse(model).title for model in there.get("interleaved", [])]}


def _protocol(encoder: VisionEncoder, images: torch.Tensor, config: ThroughputConfig, models: int) -> str:
    decoders = {
        "none": "model alone",
        "linear": "model alone, and with a linear segmentation head and its arg-max at the image's size",
        "zero-shot": "model alone, and with its language adaptor and the similarity to the classes' texts",
        "sam": "model alone, and with its SAM adaptor, SAM's neck and mask decoder for one box an image",
    }
    return (
        f"{throughput_conditions(encoder.model, images)}{_windows(encoder, config)}; {decoders[config.decoder]}; "
        f"median of {config.repeats} "
        f"rounds after {config.warmup} to warm up, {models} model{'s' if models > 1 else ''} in turn in each"
    )

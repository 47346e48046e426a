"""`eval sam-coco`: masks for box prompts, by a student in SAM's place or by SAM itself."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from omegaconf import MISSING

from transformers_radio.evaluation.models.encoder import count_parameters, load_student
from transformers_radio.evaluation.models.specs import ModelSpec
from transformers_radio.evaluation.result import Result, done, result_path, work_folder
from transformers_radio.teachers import digest_weights, load_sam
from transformers_radio.teachers.base import DTYPES

from .coco import SamCocoConfig, file_digests, load_annotations, load_detections, mask_library
from .measure import evaluate_sam_coco
from .prompting import SamEncoder, StudentEncoder

# What a result is known by, of its settings.
RESULT_COUNTED = (
    *("weights", "decoder_weights", "adaptor", "image_size", "window_size", "best_of_three"),
    *("annotations_digest", "detections_digest", "images_digest"),
)


@dataclass
class SamCocoTaskConfig:
    """Settings of the task; recipes/evaluation/coco2017.yaml has those of the paper."""

    data: str = MISSING  # folder of COCO 2017: val2017/ and annotations/instances_val2017.json
    split: str = "val2017"
    name: str = "COCO 2017"
    licence: str = ""
    source: str = ""  # where to get it
    detections: str | None = None  # a COCO results file of boxes and scores: prompts with these, the figure is mask AP
    sam: str = "sam_vit_h_4b8939.pth"  # segment_anything's own file; must be the adaptor's teacher
    adaptor: str = "sam"
    image_size: int | None = None  # of the student's input; null: SAM's own (1024)
    window_size: int | None = None  # null: the student's default; 0: global; 16: windows of 16 x 16 patches
    best_of_three: bool = False  # the best of SAM's three masks, instead of the single one
    crowds: bool = False  # score crowd regions like objects, as the paper's harness does; not with detections
    dtype: str = "float32"  # of the image encoder, by autocast: bfloat16 on GPUs; the decoder stays in float32
    prompts_per_chunk: int = 64
    overwrite: bool = False


def run(models: list[str], config: SamCocoTaskConfig, output: Path) -> list[Result]:
    """One `Result` a model: the mean mask IoU in percent, or COCO's mask AP with detections.

    A model is a student, or `segment_anything:CHECKPOINT` for SAM's own row; it must then be `config.sam`.

    Raises:
        FileNotFoundError, ValueError: data, settings or a model that cannot be used; before the first image.
        ImportError: no library for COCO's masks.
    """
    root = Path(config.data)
    data = SamCocoConfig(
        images=str(root / config.split),
        annotations=str(root / "annotations" / f"instances_{config.split}.json"),
        detections=config.detections,
        sam=config.sam,
        adaptor=config.adaptor,
        image_size=config.image_size,
        window_size=config.window_size,
        best_of_three=config.best_of_three,
        prompts_per_chunk=config.prompts_per_chunk,
        crowds=config.crowds,
        dtype=config.dtype,
    )
    if config.dtype not in DTYPES:
        raise ValueError(f"dtype is {config.dtype!r}; expected one of {', '.join(DTYPES)}.")
    for path in (data.annotations, config.detections, config.sam):
        if path is not None and not Path(path).is_file():
            raise FileNotFoundError(f"There is no file {path}; check data, split, detections and sam.")
    mask_library()
    images = load_annotations(data)[0] if config.detections is None else load_detections(data)
    files = file_digests(data, images)
    device = Accelerator(mixed_precision="no").device
    sam = load_sam(config.sam).to(device)
    encoders = {ModelSpec.parse(model): _encoder(model, sam, config, device) for model in models}
    return [
        _measure(spec.title, str(spec), encoder, sam, config, data, files, output)
        for spec, encoder in encoders.items()
    ]


def _encoder(
    spec: str, sam: torch.nn.Module, config: SamCocoTaskConfig, device: torch.device
) -> SamEncoder | StudentEncoder:
    parsed = ModelSpec.parse(spec)
    kind, checkpoint = parsed.kind, parsed.checkpoint
    if kind == "segment_anything":
        if Path(checkpoint).resolve() != Path(config.sam).resolve():
            raise ValueError(f"{checkpoint} is not the SAM that decodes ({config.sam}): make both the same file.")
        return SamEncoder(sam)
    if kind != "student":
        raise ValueError(f"{spec} cannot take the place of SAM's encoder: name a student, or segment_anything:FILE.")
    student = load_student(checkpoint).eval().to(device)
    return StudentEncoder(student, sam, config.adaptor, config.image_size, config.window_size)


def _measure(
    name: str,
    spec: str,
    encoder: SamEncoder | StudentEncoder,
    sam: Any,
    config: SamCocoTaskConfig,
    data: SamCocoConfig,
    files: dict[str, str | None],
    output: Path,
) -> Result:
    task = "sam-coco" if config.detections is None else "sam-coco-detections"
    path = result_path(output, name, task, config.name)
    settings = {
        **{key: value for key, value in asdict(config).items() if key not in ("overwrite", "prompts_per_chunk")},
        "model": spec,
        "weights": digest_weights(encoder),
        "decoder_weights": digest_weights(sam.prompt_encoder, sam.mask_decoder),
        **files,
        "image_size": encoder.image_size,
    }

    def before(there: dict[str, Any]) -> dict[str, Any]:  # null for SAM's own
        return {**there, "image_size": there.get("image_size") or sam.image_encoder.img_size}

    finished = done(path, settings, RESULT_COUNTED, config.overwrite, before)
    if finished is not None:
        return finished
    lines = work_folder(path) / "images.jsonl"
    if config.overwrite:
        lines.unlink(missing_ok=True)
    found = evaluate_sam_coco(encoder, sam, data, lines)
    whole: dict[str, int] = {
        key: int(found[key]) for key in ("images", "annotations", "crowd", "empty", "detections") if key in found
    }
    scored = "crowd regions included" if config.crowds else "without crowd regions"
    prompts = f"true boxes, mean mask IoU over annotations, {scored}"
    if config.detections is not None:
        prompts = "boxes of a detector, COCO mask AP"
    masks = "best of three masks by predicted IoU" if config.best_of_three else "single mask"
    if isinstance(encoder, StudentEncoder):
        windows = {None: "its default windows", 0: "global attention"}.get(
            config.window_size, f"windows of {config.window_size} patches"
        )
        who = f"student at {encoder.image_size} px, {windows}, adaptor {config.adaptor!r} in SAM's frozen decoder"
        student: Any = encoder.student
        params = count_parameters(student) - count_parameters(student.adaptors)
    else:
        who = f"SAM at {encoder.image_size} px"
        params = count_parameters(encoder.image_encoder)
    precision = "" if config.dtype == "float32" else f", its encoder in {config.dtype}"
    names = {"mean_mask_iou": "SAM COCO"}
    return Result(
        "sam-coco",
        name,
        config.name,
        {names.get(key, f"mask {key}"): value for key, value in found.items() if key not in whole},
        f"{prompts}, {masks}; {who}{precision}",
        settings,
        whole,
        params,
        encoder.image_size,
    ).write(path)

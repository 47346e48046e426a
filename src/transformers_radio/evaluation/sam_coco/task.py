"""`eval sam-coco`: masks for box prompts, by a student in SAM's place or by SAM itself."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from transformers_radio.evaluation.models.encoder import count_parameters, load_student
from transformers_radio.evaluation.models.specs import ModelSpec
from transformers_radio.evaluation.task import Job, Measured, Task
from transformers_radio.evaluation.workspace import clear_work
from transformers_radio.teachers import digest_weights, load_sam
from transformers_radio.teachers.base import DTYPES

from .coco import file_digests, load_annotations, load_detections, mask_library
from .config import SamCocoConfig
from .measure import evaluate_sam_coco
from .prompting import SamEncoder, StudentEncoder

COUNTS = ("images", "annotations", "crowd", "empty", "detections")  # what `evaluate_sam_coco` returns beside scores


class SamCoco(Task):
    """The mean mask IoU in percent, or COCO's mask AP with detections.

    A model is a student, or `segment_anything:CHECKPOINT` for SAM's own row, which must then be `config.sam`.

    Raises:
        FileNotFoundError, ValueError: data, settings or a model that cannot be used; before the first image.
        ImportError: no library for COCO's masks.
    """

    name = "sam-coco"
    config_class = SamCocoConfig
    config: SamCocoConfig
    counted = (
        *("weights", "decoder_weights", "adaptor", "image_size", "window_size", "best_of_three", "crowds", "dtype"),
        *("annotations_digest", "detections_digest", "images_digest"),
    )
    columns = ("SAM COCO", "mask AP")
    hub_task = ("mask-generation", "Prompted masks")
    hub_metrics = {
        "SAM COCO": "mean_iou",
        **{f"mask AP{part}": "mean_average_precision" for part in ("", "50", "75", "_small", "_medium", "_large")},
    }

    def open(self, models: list[str]) -> list[Job]:
        config = self.config
        if config.dtype not in DTYPES:
            raise ValueError(f"dtype is {config.dtype!r}; expected one of {', '.join(DTYPES)}.")
        for path in (config.annotations, config.detections, config.sam):
            if path is not None and not Path(path).is_file():
                raise FileNotFoundError(f"There is no file {path}; check data, split, detections and sam.")
        mask_library()
        self.method = "" if config.detections is None else "detections"
        images = load_annotations(config)[0] if config.detections is None else load_detections(config)
        files = file_digests(config, images)
        self.sam: Any = load_sam(config.sam).to(Accelerator(mixed_precision="no").device)
        return [self._job(ModelSpec.parse(model), files) for model in models]

    def recognized(self, settings: dict[str, Any]) -> dict[str, Any]:
        side = settings.get("image_size") or self.sam.image_encoder.img_size  # null was SAM's own
        return {"crowds": False, "dtype": "float32", **settings, "image_size": side}

    def measure(self, job: Job, folder: Path) -> Measured:
        clear_work(folder, self.config.overwrite)
        found = evaluate_sam_coco(job.encoder, self.sam, self.config, folder / "images.jsonl")
        return Measured(
            {_metric(name): value for name, value in found.items() if name not in COUNTS},
            self._protocol(job.encoder),
            {name: int(found[name]) for name in COUNTS if name in found},
        )

    def _job(self, spec: ModelSpec, files: dict[str, str | None]) -> Job:
        config, encoder = self.config, self._encoder(spec)
        left_out = ("overwrite", "prompts_per_chunk")
        settings = {
            **{name: value for name, value in asdict(config).items() if name not in left_out},
            "model": str(spec),
            "weights": digest_weights(encoder),
            "decoder_weights": digest_weights(self.sam.prompt_encoder, self.sam.mask_decoder),
            **files,
            "image_size": encoder.image_size,
        }
        if isinstance(encoder, StudentEncoder):
            student: Any = encoder.student
            kind, params = "student", count_parameters(student) - count_parameters(student.adaptors)
        else:
            kind, params = "teacher", count_parameters(encoder.image_encoder)
        return Job(spec.title, config.name, kind, encoder, settings, params, encoder.image_size)

    def _encoder(self, spec: ModelSpec) -> SamEncoder | StudentEncoder:
        config = self.config
        if spec.kind == "segment_anything":
            if Path(spec.checkpoint).resolve() != Path(config.sam).resolve():
                raise ValueError(
                    f"{spec.checkpoint} is not the SAM that decodes ({config.sam}): make both the same file."
                )
            return SamEncoder(self.sam)
        if not spec.is_student:
            raise ValueError(
                f"{spec} cannot take the place of SAM's encoder: name a student, or segment_anything:FILE."
            )
        student = load_student(spec.checkpoint).eval().to(self.sam.device)
        return StudentEncoder(student, self.sam, config.adaptor, config.image_size, config.window_size)

    def _protocol(self, encoder: SamEncoder | StudentEncoder) -> str:
        config = self.config
        scored = "crowd regions included" if config.crowds else "without crowd regions"
        prompts = f"true boxes, mean mask IoU over annotations, {scored}"
        if config.detections is not None:
            prompts = "boxes of a detector, COCO mask AP"
        masks = "best of three masks by predicted IoU" if config.best_of_three else "single mask"
        who = f"SAM at {encoder.image_size} px"
        if isinstance(encoder, StudentEncoder):
            windows = {None: "its default windows", 0: "global attention"}.get(
                config.window_size, f"windows of {config.window_size} patches"
            )
            who = f"student at {encoder.image_size} px, {windows}, adaptor {config.adaptor!r} in SAM's frozen decoder"
        precision = "" if config.dtype == "float32" else f", its encoder in {config.dtype}"
        return f"{prompts}, {masks}; {who}{precision}"


def _metric(name: str) -> str:
    return "SAM COCO" if name == "mean_mask_iou" else f"mask {name}"

"""A student and what can be loaded of its teachers; what cannot has a sentence that says why."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from torch import nn

from transformers_radio.data import USER_ERRORS, one_line
from transformers_radio.evaluation.models.encoder import VisionStudent, VisionTeacher, load_encoder
from transformers_radio.evaluation.models.specs import ModelSpec
from transformers_radio.evaluation.sam_coco.prompting import StudentEncoder
from transformers_radio.publishing.card import read_manifest
from transformers_radio.teachers import TextEncoder, build_teacher, has_text, load_sam, load_text_encoder

Loaded = TypeVar("Loaded")
SAM = "segment_anything"


@dataclass
class DemoModels:
    """What the page shows.

    Attributes:
        student: in float32.
        teachers: adaptor -> the teacher itself, with features as wide as the adaptor's.
        text: the text tower of the teacher behind `student.adaptor`; None leaves the labels out.
        sam: the whole SAM whose decoder draws masks; None leaves the masks out.
        sam_encoder: the student in the place of SAM's image encoder.
        left_out: adaptor, "labels" or "masks" -> why it is missing, as a sentence.
    """

    student: VisionStudent
    teachers: dict[str, VisionTeacher] = field(default_factory=dict)
    text: TextEncoder | None = None
    sam: Any | None = None
    sam_encoder: StudentEncoder | None = None
    left_out: dict[str, str] = field(default_factory=dict)


def load_models(name: str, given: Mapping[str, str] | None = None, with_teachers: bool = True) -> DemoModels:
    """Loads a student, and of its teachers what is at hand.

    Args:
        name: the student's folder or Hub id.
        given: adaptor -> TYPE:CHECKPOINT of its teacher, instead of what the student records.
        with_teachers: False loads no teacher for its features; text tower and SAM's decoder are loaded all the same.

    Raises:
        OSError: there is no such student, or no such checkpoint among those given.
        ValueError: the name of another kind of model, or something given that does not fit.
    """
    device = Accelerator(mixed_precision="no").device
    student = load_encoder(name, device=device)
    if not isinstance(student, VisionStudent):
        raise ValueError(f"{name} is a model of type {student.spec.kind}; expected the folder of a student.")
    given = dict(given or {})
    adaptors = student.model.config.adaptors
    for adaptor in given:
        if adaptor not in adaptors:
            raise ValueError(
                f"{name} has no adaptor {adaptor!r}; it has {', '.join(adaptors) or 'none'}: write "
                "ADAPTOR=TYPE:CHECKPOINT."
            )
    models = DemoModels(student)
    recorded = {adaptor: given.get(adaptor) or str(entry["teacher"]) for adaptor, entry in adaptors.items()}
    manifest = read_manifest(Path(student.spec.checkpoint))
    for adaptor, teacher in recorded.items() if with_teachers else ():
        side = manifest.get(adaptor, {}).get("image_size")
        load = _teacher_loader(adaptor, teacher, side, adaptors[adaptor]["feature_dim"], adaptor in given)
        loaded = _at_hand(models, adaptor, f"The teacher {adaptor} is left out", adaptor in given, load)
        if loaded is not None:
            models.teachers[adaptor] = loaded.to(device)
    _load_text(models, recorded, given)
    _load_sam(models, recorded, given)
    return models


def _at_hand(models: DemoModels, part: str, what: str, must: bool, load: Callable[[], Loaded]) -> Loaded | None:
    """What `load` returns; where that fails, None and a sentence in `left_out`, unless it `must` be there."""
    try:
        return load()
    except (*USER_ERRORS, RuntimeError) as error:
        if must:
            raise
        models.left_out[part] = f"{what}: {one_line(error).rstrip('.')}."
        return None


def _teacher_loader(
    adaptor: str, teacher: str, side: int | None, width: int, is_given: bool
) -> Callable[[], VisionTeacher]:
    def load() -> VisionTeacher:
        kind, _, checkpoint = teacher.partition(":")
        if kind == "python" and not is_given:
            raise ValueError(
                f"it is {teacher}, whose code runs only if you name it, with --teacher {adaptor}={teacher}"
            )
        encoder = VisionTeacher(ModelSpec(adaptor, kind, checkpoint), build_teacher(kind, checkpoint, side))
        if encoder.model.feature_dim != width:
            raise ValueError(
                f"the features of {teacher} are {encoder.model.feature_dim} wide, those of the adaptor {width}"
            )
        return encoder

    return load


def _load_text(models: DemoModels, recorded: Mapping[str, str], given: Mapping[str, str]) -> None:
    adaptor = models.student.adaptor
    if adaptor is None:
        known = ", ".join(recorded) or "none"
        models.left_out["labels"] = (
            f"Labels are left out: the student has no adaptor to a teacher with a text tower (its adaptors: {known})."
        )
        return
    teacher = recorded[adaptor]

    def load() -> TextEncoder:
        if has_text(teacher) is False:
            raise ValueError(
                f"the adaptor {adaptor} names {teacher or 'no teacher'}, which is no text tower; name one with "
                f"--teacher {adaptor}=TYPE:CHECKPOINT"
            )
        return load_text_encoder(*teacher.split(":", 1))

    text = _at_hand(models, "labels", "Labels are left out", adaptor in given, load)
    models.text = None if text is None else text.to(models.student.device)


def _load_sam(models: DemoModels, recorded: Mapping[str, str], given: Mapping[str, str]) -> None:
    adaptor = next((name for name, teacher in recorded.items() if teacher.startswith(f"{SAM}:")), None)
    if adaptor is None:
        models.left_out["masks"] = (
            f"Masks are left out: none of the student's adaptors names a SAM of type {SAM}, whose decoder would draw "
            "them."
        )
        return

    def load() -> tuple[Any, StudentEncoder]:
        from transformers_radio.teachers import resolve_checkpoint

        sam = load_sam(resolve_checkpoint(recorded[adaptor].partition(":")[2])).to(models.student.device)
        sam.image_encoder.blocks = nn.ModuleList()  # only its neck is needed: the student takes their place
        return sam, StudentEncoder(models.student.model, sam, adaptor)

    loaded = _at_hand(models, "masks", "Masks are left out", adaptor in given, load)
    if loaded is not None:
        models.sam, models.sam_encoder = loaded

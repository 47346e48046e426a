"""Models of transformers as teachers: which class belongs to a checkpoint. `import transformers` is the library."""

from pathlib import Path
from typing import Any

from transformers_radio.modeling import STUDENTS
from transformers_radio.modeling.errors_radio import one_line
from transformers_radio.teachers.base import Teacher, check_options

from .any import VisionModelTeacher
from .clip import ClipTeacher
from .dino import DinoTeacher
from .internvit import InternVitTeacher
from .pretrained import config_dict
from .radio import RadioTeacher
from .sam import SamTeacher
from .siglip import Siglip2Teacher, SiglipTeacher

# model_type -> teacher. The types "..._text_model" have a text tower alone.
BY_MODEL_TYPE: dict[str, type[Teacher]] = {
    "clip": ClipTeacher,
    "clip_vision_model": ClipTeacher,
    "clip_text_model": ClipTeacher,
    "dinov2": DinoTeacher,
    "dinov2_with_registers": DinoTeacher,
    "dinov3_vit": DinoTeacher,
    "siglip": SiglipTeacher,
    "siglip_vision_model": SiglipTeacher,
    "siglip_text_model": SiglipTeacher,
    "siglip2": Siglip2Teacher,
    "siglip2_vision_model": Siglip2Teacher,
    "siglip2_text_model": Siglip2Teacher,
    "internvl_vision": InternVitTeacher,
    "internvl": InternVitTeacher,
    "intern_vit_6b": InternVitTeacher,
    "internvl_chat": InternVitTeacher,
    "sam": SamTeacher,
    "sam_vision_model": SamTeacher,
}


def choose_teacher(checkpoint: str, **options: Any) -> type[Teacher]:
    """The teacher class for a checkpoint of transformers, by its configuration's `model_type`: a student's is
    `RadioTeacher`; `VisionModelTeacher` takes all types that have no class of their own.

    Args:
        checkpoint: Hub id or local folder.
        options: what the class's `from_checkpoint` is to be called with; see there.

    Raises:
        FileNotFoundError: for a path where no folder is.
        ValueError: for a configuration without a model_type, or options that the class does not know.
    """
    is_path = checkpoint.startswith((".", "/", "~")) or checkpoint.count("/") > 1  # not a Hub id
    if is_path and not Path(checkpoint).is_dir():
        raise FileNotFoundError(
            f"there is no folder {checkpoint}; give an existing one, or a Hub id such as owner/name"
        )
    try:
        written = config_dict(checkpoint, options.get("revision"))
        model_type = written.get("model_type") or ("radio" if "args" in written else None)  # NVIDIA's remote code
    except OSError as error:
        if Path(checkpoint).is_dir():
            raise
        reason = one_line(error).removeprefix(f"{checkpoint}: ")
        raise FileNotFoundError(f"there is no folder {checkpoint}, and as a Hub id it failed: {reason}") from error
    if model_type is None and not options.get("trust_remote_code"):
        raise ValueError(f"the configuration of {checkpoint} names no model_type, so it is no transformers model")
    if not isinstance(model_type, (str, type(None))):
        raise ValueError(f"the configuration of {checkpoint} has model_type {model_type!r}, expected a name")
    teacher = RadioTeacher if model_type in STUDENTS else BY_MODEL_TYPE.get(model_type or "", VisionModelTeacher)
    check_options(f"the {model_type} teacher", teacher.from_checkpoint, options)
    return teacher

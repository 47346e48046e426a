"""The model family: needs only torch and transformers; its files are the remote code of a Hub repository."""

from importlib import import_module

_MODULES = {
    "RadioConfig": "configuration_radio",
    "RadioModel": "modeling_radio",
    "ERadioConfig": "configuration_eradio",
    "ERadioModel": "modeling_eradio",
    "ERadioForImageClassification": "modeling_eradio_heads",
    "ERadioForSemanticSegmentation": "modeling_eradio_heads",
    "ERadioBackbone": "modeling_eradio_heads",
    "RadioModelOutput": "student_radio",
    "RadioPreTrainedModel": "modeling_radio",
    "AdaptorOutput": "adaptors_radio",
    "RadioForImageClassification": "modeling_radio_heads",
    "RadioForSemanticSegmentation": "modeling_radio_heads",
    "RadioBackbone": "modeling_radio_heads",
    "RadioBackboneConfig": "configuration_radio_backbone",
    "RadioPyramidBackbone": "modeling_radio_pyramid",
    "RadioPyramidConfig": "configuration_radio_pyramid",
    "RadioImageProcessor": "image_processing_radio",
    "RadioTimmConfig": "configuration_radio_timm",
    "RadioTimmModel": "modeling_radio_timm",
    "RadioLlavaProcessor": "processing_radio_llava",
    "RadioVisionTowerConfig": "configuration_radio_tower",
    "RadioVisionTower": "modeling_radio_tower",
    "load_student": "loading_radio",
}
# every student: model_type -> "module:Class"
STUDENTS = {
    "radio": "transformers_radio.modeling.modeling_radio:RadioModel",
    "eradio": "transformers_radio.modeling.modeling_eradio:ERadioModel",
    "radio_timm": "transformers_radio.modeling.modeling_radio_timm:RadioTimmModel",
}
__all__ = [*_MODULES, "STUDENTS", "student_class"]


def student_class(model_type: str):
    """The model class of a student, e.g. `student_class(config.model_type).from_pretrained(folder)`.

    Raises:
        ValueError: not the type of a student.
    """
    if model_type not in STUDENTS:
        raise ValueError(f"{model_type!r} is not the type of a student; choose one of {', '.join(STUDENTS)}.")
    module, _, name = STUDENTS[model_type].partition(":")
    try:
        return getattr(import_module(module), name)
    except (ModuleNotFoundError, AttributeError, ValueError) as error:
        raise ValueError(
            f"STUDENTS[{model_type!r}] is {STUDENTS[model_type]!r}, which cannot be imported ({error}); expected "
            "module:Class."
        ) from error


def __getattr__(name: str):
    # torch is imported with the first name that needs it
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *_MODULES])

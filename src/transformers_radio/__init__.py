"""AM-RADIO on the Hugging Face stack: train, evaluate and use agglomerative vision foundation models."""

import sys
from importlib import import_module

_PUBLIC = (
    "AdaptorOutput",
    "ERadioBackbone",
    "ERadioConfig",
    "ERadioForImageClassification",
    "ERadioForSemanticSegmentation",
    "ERadioModel",
    "RadioBackbone",
    "RadioBackboneConfig",
    "RadioConfig",
    "RadioForImageClassification",
    "RadioForSemanticSegmentation",
    "RadioImageProcessor",
    "RadioLlavaProcessor",
    "RadioModel",
    "RadioModelOutput",
    "RadioPyramidBackbone",
    "RadioPyramidConfig",
    "RadioTimmConfig",
    "RadioTimmModel",
    "RadioVisionTower",
    "RadioVisionTowerConfig",
    "load_student",
)
__all__ = [*_PUBLIC, "register"]
__version__ = "0.1.0"


def __getattr__(name: str):
    # torch and transformers are imported with the first name that needs them
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _register_new_types()
    return getattr(import_module(".modeling", __name__), name)


def __dir__():
    return sorted([*globals(), *_PUBLIC])


def _register_new_types() -> None:
    """Make known what transformers does not have: `eradio`, `radio_timm`, `radio_backbone`, ... and our `RadioConfig`.

    The last so that `AutoModel.from_config(our_config)` builds our class: transformers matches classes by name, and
    would build its own. Checkpoints of type "radio" still open as they do without this package.
    """
    modeling = import_module(".modeling", __name__)
    transformers = import_module("transformers")
    import_module(".modeling.modeling_radio_tower", __name__)  # registers with its module, as do the backbones
    import_module(".modeling.modeling_radio_pyramid", __name__)
    import_module(".modeling.processing_radio_llava", __name__)
    for model_type in modeling.STUDENTS:
        student = modeling.student_class(model_type)
        transformers.AutoModel.register(student.config_class, student, exist_ok=True)
    for auto, models in (
        (
            transformers.AutoModelForImageClassification,
            (modeling.RadioForImageClassification, modeling.ERadioForImageClassification),
        ),
        (
            transformers.AutoModelForSemanticSegmentation,
            (modeling.RadioForSemanticSegmentation, modeling.ERadioForSemanticSegmentation),
        ),
    ):
        for model in models:
            auto.register(model.config_class, model, exist_ok=True)
    for config in (modeling.ERadioConfig, modeling.RadioTimmConfig):
        transformers.AutoImageProcessor.register(config, modeling.RadioImageProcessor, exist_ok=True)


def register() -> None:
    """Let the Auto classes of this process open every checkpoint of type "radio" with this package's classes.

    Never done on import: it takes the place of transformers' own classes, which read NVIDIA's releases as they are,
    while ours refuse them (see `RadioModel.from_pretrained`).
    """
    from transformers import AutoConfig, AutoImageProcessor

    _register_new_types()
    modeling = import_module(".modeling", __name__)
    for model_type in modeling.STUDENTS:
        AutoConfig.register(model_type, modeling.student_class(model_type).config_class, exist_ok=True)
    AutoImageProcessor.register(modeling.RadioConfig, modeling.RadioImageProcessor, exist_ok=True)


# The Auto classes bring torch with them. Where they are loaded already, registering costs next to nothing; else it
# waits for the first name that is taken from this package, so that importing it stays light.
if "transformers.models.auto.modeling_auto" in sys.modules:
    _register_new_types()

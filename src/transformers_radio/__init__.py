"""AM-RADIO on the Hugging Face stack: train, evaluate and use agglomerative vision foundation models."""

from importlib import import_module

_PUBLIC = (
    "AdaptorOutput",
    "RadioBackbone",
    "RadioConfig",
    "RadioForImageClassification",
    "RadioForSemanticSegmentation",
    "RadioImageProcessor",
    "RadioModel",
    "RadioModelOutput",
    "RadioVisionTower",
    "RadioVisionTowerConfig",
)
__all__ = [*_PUBLIC, "register"]
__version__ = "0.1.0"


def __getattr__(name: str):
    # torch and transformers are imported with the first name that needs them
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".modeling", __name__), name)


def __dir__():
    return sorted([*globals(), *_PUBLIC])


def register() -> None:
    """Let the Auto classes of this process open every checkpoint of type "radio" with this package's classes.

    Never done on import: it takes the place of transformers' own classes, which read NVIDIA's releases as they are,
    while ours refuse them (see `RadioModel.from_pretrained`).
    """
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForImageClassification,
        AutoModelForSemanticSegmentation,
    )

    modeling = import_module(".modeling", __name__)
    AutoConfig.register("radio", modeling.RadioConfig, exist_ok=True)
    for auto, model in (
        (AutoModel, modeling.RadioModel),
        (AutoModelForImageClassification, modeling.RadioForImageClassification),
        (AutoModelForSemanticSegmentation, modeling.RadioForSemanticSegmentation),
    ):
        auto.register(modeling.RadioConfig, model, exist_ok=True)
    AutoImageProcessor.register(modeling.RadioConfig, modeling.RadioImageProcessor, exist_ok=True)

"""A student in what people already run: LLaVA, Segment Anything, open_clip, detectors; each swap is one call."""

from importlib import import_module

_MODULES = {
    "as_open_clip": "open_clip",
    "build_with_backbone": "detection",
    "llava_processor": "llava",
    "llava_vision_tower": "llava",
    "mask_rcnn": "detection",
    "swap_sam_encoder": "sam",
    "swap_vision_tower": "llava",
}
__all__ = list(_MODULES)


def __getattr__(name: str):
    # each needs another library
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *_MODULES])

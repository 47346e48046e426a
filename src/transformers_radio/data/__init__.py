"""Streaming images: one source or a mixture, one shared random crop, one tensor per resolution, exact resume."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import DataConfig as DataConfig
    from .config import SourceConfig as SourceConfig
    from .count import count_images as count_images
    from .errors import USER_ERRORS as USER_ERRORS
    from .errors import SourceError as SourceError
    from .errors import one_line as one_line
    from .images import decode_rgb as decode_rgb
    from .images import random_crop as random_crop
    from .listing import keep_files as keep_files
    from .listing import list_files as list_files
    from .stream import Batch as Batch
    from .stream import ImageStream as ImageStream
    from .stream import merge_states as merge_states

_MODULES = {
    "Batch": "stream",
    "DataConfig": "config",
    "ImageStream": "stream",
    "SourceConfig": "config",
    "SourceError": "errors",
    "USER_ERRORS": "errors",
    "count_images": "count",
    "decode_rgb": "images",
    "keep_files": "listing",
    "list_files": "listing",
    "merge_states": "stream",
    "one_line": "errors",
    "random_crop": "images",
}
__all__ = list(_MODULES)


def __getattr__(name: str):
    # torch is imported with the first name that needs it, so that a recipe's mistakes are named before
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)

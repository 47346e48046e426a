"""Streaming images: one source or a mixture, one shared random crop, one tensor per resolution, exact resume."""

from .config import DataConfig, SourceConfig
from .count import count_images
from .images import decode_rgb, random_crop
from .listing import keep_files, list_files
from .source import SourceError
from .stream import Batch, ImageStream, merge_states

__all__ = [
    "Batch",
    "DataConfig",
    "ImageStream",
    "SourceConfig",
    "SourceError",
    "count_images",
    "decode_rgb",
    "keep_files",
    "list_files",
    "merge_states",
    "random_crop",
]

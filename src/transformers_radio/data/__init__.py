"""Streaming images: one source, one shared random crop per image, one tensor per resolution, exact resume."""

from .images import decode_rgb, random_crop
from .source import DataConfig, SourceError
from .stream import Batch, ImageStream, merge_states

__all__ = ["Batch", "DataConfig", "ImageStream", "SourceError", "decode_rgb", "merge_states", "random_crop"]

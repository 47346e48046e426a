"""What is known of NVIDIA's releases by their version: license, best resolution, attention windows, teachers."""

import re
from dataclasses import dataclass, field
from typing import Any

RESEARCH = {
    "license": "NVIDIA Source Code License (non-commercial)",
    "license_name": "nsclv1",
    "license_url": "https://huggingface.co/nvidia/RADIO/blob/main/LICENSE",
}
OPEN_MODEL = {
    "license": "NVIDIA Open Model License",
    "license_name": "nvidia-open-model-license",
    "license_url": "https://www.nvidia.com/en-us/agreements/enterprise-software/nvidia-open-model-license/",
}


@dataclass(frozen=True)
class Release:
    """A family of versions.

    preferred: image side in pixels at which the models are best.
    windows: fields of `RadioConfig` for attention windows; None where the release has none.
    """

    license: dict[str, str]
    preferred: int
    windows: dict[str, int] | None = field(default_factory=dict)


# a version belongs to the first family whose pattern it matches; it is written as in "radio_v2.5-h", "c-radio_v3-b"
RELEASES: list[tuple[str, Release]] = [
    (r"c-?radio[-_]?v?4", Release(OPEN_MODEL, 512)),
    (r"c-?radio[-_]?v?3", Release(OPEN_MODEL, 512, None)),
    (r"c-?radio[-_]?v?2.*(g$|g\b|vlm)", Release(OPEN_MODEL, 768, {"window_num_global": 8})),
    (r"c-?radio", Release(OPEN_MODEL, 768)),
    (r"e-?radio", Release(RESEARCH, 512)),
    (r"radio[-_]?v?2\.5-?g", Release(RESEARCH, 896, {"window_num_global": 8})),
    (r"radio[-_]?v?2\.5", Release(RESEARCH, 768)),
    (r"radio[-_]?v?2(?!\d)", Release(RESEARCH, 432, {"window_num_windowed": 5})),
    (r"radio[-_]?v?1(?!\d)", Release(RESEARCH, 378)),
    (r"radio-[blh]\b", Release(RESEARCH, 768)),
    (r"radio-g\b", Release(RESEARCH, 896, {"window_num_global": 8})),
]
# version ids as they stand in file names, such as radio_v2.1_bf16.pth.tar
_VERSION = re.compile(r"(c-radio|e-radio|radio)[_-]?v?\d(\.\d)?(-(h-norm|so400m|vlm-h|[a-z]))?", re.IGNORECASE)


def find_release(version: str | None) -> Release | None:
    """The family of a version; None where it is unknown."""
    name = (version or "").lower()
    return next((release for pattern, release in RELEASES if re.search(rf"(?<![a-z]){pattern}", name)), None)


def version_in(name: str) -> str | None:
    """The version that a file's or repository's name states, such as "radio_v2.5-h" in radio_v2.5-h.pth.tar."""
    found = _VERSION.search(name)
    if found is not None:
        return found.group().lower()
    short = re.search(r"(?<![a-z])(c-radio\b|e-radio\b|radio-[blhg]\b)", name.lower())
    return short.group() if short else None


# adaptor -> TYPE:CHECKPOINT of its teacher, where the file does not say it
_TEACHERS = {
    "clip": "open_clip:ViT-H-14-378-quickgelu:dfn5b",
    "openai_clip": "transformers:openai/clip-vit-large-patch14-336",
    "siglip": "open_clip:ViT-SO400M-14-SigLIP-384:webli",
    "siglip2-g": "transformers:google/siglip2-giant-opt-patch16-384",
    "dino_v2": "transformers:facebook/dinov2-with-registers-giant",
    "dino_v3": "transformers:facebook/dinov3-vit7b16-pretrain-lvd1689m",
    "dino_v3_7b": "transformers:facebook/dinov3-vit7b16-pretrain-lvd1689m",
    "sam": "segment_anything:sam_vit_h_4b8939.pth",
}
_OPENAI = {"ViT-L/14@336px": "openai/clip-vit-large-patch14-336", "ViT-L/14": "openai/clip-vit-large-patch14"}


def teacher_of(name: str, entry: dict[str, Any]) -> str:
    """The `teacher` of an adaptor: TYPE:CHECKPOINT as this package names it, whose text tower zero-shot asks.

    Args:
        name: of the adaptor.
        entry: of `args.teachers`; its type, model and pretrained are used where they are there.
    """
    kind, model, pretrained = (str(entry.get(key) or "") for key in ("type", "model", "pretrained"))
    if kind in ("open_clip", "clip") and model and pretrained:
        return f"open_clip:{model}:{pretrained}"
    if kind == "openai_clip" and model in _OPENAI:
        return f"transformers:{_OPENAI[model]}"
    if "siglip2" in kind and "/" in model:
        return f"transformers:{model}"
    if kind in ("transformers", "segment_anything", "timm") and model:  # as this package writes it
        return ":".join(part for part in (kind, model, pretrained) if part)
    if name in _TEACHERS:
        return _TEACHERS[name]
    return ":".join(part for part in (kind, model, pretrained) if part) or name

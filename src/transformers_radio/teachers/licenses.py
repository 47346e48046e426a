"""Licenses of teachers, and what they leave for a student: what is recorded here is no legal advice.

An entry is what the model's page on the Hub said when it was written down. Pages change; the page decides.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .checkpoints import PACKAGE, portable_checkpoint

# Licenses that leave the license of derived works to their author.
PERMISSIVE = {
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "isc", "unlicense", "cc0-1.0", "cc-by-4.0"),
    *("cdla-permissive-1.0", "cdla-permissive-2.0", "apple-ascl"),
}
# Licenses that allow research only, or no commercial use; besides all whose name begins with cc-by-nc.
RESEARCH_ONLY = {"apple-amlr", "fair-noncommercial-research-license", "fair-noncommercial-research", "nsclv1"}
RESEARCH_STUDENT = "research-only"  # the name of the license of students of such teachers


@dataclass(frozen=True)
class License:
    """A license, by the fields that a model card on the Hub has for it.

    Attributes:
        id: the Hub's identifier, such as "apache-2.0"; "other" for licenses that the Hub has no identifier for.
        name: of a license that is "other".
        link: its text; None where the identifier says enough.
        note: what a reader should know besides.
    """

    id: str
    name: str | None = None
    link: str | None = None
    note: str | None = None

    def __str__(self) -> str:
        return self.name if self.id == "other" and self.name else self.id

    @property
    def is_research_only(self) -> bool:
        """Whether it allows no commercial use."""
        names = {self.id, self.name}
        return bool(names & {*RESEARCH_ONLY, RESEARCH_STUDENT}) or any(
            name.startswith("cc-by-nc") for name in names if name
        )

    @property
    def is_permissive(self) -> bool:
        """Whether the author of a derived work may choose its license."""
        return self.id in PERMISSIVE


APACHE, MIT = License("apache-2.0"), License("mit")
DINOV3 = License(
    "other",
    "dinov3-license",
    "https://ai.meta.com/resources/models-and-libraries/dinov3-license/",
    "Commercial use is allowed. Derivative works may be distributed under the same terms only, with a copy of the "
    "agreement. Whether a distilled student is a derivative work is a question that Meta has not answered "
    "(github.com/facebookresearch/dinov3/issues/348); here it counts as one.",
)
SAM = License(
    "other",
    "sam-license",
    "https://github.com/facebookresearch/sam3/blob/main/LICENSE",
    "Of the same make as DINOv3's: derivative works under the same terms, with a copy of the agreement.",
)
NVIDIA_OPEN = License(
    "other",
    "nvidia-open-model-license",
    "https://developer.download.nvidia.com/licenses/nvidia-open-model-license-agreement-june-2024.pdf",
    "Commercial use is allowed. NVIDIA does not comment on what DINOv3 and SAM 3, which taught C-RADIOv4, ask for "
    "(github.com/NVlabs/RADIO/issues/176).",
)
NVIDIA_RESEARCH = License(
    "other",
    "nsclv1",
    "https://github.com/NVlabs/RADIO/blob/main/LICENSE",
    "NVIDIA Source Code License: research and evaluation only. The weights for commercial use are named C-RADIO.",
)
APPLE_RESEARCH = License(
    "apple-amlr",
    note="Apple's license for research, which the model's page names since 2025. It was published under Apple's "
    "permissive sample code license, which other tables still name.",
)

# Hub ids, as patterns -> license; the first that fits counts.
LICENSES: dict[str, License] = {
    "facebook/dinov3-*": DINOV3,
    "timm/*dinov3*": DINOV3,
    "facebook/dinov2*": APACHE,
    "facebook/sam3*": SAM,
    "facebook/sam-vit-*": APACHE,
    "facebook/metaclip-*": License("cc-by-nc-4.0"),
    "openai/clip-vit-*": MIT,
    "timm/*clip*.openai": MIT,
    "laion/CLIP-ViT-*": MIT,
    "apple/DFN*": APPLE_RESEARCH,
    "timm/*clip*.dfn*": APPLE_RESEARCH,
    "apple/*MobileCLIP2*": APPLE_RESEARCH,
    "timm/MobileCLIP2-*": APPLE_RESEARCH,
    "apple/aimv2-*": APPLE_RESEARCH,
    "google/siglip-*": APACHE,
    "google/siglip2-*": APACHE,
    "timm/ViT-*-SigLIP*": APACHE,
    "OpenGVLab/InternViT-*": MIT,
    "nvidia/C-RADIO*": NVIDIA_OPEN,
    "nvidia/RADIO*": NVIDIA_RESEARCH,
    "nvidia/E-RADIO*": NVIDIA_RESEARCH,
}
# segment_anything's own files -> the Hub id of the same weights
SAM_FILES = {
    "sam_vit_h_4b8939.pth": "facebook/sam-vit-huge",
    "sam_vit_l_0b3195.pth": "facebook/sam-vit-large",
    "sam_vit_b_01ec64.pth": "facebook/sam-vit-base",
}


def hub_id(type: str, checkpoint: str) -> str | None:
    """The model on the Hub that a teacher is; None for the disk's, or where its library is not here to be asked.

    Args:
        type, checkpoint: as for `build_teacher`; the checkpoint may be portable (`portable_checkpoint`). Or
            "converted" and the source of a converted student.
    """
    name, _, tag = checkpoint.partition(":")
    if type == "segment_anything":
        file = checkpoint.rpartition("/")[2].rpartition(":")[2]
        return SAM_FILES.get(file) or (_owner_and_name(tag) if name == "hf-hub" else None)
    if name == "hf-hub":
        return _owner_and_name(tag)
    try:
        if type == "open_clip":
            import open_clip

            return _owner_and_name((open_clip.get_pretrained_cfg(name, tag) or {}).get("hf_hub") or "")
        if type == "timm":
            import timm

            config = timm.get_pretrained_cfg(checkpoint, allow_unregistered=True)
            return _owner_and_name((config and config.hf_hub_id) or "")
    except (ImportError, RuntimeError, ValueError):
        return None
    if type == "converted":
        checkpoint = name  # without the file in the repository
    is_on_hub = type in ("transformers", "converted") and not Path(checkpoint).exists()
    return _owner_and_name(checkpoint) if is_on_hub else None


def license_of(type: str, checkpoint: str) -> License | None:
    """The license of a teacher's weights, or of any other checkpoint that a student starts from; None if unknown.

    A folder on the disk with a model card says it itself; else the table above knows it, or timm. A card that cannot
    be read says nothing.

    Args:
        type, checkpoint: as for `hub_id`; for "python" nobody knows.
    """
    if portable_checkpoint(checkpoint).rpartition(PACKAGE)[1] and type != "python":
        return APACHE  # the package's own
    card = Path(checkpoint).expanduser() / "README.md"
    if type != "python" and card.is_file():
        with suppress(ValueError):
            return license_of_card(card)
    found = hub_id(type, checkpoint)
    for pattern, license in LICENSES.items():
        if found is not None and fnmatchcase(found, pattern):
            return license
    return _license_in_timm(checkpoint) if type == "timm" else None


def license_of_card(card: str | Path) -> License | None:
    """The license that a README.md names; None without one.

    Raises:
        ValueError: its front matter is not YAML.
    """
    from huggingface_hub import ModelCard

    try:
        data = ModelCard.load(card, ignore_metadata_errors=True).data
    except Exception as error:  # of the YAML parser
        raise ValueError(f"{card} cannot be read as a model card ({error}); correct its front matter") from error
    return License(data.license, data.license_name, data.license_link) if data.license else None


def student_license(teachers: dict[str, License | None]) -> tuple[License | None, list[str]]:
    """The license of a student of these teachers, and the reasons for it, one sentence each.

    None where it is for its author to choose and nothing here can: a teacher's license is unknown, or several want to
    be passed on.

    Args:
        teachers: teacher, or what else the student started from -> its license; None where it is unknown.
    """
    unknown = [name for name, license in teachers.items() if license is None]
    known = {name: license for name, license in teachers.items() if license is not None}
    research = {name: license for name, license in known.items() if license.is_research_only}
    passed_on = {name: one for name, one in known.items() if not (one.is_permissive or one.is_research_only)}
    reasons = [f"{name} is licensed for research only ({license})." for name, license in research.items()]
    reasons += [f"The license of {name}, {license}, is passed on to what derives from it." for name, license in
                passed_on.items()]  # fmt: skip
    reasons += [f"{name}: {license.note}" for name, license in known.items() if license.note]
    if unknown:
        reasons.append(f"The license of {', '.join(unknown)} is not known here.")
    if research:
        link = next((license.link for license in research.values() if license.link), None)
        return License("other", RESEARCH_STUDENT, link), reasons
    if unknown or len(set(passed_on.values())) > 1:
        return None, reasons
    if passed_on:
        license = next(iter(passed_on.values()))
        return License(license.id, license.name, license.link), reasons
    return APACHE, ["All teachers have permissive licenses.", *reasons]


def objection(chosen: License, teachers: dict[str, License | None]) -> str | None:
    """Why a student of these teachers may not have this license, in one sentence; None if it may."""
    for name, license in teachers.items():
        if license is not None and license.is_research_only and not chosen.is_research_only:
            return f"{chosen} allows commercial use, and {name} is licensed for research only ({license})"
    if chosen.is_research_only:
        return None
    for name, license in teachers.items():
        is_same = license is not None and {license.id, license.name} == {chosen.id, chosen.name}
        if license is not None and not (license.is_permissive or is_same):
            return f"the license of {name}, {license}, is passed on to what derives from it, and {chosen} is another"
    return None


def read_license(entry: dict[str, Any] | None) -> License | None:
    """The license that `dataclasses.asdict` made a dictionary of."""
    return None if entry is None else License(**entry)


def needs_copy(licenses: Iterable[License | None]) -> list[str]:
    """The names of those licenses whose text has to be passed on with a derived work."""
    return [str(one) for one in licenses if one is not None and one.name in (DINOV3.name, SAM.name, NVIDIA_OPEN.name)]


def _owner_and_name(path: str) -> str | None:
    parts = path.strip("/").split("/")
    return "/".join(parts[:2]) if len(parts) > 1 and ":" not in path else None


def _license_in_timm(checkpoint: str) -> License | None:
    try:
        import timm

        config = timm.get_pretrained_cfg(checkpoint, allow_unregistered=True)
    except (ImportError, RuntimeError, ValueError):
        return None
    name = config.license if config is not None else None
    if not name or name in ("unknown", "other"):
        return None
    return License(name) if License(name).is_permissive or License(name).is_research_only else License("other", name)

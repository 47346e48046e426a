"""`transformers-radio convert`: a checkpoint from one place and layout as a folder in another."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from transformers_radio.disk import new_folder, write_text, writing
from transformers_radio.modeling import RadioImageProcessor

from .convert import load_any, load_nvidia_checkpoint
from .export_nvidia import check_loader, write_nvidia
from .native import write_native
from .timm_layout import write_timm

SERVING = ("vllm", "sglang", "tensorrt-llm")
TARGETS = ("radio", "native", "nvidia", *SERVING, "timm")


def convert(
    source: str,
    folder: Path,
    target: str = "radio",
    adaptor_names: Sequence[str] | None = None,
    image_size: int | None = None,
    version: str | None = None,
) -> list[str]:
    """Writes the checkpoint at `source` into the new folder in the layout of `target`, whole or not at all.

    A folder that is there must be empty, and is filled; a link to one is followed.

    Args:
        source: anything `load_nvidia_checkpoint` opens; for an export also a folder of this package.
        target: "radio", this package's own layout; "native", transformers' own class; "nvidia", the Hub layout of the
            releases; a serving loader, "vllm", "sglang" or "tensorrt-llm"; or "timm".
        adaptor_names: the adaptors to take; all when missing, where the target has any.
        image_size: side in pixels for timm, whose position table is for one size; the preferred one when missing.
        version: see `load_nvidia_checkpoint`.

    Returns:
        What was done, in lines for a reader.

    Raises:
        FileExistsError: the folder has something in it.
        OSError: the source cannot be read, or the folder cannot be written.
        ValueError: the source cannot be read, the target cannot hold it, or the folder lies in the source.
    """
    if target not in TARGETS:
        raise ValueError(f"--for is {target!r}, expected one of {', '.join(TARGETS)}")
    if image_size is not None and target != "timm":
        raise ValueError(f"--image-size is for --for timm; {target} checkpoints take any size, so leave it out")
    with new_folder(folder, "DST", source) as temporary:  # before the source is read, which takes long
        if target == "radio":
            model = load_nvidia_checkpoint(source, adaptor_names, version)
        else:
            model = load_any(source, adaptor_names, version)
        write, millions = _writer(model, target, image_size), _count(model)
        with writing(folder, also=(SafetensorError,)):
            temporary.mkdir()
            lines = write(model, temporary)
            if target == "radio" and adaptor_names is None and not model.config.adaptors:
                lines.append("the teachers' heads are in the .pth.tar of a release")
            write_text(temporary / "README.md", _card(model, source, target))
    return [f"{folder}: {type(model).__name__}, {millions:.1f} M parameters, for {target}", *lines]


def _writer(model: Any, target: str, image_size: int | None) -> Callable[[Any, Path], list[str]]:
    """What writes a model into a folder for this target."""
    if target == "radio":
        return _write_own
    if target == "native":
        return write_native
    if target == "timm":
        return partial(write_timm, image_size=model.preferred_resolution if image_size is None else image_size)
    if target in SERVING:
        check_loader(model, target)
    return partial(write_nvidia, serving=target in SERVING)


def _write_own(model: Any, folder: Path) -> list[str]:
    transformers_logging.disable_progress_bar()
    model.save_pretrained(folder)
    transformers_logging.enable_progress_bar()
    side = model.preferred_resolution
    processor = RadioImageProcessor(size={"height": side, "width": side}, size_divisor=model.min_resolution_step)
    processor.save_pretrained(folder)
    return [f"adaptors: {', '.join(model.config.adaptors) or 'none'}"]


def _card(model: Any, source: str, target: str) -> str:
    """A README whose first lines the Hub reads."""
    origin = getattr(model.config, "converted_from", None) or {}
    named = origin.get("source", Path(source).name)
    lines = ["---", f"library_name: {'timm' if target == 'timm' else 'transformers'}"]
    lines += ["pipeline_tag: image-feature-extraction"]
    if "license_name" in origin:
        link = origin["license_url"]
        lines += ["license: other", f"license_name: {origin['license_name']}", f"license_link: {link}"]
    repository = named.partition(":")[0]
    if repository.count("/") == 1:
        lines.append(f"base_model: {repository}")
    lines += ["tags:", "- radio", "---", "", f"# {named}, converted", ""]
    license = origin.get("license", "the license of the source")
    lines.append(f"Converted from `{named}`{_version(origin)} with transformers_radio, for {target}.")
    lines += ["", f"License of the weights: {license}. Conversion does not change it.", ""]
    return "\n".join(lines)


def _version(origin: dict[str, Any]) -> str:
    return f" (version {origin['version']})" if origin.get("version") else ""


def _count(model: Any) -> float:
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6

"""Whether a student's folder opens in three ways, with the same outputs: what `publish` asks for."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from transformers_radio.data import one_line
from transformers_radio.evaluation.models.encoder import load_student
from transformers_radio.modeling import RadioImageProcessor

TOLERANCE = 1e-4  # of the largest value, in float32; processes may differ in threads and in the alignment of weights
LONGEST_SIDE = 256  # of the images that are compared, in pixels: enough to see a difference
PATIENCE = 1800  # seconds; a model of a billion parameters from a slow disk


def check_loaders(folder: Path) -> list[str]:
    """Opens the folder through this package, through AutoModel with its own code in a process that does not have this
    package, and through transformers' own class if it has one for this type; compares summary, features, adaptors,
    and the image processor's pixel values.

    Returns:
        The ways that were tried, and why one was not.

    Raises:
        ValueError: one of them fails, or gives other outputs.
    """
    expected = _outputs_of_package(folder)
    images = expected.pop("images")
    refusal = native_refusal(folder)
    with tempfile.TemporaryDirectory() as temporary:
        given, found = Path(temporary, "given.safetensors"), Path(temporary, "found.safetensors")
        save_file({"images": images}, given)
        script = Path(__file__).with_name("fresh_process.py").read_text(encoding="utf-8")
        has_native_class = "no" if refusal else "yes"
        command = [sys.executable, "-c", script, str(folder.resolve()), has_native_class, str(given), str(found)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(temporary, "modules"))}
        process = subprocess.run(
            command, cwd=temporary, env=environment, capture_output=True, text=True, timeout=PATIENCE
        )
        if process.returncode:
            last = [line for line in process.stderr.splitlines() if line.strip()][-1:] or ["no message"]
            raise ValueError(
                f"{folder} does not open in a process without transformers_radio: {last[0].strip()}; save the student "
                "again with save_pretrained of this version"
            )
        outputs = load_file(found)
    for name, value in outputs.items():
        _compare(folder, name, value, expected[name.removeprefix("native.")])
    lost = expected.keys() - outputs.keys()
    if lost:
        raise ValueError(f"{folder} opened with its own code lacks {', '.join(sorted(lost))}")
    native = f"transformers' own class: not tried ({refusal})" if refusal else "transformers' own class: the same"
    return ["this package: loads", "AutoModel with the folder's own code: the same", native]


def native_refusal(folder: Path) -> str | None:
    """Why transformers has no class of its own for this folder; None if it has one."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "radio":
        return f"it has none for the type {config['model_type']}"
    refusal = config.get("use_swiglu_ffn")  # RadioConfig.to_dict says it there
    return refusal.partition(":")[0] if isinstance(refusal, str) else None


def _outputs_of_package(folder: Path) -> dict[str, torch.Tensor]:
    try:
        student = load_student(str(folder)).eval()
        processor = RadioImageProcessor.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder} does not open with this package: {one_line(error)}") from error
    side = min(student.preferred_resolution, LONGEST_SIDE)
    sides = student.get_nearest_supported_resolution(side, side)
    images = torch.rand(1, student.config.num_channels, *sides, generator=torch.Generator().manual_seed(0))
    picture = Image.fromarray(numpy.arange(40 * 60 * 3, dtype=numpy.uint8).reshape(40, 60, 3))
    outputs = {"images": images, "processor": processor(picture, return_tensors="pt")["pixel_values"]}
    with torch.no_grad():
        out = student(images)
    outputs |= {"summary": out.summary, "features": out.features}
    for name, adaptor in out.adaptors.items():
        outputs |= {f"{name}.{kind}": adaptor[kind] for kind in ("summary", "features") if kind in adaptor}
    return outputs


def _compare(folder: Path, name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    same_shape = found.shape == expected.shape
    difference = float((found - expected).abs().max()) if same_shape else float("inf")
    if not difference <= TOLERANCE * float(expected.abs().max()):
        raise ValueError(
            f"{folder}: {name} of another loader differs from this package's by {difference:.3g} (shapes "
            f"{tuple(found.shape)} and {tuple(expected.shape)}): save the student again with this version"
        )

"""What an exported program returns against the student itself, in float32."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .program import Program

# largest relative error of any output, by dtype
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 8e-2, "q8": 0.25}


@dataclass
class Parity:
    """One output at one size.

    Args:
        error: |program - student| / |student|, Euclidean norms over the whole output.
        largest: Largest absolute difference.
    """

    name: str
    batch: int
    height: int
    width: int
    output: str
    error: float
    largest: float


def load_program(path: Path, format: str) -> Any:
    """A function of `pixel_values` that returns the program's outputs by name, as it runs from disk."""
    if format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]

        def run(pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
            found = session.run(names, {"pixel_values": pixel_values.numpy()})
            return {name: torch.from_numpy(array) for name, array in zip(names, found, strict=True)}

        return run
    from transformers.exporters import ExportedModel

    # OpenVINO computes in bf16 where the processor has units for it, unless it is told otherwise
    options: dict[str, Any] = {"config": {"INFERENCE_PRECISION_HINT": "f32"}} if format == "openvino" else {}
    # a torch-export is pickled; this package wrote it a moment ago
    exported = ExportedModel.from_pretrained(path, device="cpu", trust_remote_code=True, **options)
    return lambda pixel_values: dict(exported(pixel_values=pixel_values))


@torch.no_grad()
def measure_parity(student: Any, program: Any, sizes: dict[str, tuple[int, int, int]]) -> list[Parity]:
    """Compares a program with a student in float32 on random images of `sizes`, as `parity_sizes` returns them."""
    reference, rows = Program(student), []
    generator = torch.Generator().manual_seed(0)
    for name, (batch, height, width) in sizes.items():
        images = torch.rand(batch, student.config.num_channels, height, width, generator=generator)
        found, expected = program(images), reference(images)
        if found.keys() != expected.keys():
            raise ValueError(f"The program returns {', '.join(found)}, expected {', '.join(expected)}.")
        for output, tensor in expected.items():
            if found[output].shape != tensor.shape:
                raise ValueError(f"{output} has shape {tuple(found[output].shape)}, expected {tuple(tensor.shape)}.")
            difference = found[output].float() - tensor
            error = (difference.norm() / tensor.norm()).item()
            rows.append(Parity(name, batch, height, width, output, error, difference.abs().max().item()))
    return rows


def check_parity(rows: list[Parity], dtype: str) -> None:
    """Raises ValueError where a relative error is above the limit of `dtype`, or is no number."""
    limit = TOLERANCES[dtype]
    for row in rows:
        if not row.error <= limit:
            raise ValueError(
                f"{row.output} of {row.height}x{row.width} pixels differs from the student's by {row.error:.2g} "
                f"(relative), more than the {limit:g} allowed for {dtype}; the program was not kept."
            )


def format_parity(rows: list[Parity]) -> str:
    """A table, a line per size and output."""
    lines = [f"{'':10} {'images':>14}  {'output':24} {'relative error':>14} {'largest':>10}"]
    for row in rows:
        images = f"{row.batch}x{row.height}x{row.width}"
        lines.append(f"{row.name:10} {images:>14}  {row.output:24} {row.error:14.2e} {row.largest:10.2e}")
    return "\n".join(lines)

"""`transformers-radio export`: a student's folder in, a program that was compared with the student out."""

import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers_radio.disk import only_writer, remove

from .formats import check_format, program_path, write_program
from .parity import Parity, check_parity, load_program, measure_parity
from .program import executorch_sizes, open_student, parity_sizes

FILES = ("config.json", "preprocessor_config.json")  # that transformers.js reads beside onnx/


def export_student(
    folder: str,
    output: Path,
    format: str = "onnx",
    dtype: str = "fp32",
    adaptors: list[str] | None = None,
    window_size: int | None = None,
    overwrite: bool = False,
) -> tuple[Path, list[Parity]]:
    """Writes a student as a program for any batch and any sides, and compares what the file computes.

    An E-RADIO without `window_size` and a network of timm that is built for one size give programs for squares of that
    size, which is an E-RADIO's preferred resolution.
    ExecuTorch programs take one image: a ViT's any square up to about the preferred resolution, others' this one size.

    Args:
        folder: A student's folder or Hub id.
        output: Where the program goes: onnx/model*.onnx, torch-export/, executorch/ or openvino/ in it.
        format: "onnx", "torch-export", "executorch" or "openvino".
        dtype: "fp32", "fp16", "bf16", or "q8" (int8 matrix products; onnx and torch-export). Inputs and outputs are
            float32 always.
        adaptors: Adaptors to export; all for None, none for [].
        window_size: Attention windows, as `config.window_size`.
        overwrite: Replace a program that is there.

    Returns:
        The program's file or folder, and its differences from the student; none where no runtime here can run it.

    Raises:
        FileExistsError: There is a program, or another process is writing it.
        ImportError: A package is missing; the message has the command that installs it.
        ValueError: An unknown format, dtype or adaptor, or a program that differs from the student; it is deleted, and
            the one that was there stays.
    """
    check_format(format, dtype)
    path = program_path(output, format, dtype)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; pass --overwrite to replace it, or another --output.")
    student = open_student(folder, adaptors, window_size)
    with only_writer(path), _beside(path) as program:
        write_program(copy.deepcopy(student), program, format, dtype)
        rows = _compare(student, program, format, dtype)
    if format == "onnx":
        for name in FILES:
            if (Path(folder) / name).exists() and not (output / name).exists():
                shutil.copy(Path(folder) / name, output / name)
    return path, rows


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A place for the program beside `path`, where it goes when the block ends; one that is there stays until then.

    ONNX may have a second file with the weights, which the first finds by its name: both are moved, after the old ones
    have gone, so that no program ever stands beside the weights of another.
    """
    folder = path.with_name(f"{path.name}.tmp")
    remove(folder)  # of a process that was killed
    try:
        folder.mkdir(parents=True)
        yield folder / path.name
        for old in (path, path.with_name(f"{path.name}_data")):
            remove(old)
        for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):
            os.replace(file, path.with_name(file.name))
    finally:
        remove(folder)


def _compare(student: Any, path: Path, format: str, dtype: str) -> list[Parity]:
    """The program's differences from the student; none where no runtime here can run it.

    Raises:
        ValueError: The runtime cannot load it, or it differs by more than the dtype allows.
    """
    try:
        program = load_program(path, format)
    except Exception as error:
        if dtype == "bf16" and type(error).__name__ == "NotImplemented":  # onnxruntime has such kernels for GPUs only
            return []
        raise ValueError(f"The runtime of {format} cannot load the program ({error}); it was not kept.") from error
    sizes = executorch_sizes(student) if format == "executorch" else parity_sizes(student)
    rows = measure_parity(student, program, sizes)
    check_parity(rows, dtype)
    return rows

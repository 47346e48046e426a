"""`transformers-radio export`: a student's folder in, a program that was compared with the student out."""

import copy
import filecmp
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from transformers_radio.disk import check_writable, only_writer, remove, replace_whole, temporary_path, writing

from .formats import check_format, program_path, write_program
from .parity import Parity, check_parity, load_program, measure_parity
from .program import executorch_sizes, open_student, parity_sizes

FILES = ("config.json", "preprocessor_config.json")  # that transformers.js reads beside onnx/
WEIGHTS = ("*.safetensors", "*.bin")  # of a student, whose configuration is never replaced


def export_student(
    folder: str | Path,
    output: str | Path,
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
        output: Where the program goes: onnx/model*.onnx, torch-export/, executorch/ or openvino/ in it. Beside onnx/
            go the student's config.json and preprocessor_config.json, which transformers.js reads.
        format: "onnx", "torch-export", "executorch" or "openvino".
        dtype: "fp32", "fp16", "bf16", or "q8" (int8 matrix products; onnx and torch-export). Inputs and outputs are
            float32 always.
        adaptors: Adaptors to export; all for None, none for [].
        window_size: Attention windows, as `config.window_size`.
        overwrite: Replace a program that is there, and the two files of another student beside it.

    Returns:
        The program's file or folder, and its differences from the student; none where no runtime here can run it.

    Raises:
        FileExistsError: There is a program, or one of another student beside which this one cannot be, or another
            process is writing it.
        ImportError: A package is missing; the message has the command that installs it.
        OSError: There is no such student, or nothing can be written at `output`.
        ValueError: An unknown format, dtype or adaptor, or a program that differs from the student; it is deleted, and
            the one that was there stays.
    """
    check_format(format, dtype)
    folder, output = str(folder), Path(output)
    path = program_path(output, format, dtype)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; pass --overwrite to replace it, or another --output.")
    check_writable(path.parent, "--output")
    _check_weights_beside(folder, output)
    student = open_student(folder, adaptors, window_size)
    files = _files_beside(folder, output, path, overwrite) if format == "onnx" else {}
    with only_writer(path), _beside(path) as program:
        write_program(copy.deepcopy(student), program, format, dtype)
        rows = _compare(student, program, format, dtype)
    for name, file in files.items():
        with writing(output / name), replace_whole(output / name) as temporary:
            shutil.copyfile(file, temporary)
    return path, rows


def _check_weights_beside(folder: str, output: Path) -> None:
    """Raises FileExistsError if `output` holds another student's weights; its configuration may be the same."""
    if output.exists() and Path(folder).exists() and output.samefile(folder):
        return
    for file in (file for pattern in WEIGHTS for file in sorted(output.glob(pattern))):
        if not _same(file, str(Path(folder) / file.name)):
            raise FileExistsError(
                f"{file} belongs to another student than {folder}: choose another --output, or remove that student's "
                "files."
            )


def _files_beside(folder: str, output: Path, path: Path, overwrite: bool) -> dict[str, str]:
    """Which of FILES are to be copied from the student to `output`: those that are not there, or not the same.

    Raises:
        FileExistsError: One is another student's, and may not be replaced, or what else is there is that student's.
    """
    silent = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    found = {name: cached_file(folder, name, **silent) for name in FILES}
    files = {name: file for name, file in found.items() if file is not None and not _same(output / name, file)}
    other = [output / name for name in files if (output / name).exists()]
    if other:
        beside = [file for pattern in ("onnx/model*.onnx", *WEIGHTS) for file in sorted(output.glob(pattern))]
        beside += [output / name for name, file in found.items() if file is None and (output / name).exists()]
        if beside := [file for file in beside if file != path]:
            raise FileExistsError(
                f"{beside[0]} belongs to another student, as {other[0]} is not that of {folder}: choose another "
                "--output, or remove that student's files."
            )
        if not overwrite:
            raise FileExistsError(
                f"{other[0]} is not that of {folder}: choose another --output, or pass --overwrite to replace it."
            )
    return files


def _same(path: Path, file: str) -> bool:
    return path.is_file() and Path(file).is_file() and filecmp.cmp(path, file, shallow=False)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A place for the program beside `path`, where it goes when the block ends; one that is there stays until then.

    ONNX may have a second file with the weights, which the first finds by its name: both are moved, after the old ones
    have gone, so that no program ever stands beside the weights of another.
    """
    folder = temporary_path(path)
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

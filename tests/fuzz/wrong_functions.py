"""Functions that are wrong in every way that the fuzzer has to see, and right ones."""

import ctypes
import time
from pathlib import Path

import numpy as np
from isolation import RESIDENT, SOUND, Case, OtherBits


def _raise(error: BaseException):
    raise error


def _other_bits() -> str:
    raise OtherBits("two pixels differ")


def _fill_memory() -> str:
    np.ones(RESIDENT + 2**28, dtype=np.uint8)  # written to, and given back
    return SOUND


FUNCTIONS = {
    "sound": lambda: SOUND,
    "refused": lambda: _raise(ValueError("images.tar is cut off; download it again")),
    "refused, by the system": lambda: Path("/nowhere/images.tar").read_bytes(),
    "crash": lambda: ctypes.string_at(0),
    "hang": lambda: time.sleep(60),
    "memory": _fill_memory,
    "memory, asked for": lambda: bytearray(2**40),
    "raw exception": lambda: {}["image"],
    "raw exception, of a library": lambda: _raise(RuntimeError("images.tar is no tar")),
    "multi-line": lambda: _raise(ValueError("images.tar cannot be read:\n- bad header")),
    "names nothing": lambda: _raise(ValueError("bad header")),
    "other bits": _other_bits,
    "raw exception, an exit": lambda: _raise(SystemExit(1)),
}


def prepare(folder: Path) -> None:
    return None


def draw(rng: np.random.Generator, world: None, folder: Path) -> Case:
    """Each of them once, in order, whatever became of the process of the one before."""
    with (folder.parent / "drawn").open("a+b") as drawn:
        kind = [*FUNCTIONS][drawn.tell()]
        drawn.write(b".")
    return Case(kind, ("images.tar",), FUNCTIONS[kind])

"""Files that would leave a trace if the code in them ran."""

import os
import pickle
from pathlib import Path

import numpy as np
import torch


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def torch_file(path: Path, trace: Path, **content) -> Path:
    """As `torch.save` writes it; with tensors beside the code."""
    torch.save({"weight": torch.zeros(2), **content, "bomb": Bomb(trace)}, path)
    return path


def old_torch_file(path: Path, trace: Path) -> Path:
    """As torch wrote it before 1.6: pickles without a zip around them."""
    torch.save({"bomb": Bomb(trace)}, path, _use_new_zipfile_serialization=False)
    return path


def plain_pickle(path: Path, trace: Path) -> Path:
    path.write_bytes(pickle.dumps(Bomb(trace)))
    return path


def numpy_file(path: Path, trace: Path) -> Path:
    """.npy, or .npz, with objects."""
    array = np.array([Bomb(trace)], dtype=object)
    np.savez(path, array) if path.suffix == ".npz" else np.save(path, array, allow_pickle=True)
    return path

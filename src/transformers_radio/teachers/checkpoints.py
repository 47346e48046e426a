"""A teacher's `checkpoint`: where it is, what a published model says of it, and its tensors, read without its code."""

import argparse
import logging
import os
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from transformers_radio.modeling.errors_radio import naming_checkpoint, one_line

logger = logging.getLogger(__name__)

# Keys under which training scripts save a state dict beside their other state, averages before what is averaged: timm
# and DeiT, Lightning and OpenCLIP and MoCo, DeiT and MAE, DINO (its teacher is the average), DeepSpeed.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher", "student", "module")
PREFIXES = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put before every name
PACKAGE = "package:"
LOCAL = "local:"


def resolve_checkpoint(checkpoint: str) -> str:
    """The checkpoint with `~` expanded, also behind NAME:, and `package:PATH` as a path in the installed package.

    Raises:
        ValueError: for `local:NAME`, a file or folder of this name on another machine.
    """
    if checkpoint.startswith(PACKAGE):
        return str(_package() / checkpoint.removeprefix(PACKAGE))
    name, colon, path = checkpoint.rpartition(":")
    if checkpoint.startswith(LOCAL) or name.endswith(f":{LOCAL[:-1]}"):
        raise ValueError(f"{checkpoint} was on the machine that trained with it; give its path on this one")
    return f"{name}{colon}{os.path.expanduser(path)}"


def portable_checkpoint(checkpoint: str) -> str:
    """What a published model may say of its teacher's checkpoint.

    A Hub id or a name stays as it is. What the package brings is `package:PATH`; any other file or folder is
    `local:NAME`, without the folders around it, and NAME:FILE is NAME:local:FILE.
    """
    checkpoint = checkpoint.removeprefix("local-dir:")
    name, colon, path = checkpoint.rpartition(":")
    absolute = Path(path).expanduser().resolve()
    if name in ("hf-hub", PACKAGE[:-1]) or not absolute.exists():
        return checkpoint
    if absolute.is_relative_to(_package()):
        return f"{name}{colon}{PACKAGE}{absolute.relative_to(_package()).as_posix()}"
    return f"{name}{colon}{LOCAL}{absolute.name}"


def load_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Reads a state dict from safetensors or from a torch file, without ever running pickled code.

    A torch file may nest its state dict under one of `WRAPPERS`; names may begin with `PREFIXES`.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the file holds anything but tensors and plain containers.
    """
    return unwrap(read_file(path), path)


def read_file(path: str | Path) -> Any:
    """All that a weights file holds; it is read, and refused, as by `load_weights`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no weights file {path}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        with naming_checkpoint(path):
            return load_file(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the options, which many scripts save too
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise OSError(f"{path} cannot be read ({one_line(error)})") from error
    except Exception as error:  # damaged bytes make the reader of pickles raise nearly anything
        raise ValueError(unsafe_file_message(path)) from error


def unwrap(saved: Any, path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict within what a file holds, under plain names; `saved` itself when it is one."""
    outer: list[Any] = []
    while found := [key for key in WRAPPERS if isinstance(saved, dict) and isinstance(saved.get(key), dict)]:
        if any(saved is one for one in outer):
            raise ValueError(f"{path} holds a dict that contains itself, and no plain state dict (name -> tensor)")
        outer.append(saved)
        if len(found) > 1:
            logger.warning("%s: reading the weights under %r, not those under %s", path, found[0], found[1:])
        saved = saved[found[0]]
    if not isinstance(saved, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in saved.items()
    ):
        raise ValueError(f"{path} holds no plain state dict (name -> tensor), also not under {', '.join(WRAPPERS)}")
    if not saved:
        raise ValueError(f"{path} holds no weights: the state dict in it is empty; save the model again")
    while prefix := next((one for one in PREFIXES if all(name.startswith(one) for name in saved)), None):
        saved = {name.removeprefix(prefix): value for name, value in saved.items()}
    return saved


def unsafe_file_message(path: str | Path) -> str:
    return (
        f"{path} is no file of plain tensors: it is damaged, or it holds pickled objects or TorchScript, which could "
        "run code and are therefore never loaded. Save its state dict as .safetensors where you trust it, and use that"
    )


def _package() -> Path:
    return Path(str(resources.files("transformers_radio"))).resolve()

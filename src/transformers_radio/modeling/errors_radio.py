"""Errors in one line, for wrong values and for the files of a checkpoint."""

import contextlib
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

_TORCH_FILES = (".pth", ".pt", ".tar", ".ckpt")
_LONGEST_VALUE = 100
_LONGEST_MESSAGE = 1000
# what readers of JSON, safetensors, pickles and ZIP archives raise if a file is damaged or holds something else
OF_DAMAGED_FILES = (
    SafetensorError,
    StrictDataclassError,  # raised by transformers' configurations
    pickle.UnpicklingError,
    EOFError,
    StopIteration,
    LookupError,
    AttributeError,
    TypeError,
    RuntimeError,  # RecursionError included
    ArithmeticError,
    AssertionError,
)


def convert_command(source: Any) -> str:
    """How to get a checkpoint of this package from a release of NVIDIA or a file of transformers' own class."""
    return f"Convert it with `transformers-radio convert {source} FOLDER` and load that folder"


def shown(value: Any) -> str:
    """`value` for a message: in one line, cut where it is long."""
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}" if not value.is_nested else "a nested tensor"
    text = " ".join(repr(value).split())
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def one_line(error: BaseException) -> str:
    """The message of an error in one line, or the error's type if the message is empty."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyError):
        text = f"there is no {text}"
    text = (text if text.endswith("..") else text.removesuffix(".")) or type(error).__name__
    return text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]}..."


def check_kernels(source: Any, fields: Any):
    """Raises unless the fields of a config.json leave the choice of code from the Hub to the reader.

    transformers fetches and runs an attention that is called OWNER/NAME.

    Raises:
        ValueError: One of the fields, also of a configuration inside, chooses such an attention.
    """
    for name, value in fields.items() if isinstance(fields, dict) else ():
        if name.lstrip("_").startswith("attn_implementation") and "/" in str(value):
            raise ValueError(
                f"{source}: its config.json has {name} {shown(value)}, code of the Hub that would run. Remove the "
                "field, and give attn_implementation to from_pretrained if you trust that code."
            )
        check_kernels(source, value)


def check_source(owner: str, source: Any):
    """Raises unless `source` is a folder, a file or a Hub id, as text or path.

    Raises:
        ValueError: Neither text nor a path, or empty.
        FileNotFoundError: A path, and nothing is there.
    """
    if not isinstance(source, (str, os.PathLike)) or not str(source).strip():
        raise ValueError(f"{owner}: the checkpoint is {shown(source)}, expected the path of a folder or a Hub id.")
    name = os.fspath(source)
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1  # not a Hub id
    if is_path and not os.path.exists(name):
        raise FileNotFoundError(
            f"{owner}: there is no folder {name}; give an existing one, or a Hub id such as owner/name."
        )


def check_layout(owner: str, source: Any):
    """Raises ValueError for a torch file, as NVIDIA's releases are: a model opens folders and Hub ids."""
    name = str(source)
    if name.endswith(_TORCH_FILES) and os.path.isfile(name):
        raise ValueError(f"{owner}: {name} is a torch file, not a folder. {convert_command(name)}.")


@contextlib.contextmanager
def naming_checkpoint(source: Any) -> Iterator[None]:
    """Turns errors inside into a ValueError (an OSError stays one) in one line that names the checkpoint.

    Running out of memory and unknown keyword arguments are not faults of the checkpoint; these errors stay as they
    are.
    """
    try:
        yield
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{source}: a .json file in it is damaged ({one_line(error)}). Get or save the checkpoint again."
        ) from error
    except (OSError, ValueError) as error:
        message = str(error)
        if str(source).rpartition(":")[2] in message and "\n" not in message:  # the file, if the source is NAME:FILE
            raise
        kind = next(kind for kind in (FileNotFoundError, OSError, ValueError) if isinstance(error, kind))
        raise kind(f"{source}: {one_line(error)}.") from error
    except OF_DAMAGED_FILES as error:
        if isinstance(error, torch.OutOfMemoryError) or "keyword argument" in str(error):
            raise
        raise ValueError(
            f"{damaged_file(source)} cannot be read ({one_line(error)}): it is damaged, incomplete or not a "
            "checkpoint of this kind. Get or save it again."
        ) from error


def damaged_file(source: Any) -> Any:
    """The first safetensors file in the folder `source` whose header cannot be read; otherwise `source` itself."""
    for path in sorted(Path(str(source)).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError:
            return path
        except OSError:
            continue
    return source

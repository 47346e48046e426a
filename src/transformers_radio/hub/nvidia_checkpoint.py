"""Reads checkpoints in NVIDIA's layouts: their configuration, and their tensors one by one."""

import argparse
import json
import pathlib
import re
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import safe_open
from transformers.utils import logging

from transformers_radio.modeling.errors_radio import check_source, naming_checkpoint, one_line, shown

logger = logging.get_logger(__name__)

TORCH_FILES = (".pth", ".pt", ".tar", ".bin", ".ckpt")
AVERAGED, TRAINED = "state_dict_ema", "state_dict"
# parts beside the backbone, as a trainer may average the backbone alone
_PARTS = ["input_conditioner.", "_heads.", "_feature_projections.", "_feature_normalizer."]
_PARTS += ["_intermediate_feature_normalizer."]
# all that a pickle may hold besides tensors and Python's own containers
PLAIN_TYPES: list[Any] = [argparse.Namespace, types.SimpleNamespace]
PLAIN_TYPES += [
    (path, f"{module}.{path.__name__}")  # Python 3.13 writes another module than all others
    for path in (pathlib.PosixPath, pathlib.PurePosixPath)
    for module in ("pathlib", "pathlib._local")
]
# A mapped file is mapped anew when this share of it was read, and at least so many bytes: pages that were read stay in
# memory as long as the file is mapped.
_REOPEN_SHARE, _REOPEN_BYTES = 16, 16 << 20


class Tensors:
    """The tensors of a checkpoint, by name; `read` copies one of them into memory.

    shapes, dtypes: of each tensor, known without reading it.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    def read(self, name: str) -> torch.Tensor:
        raise NotImplementedError


class SafetensorsFiles(Tensors):
    """One or more safetensors files; each is opened per tensor, so that what was read does not stay mapped."""

    def __init__(self, files: list[Path]):
        self.shapes, self.dtypes = {}, {}
        self._file: dict[str, Path] = {}
        for file in files:
            with naming_checkpoint(file), safe_open(file, framework="pt") as opened:
                for name in opened.keys():
                    if name in self._file:
                        raise ValueError(
                            f"the tensor {name} is in {self._file[name].name} and in {file.name}, and it is not known "
                            "which one counts: leave one of the files in the folder"
                        )
                    entry = opened.get_slice(name)
                    self.shapes[name] = tuple(entry.get_shape())
                    self.dtypes[name] = _DTYPES.get(entry.get_dtype(), torch.uint8)
                    self._file[name] = file

    def read(self, name: str) -> torch.Tensor:
        with naming_checkpoint(self._file[name]), safe_open(self._file[name], framework="pt") as opened:
            return opened.get_tensor(name).clone()


class TorchFile(Tensors):
    """The state dict of a torch file, mapped and not loaded."""

    def __init__(self, open_state: Callable[[], dict[str, torch.Tensor]]):
        self._open, self._seen = open_state, 0
        self._state = open_state()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._state.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in self._state.items()}
        self._limit = max(sum(t.nbytes for t in self._state.values()) // _REOPEN_SHARE, _REOPEN_BYTES)

    def read(self, name: str) -> torch.Tensor:
        if self._seen > self._limit:
            self._state, self._seen = {}, 0
            self._state = self._open()
        tensor = self._state[name].clone()
        self._seen += tensor.nbytes
        return tensor


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
}


@dataclass
class Released:
    """A checkpoint as it was found.

    source: what the user named. name: of the file or repository, which may state the version.
    config: the fields of config.json; empty for a torch file.
    args: the training arguments that define the model, from the config or the torch file; None for a file in the
        layout of transformers' own class, whose config says it all.
    tensors: all tensors of the checkpoint, averages where the file has both.
    """

    source: str
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    args: dict[str, Any] | None = None
    tensors: Tensors = field(default_factory=Tensors)


def open_release(source: str | Path) -> Released:
    """Finds a checkpoint and reads everything but its tensors.

    Args:
        source: a folder with config.json and safetensors, a torch file (.pth.tar), a Hub id, or OWNER/NAME:FILE for a
            file in a Hub repository.

    Raises:
        OSError: it is not there, or cannot be read.
        ValueError: it is damaged, holds pickled objects besides plain values, or is of another kind.
    """
    check_source("convert", source)
    source = str(source)
    path = Path(source).expanduser()
    if not path.exists() and (path.suffix in TORCH_FILES or source.startswith("~")) and ":" not in source:
        raise FileNotFoundError(f"there is no file {source}; give an existing one, a folder, or a Hub id")
    if not path.exists():
        path = _download(source)
    if path.is_file() and path.suffix == ".safetensors":
        raise ValueError(f"{source} is a file of tensors without its config.json: give the folder that holds both")
    released = _open_torch_file(source, path) if path.is_file() else _open_folder(source, path)
    _refuse_merging(released)
    return released


def _download(source: str) -> Path:
    name, _, file = source.partition(":")
    try:
        if file:
            return Path(hf_hub_download(name, file))
        patterns = ["config.json", "*.safetensors", "*.safetensors.index.json"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except HFValidationError as error:
        raise FileNotFoundError(
            f"there is no folder or file {source}, and it is no Hub id (owner/name, or owner/name:FILE)"
        ) from error
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"there is no folder or file {source}, and the Hub does not give it: {one_line(error)}"
        ) from error


def _open_folder(source: str, folder: Path) -> Released:
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{source} has no config.json; give a folder with config.json and safetensors files")
    with naming_checkpoint(config_file):
        config = json.loads(config_file.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"{config_file} holds {shown(config)}, expected the fields of a configuration")
    args = config.get("args")
    if "args" in config and not isinstance(args, dict):
        raise ValueError(f"{config_file}: args is {shown(args)}, expected the arguments of the training, by name")
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    if index.is_file():
        with naming_checkpoint(index):
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / str(name) for name in names]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise FileNotFoundError(f"{source} lacks {', '.join(missing)}, which its index names; download it again")
    elif folder / "model.safetensors" in files:  # others beside it are variants, such as model.fp16.safetensors
        files = [folder / "model.safetensors"]
    if not files:
        raise FileNotFoundError(f"{source} has no safetensors file; download model.safetensors beside config.json")
    return Released(source, _name_of(source, folder), config, args, SafetensorsFiles(files))


def _open_torch_file(source: str, file: Path) -> Released:
    content = _load_plain(file)
    if not isinstance(content, dict):
        raise ValueError(f"{source} holds {type(content).__name__}, expected a dict with args and state_dict")
    key = next((key for key in (AVERAGED, TRAINED) if isinstance(content.get(key), dict)), None)
    if key is None or "args" not in content:
        found = ", ".join(map(str, list(content)[:8]))
        raise ValueError(f"{source} has no args with a state_dict or state_dict_ema; it holds {found or 'nothing'}")
    args = _plain(content["args"])
    if not isinstance(args, dict):
        raise ValueError(f"{source}: args is {shown(args)}, expected the arguments of the training, by name")
    del content
    return Released(source, file.name, {}, args, TorchFile(lambda: _state_dict(source, file, key)))


def _state_dict(source: str, file: Path, key: str) -> dict[str, torch.Tensor]:
    content = _load_plain(file)
    state = content[key]
    if not state or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()):
        raise ValueError(f"{source}: {key} holds something else than tensors by name")
    state = _unwrapped(state)
    trained = content.get(TRAINED)
    if key == AVERAGED and isinstance(trained, dict):
        trained = _unwrapped({k: v for k, v in trained.items() if isinstance(k, str) and isinstance(v, torch.Tensor)})
        absent = tuple(part for part in _PARTS if not any(name.startswith(part) for name in state))
        found = {name: tensor for name, tensor in trained.items() if name.startswith(absent)}
        if found:
            parts = [part.removesuffix(".") for part in absent if any(name.startswith(part) for name in found)]
            logger.warning_once(f"{source}: {key} lacks {', '.join(parts)}, so they come from {TRAINED}.")
        state |= found
    return state


def _unwrapped(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without what wrappers of the trained module put in front of its names."""
    while state and (
        prefix := next((one for one in ("module.", "_orig_mod.") if all(k.startswith(one) for k in state)), None)
    ):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return dict(state)


def _load_plain(file: Path) -> Any:
    """All that a torch file holds, its tensors mapped; nothing but plain types is ever built."""
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        with torch.serialization.safe_globals(PLAIN_TYPES):
            try:
                return torch.load(file, mmap=True, **options)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                return torch.load(file, **options)  # written before torch 1.6: it cannot be mapped
    except OSError as error:
        raise OSError(f"{file} cannot be read ({one_line(error)})") from error
    except Exception as error:  # damaged bytes make the reader of pickles raise nearly anything
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it holds {forbidden.group(1)}" if forbidden else "it is damaged, or no torch file"
        raise ValueError(
            f"{file} is not read: {what}. Only tensors and plain values are, as pickled objects can run code"
        ) from error


def _plain(value: Any) -> Any:
    """Namespaces as dicts, throughout."""
    if isinstance(value, (argparse.Namespace, types.SimpleNamespace)):
        value = vars(value)
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value


def _name_of(source: str, folder: Path) -> str:
    """The repository's or folder's name; a cached snapshot's folder is a hash."""
    return source if not Path(source).expanduser().exists() else folder.resolve().name


def _refuse_merging(released: Released) -> None:
    """C-RADIOv4-1D-H shortens its sequence with a block of its own, which no class here has."""
    args = released.args or {}
    words = [released.name, *(str(released.config.get(key) or "") for key in ("version", "_name_or_path"))]
    words += [str(name) for name in released.config.get("architectures") or []]
    is_1d = any(re.search(r"radio.*1d\b|radio.*1d-", word.lower()) for word in words)
    kwargs = args.get("model_kwargs")
    places = [released.config, args, kwargs if isinstance(kwargs, dict) else {}]
    fields = [key for place in places for key in place if place[key]]
    marks = [key for key in (*fields, *released.tensors.shapes) if "merg" in str(key).lower()]
    if is_1d or marks:
        raise ValueError(
            f"{released.source} is C-RADIOv4-1D-H or a relative ({marks[0] if marks else 'by its name'}): its tokens "
            "are merged, which this package does not do; convert nvidia/C-RADIOv4-H"
        )

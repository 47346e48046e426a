"""Converts released RADIO checkpoints into this package's models.

The story: `open_release` finds the files, `Weights` names their tensors and folds reparametrizations, `vit_config` or
`eradio_config` says what they are, and then one tensor at a time goes to its place.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from transformers_radio.modeling import ERadioModel, RadioModel
from transformers_radio.modeling.errors_radio import naming_checkpoint, shown

from .native import native_config, native_targets
from .nvidia_checkpoint import Released, open_release
from .nvidia_config import check_hub_fields, eradio_config, is_eradio, make_config, vit_config
from .nvidia_heads import check_versions, choose, read_adaptors, read_teachers, whole
from .nvidia_keys import Target, Weights, eradio_targets, head_target, vit_targets
from .releases import find_release, version_in

logger = logging.get_logger(__name__)


def load_nvidia_checkpoint(
    path_or_id: str | Path, adaptor_names: Sequence[str] | None = None, version: str | None = None
) -> RadioModel | ERadioModel:
    """A released RADIO, C-RADIO or E-RADIO as this package's model, in eval mode and in the dtype that is stored.

    One tensor is read at a time, so that the peak of memory is about the model itself.

    Args:
        path_or_id: a folder or Hub id with config.json and safetensors (NVIDIA's remote code, or transformers' own
            class), a `.pth.tar` file, or OWNER/NAME:FILE for a file in a Hub repository. Teacher heads are only in the
            `.pth.tar` files. Pickles are read without running code.
        adaptor_names: the adaptors to take; all when missing, none with `[]`.
        version: such as "radio_v2.5-h", where neither the config nor the name of the file says it. It decides the
            blocks with global attention when windows are used, the preferred resolution, and the license.

    Raises:
        OSError: the checkpoint is not there, or cannot be read.
        ValueError: it is damaged, of another kind, or has a tensor or setting that cannot be honored; it is named.
    """
    released = open_release(path_or_id)
    with naming_checkpoint(released.source), torch.no_grad():
        model = _convert(released, adaptor_names, version)
    return model.eval()


def _convert(released: Released, adaptor_names: Sequence[str] | None, version: str | None) -> Any:
    if version is not None and find_release(version) is None:
        raise ValueError(
            f"version is {version!r}, expected one such as radio_v2.1, radio_v2.5-h, c-radio_v4-h, e-radio_v2"
        )
    args = released.args
    if args is None:
        return _from_native(released, adaptor_names, version)
    check_hub_fields(released.config)
    version = version or released.config.get("version") or version_in(released.name)
    if version is not None and not isinstance(version, str):
        raise ValueError(f"version is {shown(version)}, expected text such as radio_v2.5-h")
    weights = Weights(released.tensors, eps=_spectral_eps(args))
    teachers = read_teachers(args)
    configs = released.config.get("adaptor_configs") or {}
    if not isinstance(configs, dict):
        raise ValueError(f"adaptor_configs is {shown(configs)}, expected settings by the names of adaptors")
    adaptors, prefixes = read_adaptors(weights, teachers, configs)
    wanted = released.config.get("adaptor_names") if adaptor_names is None else adaptor_names
    chosen = choose(adaptors, wanted.split(",") if isinstance(wanted, str) and wanted else wanted or adaptor_names)
    adaptors = {name: adaptors[name] for name in chosen}
    if adaptors:
        check_versions(args)
    prefixes = {ours: new for ours, new in prefixes.items() if new.split(".")[1] in chosen}
    eradio = is_eradio(args, weights)
    if eradio:
        fields = eradio_config(released, weights, adaptors, version)
    else:
        fields = vit_config(released, weights, teachers, adaptors, version)
    if find_release(version) is None:
        logger.warning(
            "%s does not say which release it is, so attention windows, if you use them, have 4 global blocks: "
            "give the version (--version radio_v2.5-h) if it is another layout.",
            released.source,
        )
    config = make_config({**fields, "converted_from": _origin(released, version)}, eradio)
    model_targets = eradio_targets if eradio else vit_targets
    unread = ("summary_idxs",) if eradio else ()  # its summary is the mean of the features
    state = _read(weights, lambda name: [] if name in unread else _targets(name, model_targets, prefixes))
    return _assemble(ERadioModel if eradio else RadioModel, config, state, weights)


def _from_native(released: Released, adaptor_names: Sequence[str] | None, version: str | None) -> Any:
    """A file of transformers' own class: its config says it all, the names are NVIDIA's or its own."""
    if adaptor_names:
        choose({}, adaptor_names)
    version = version or _earlier_version(released.config) or version_in(released.name)
    config = native_config(released.config, find_release(version))
    config.converted_from = _origin(released, version)
    weights = Weights(native_targets(released.tensors), eps=1e-6)
    if "summary_idxs" in weights.shapes:  # which that class goes by, whatever its configuration says
        config.summary_idxs = [
            whole(index, "summary_idxs") for index in weights.read("summary_idxs").flatten().tolist()
        ]
    state = _read(weights, lambda name: _targets(name, vit_targets, {}))
    return _assemble(RadioModel, config, state, weights)


def _spectral_eps(args: dict[str, Any]) -> float:
    setting = args.get("spectral_reparam")
    if isinstance(setting, dict):
        eps = setting.get("eps", 1e-12)
        if isinstance(eps, bool) or not isinstance(eps, (int, float)):
            raise ValueError(f"args.spectral_reparam.eps is {shown(eps)}, expected a number")
        return float(eps)
    return 1e-6


def _earlier_version(config: dict[str, Any]) -> str | None:
    """Of a release that was converted before."""
    earlier = config.get("converted_from")
    version = earlier.get("version") if isinstance(earlier, dict) else None
    return version if isinstance(version, str) else None


def _origin(released: Released, version: str | None) -> dict[str, Any]:
    earlier = released.config.get("converted_from")
    if isinstance(earlier, dict):
        return earlier
    release = find_release(version)
    license = release.license if release else {"license": "unknown: see the source"}
    source = released.source if not Path(released.source).expanduser().exists() else Path(released.source).name
    return {"source": source, "version": version, **license}


def _targets(
    name: str, model_targets: Callable[[str], list[Target] | None], prefixes: dict[str, str]
) -> list[Target] | None:
    """Where a tensor of `Weights` goes; empty if nothing reads it, None if it is unknown."""
    if name.startswith("model."):
        return model_targets(name.removeprefix("model."))
    if name.startswith("conditioner."):
        return [(f"input_{name}", 0, 1)]
    if name.startswith(("summary_head.", "feature_head.")):
        kind, key, rest = name.split(".", 2)
        new = prefixes.get(f"{kind}.{key}.")
        return [] if new is None else [(head_target(new.split(".")[1], kind, rest), 0, 1)]
    return [(name, 0, 1)]  # summary_idxs and normalizers keep their names


def _read(weights: Weights, targets: Callable[[str], list[Target] | None]) -> dict[str, torch.Tensor]:
    """All tensors by their names in the model; an unknown one is found before the first is read."""
    places = {name: targets(name) for name in weights.shapes}
    unknown = [weights.original(name) for name, found in places.items() if found is None]
    if unknown:
        raise ValueError(
            f"{len(unknown)} tensors have no place in this package's model, so the features would be wrong: "
            f"{', '.join(unknown[:4])}{', ...' if len(unknown) > 4 else ''}"
        )
    left_out = [weights.original(name) for name, found in places.items() if not found]
    if left_out:
        logger.info("Left out, as no output reads them: %s", ", ".join(left_out))
    state: dict[str, torch.Tensor] = {}
    for name, found in places.items():
        if not found:
            continue
        tensor = weights.read(name)
        for target, part, parts in found:
            if tensor.ndim and tensor.shape[0] % parts:
                raise ValueError(
                    f"{weights.original(name)} is {tuple(tensor.shape)}, which has no {parts} equal parts"
                )
            if target in state:
                raise ValueError(f"{weights.original(name)} is a second tensor for {target}")
            state[target] = tensor if parts == 1 else tensor.chunk(parts)[part].clone()
    return state


def _assemble(model_class: Any, config: Any, state: dict[str, torch.Tensor], weights: Weights) -> Any:
    """The model with these weights, each in the place and shape that the configuration gives it."""
    with torch.device("meta"):
        model = model_class(config)
    wanted = model.state_dict()
    dtype = _common_dtype(state)
    has_scale = any(key.endswith(".lambda1") for key in state)
    for name, meta in wanted.items():
        if name in state:
            continue
        if name.endswith(".lambda1") and not has_scale:
            state[name] = torch.full(meta.shape, config.layerscale_value, dtype=dtype)
        elif name == "summary_idxs":
            state[name] = torch.tensor(config.summary_idxs)
        elif name.startswith("input_conditioner."):
            values = getattr(config, name.removeprefix("input_conditioner."))
            state[name] = torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)  # (C,) -> (C, 1, 1)
        else:
            raise ValueError(f"the file lacks what becomes {name}")
    extra = [name for name in state if name not in wanted]
    if extra:
        raise ValueError(f"the file has what would become {extra[0]}, which the model of its configuration lacks")
    for name, tensor in state.items():
        if name.startswith("input_conditioner."):
            tensor = tensor.float().reshape(-1, 1, 1)  # (C,) or (C, 1, 1) -> (C, 1, 1)
        elif name == "summary_idxs":
            tensor = tensor.long().flatten()
        elif name in ("embeddings.cls_register_token",):
            tensor = tensor.reshape(-1, tensor.shape[-1])
        elif tensor.is_floating_point() and tensor.dtype != dtype:
            tensor = tensor.to(dtype)
        if tensor.is_floating_point() != wanted[name].is_floating_point():
            raise ValueError(f"what becomes {name} is {tensor.dtype}, expected {wanted[name].dtype}")
        if tensor.shape != wanted[name].shape:
            raise ValueError(
                f"what becomes {name} has shape {tuple(tensor.shape)}, expected {tuple(wanted[name].shape)}"
            )
        state[name] = tensor
    model.load_state_dict(state, assign=True)
    config.dtype = dtype
    _check_finite(model)
    return model


def _common_dtype(state: dict[str, torch.Tensor]) -> torch.dtype:
    """The dtype of the weights, the widest where they differ: no value is rounded."""
    found = {t.dtype for name, t in state.items() if t.is_floating_point() and not name.startswith("input_cond")}
    dtype = torch.float32 if len(found) > 1 else next(iter(found), torch.float32)
    strange = [str(one) for one in found if one not in {torch.float32, torch.float16, torch.bfloat16}]
    if strange:
        raise ValueError(f"there are weights in {strange[0]}, expected float32, bfloat16 or float16")
    return dtype


def _check_finite(model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.stack(torch.aminmax(tensor)).isfinite().all():  # one pass, no copy
            raise ValueError(f"what becomes {name} holds NaN or infinite values: the file is damaged")


def load_any(
    path_or_id: str | Path, adaptor_names: Sequence[str] | None = None, version: str | None = None
) -> RadioModel | ERadioModel:
    """As `load_nvidia_checkpoint`, and also a checkpoint of this package's RADIO or E-RADIO.

    Raises:
        OSError, ValueError: as there.
    """
    released = open_release(path_or_id)
    kind = released.config.get("model_type")
    if released.args is None and (kind == ERadioModel.config_class.model_type or "adaptors" in released.config):
        if kind not in ("radio", "eradio"):
            raise ValueError(f"{path_or_id} is a {kind}; only RADIO and E-RADIO students are converted")
        if version is not None:
            raise ValueError(
                f"version {version!r} is for NVIDIA's releases, and {path_or_id} is a student: leave it out"
            )
        student: Any = (RadioModel if kind == "radio" else ERadioModel).from_pretrained(path_or_id)
        names = list(student.config.adaptors) if adaptor_names is None else list(adaptor_names)
        return student.with_adaptors(names).eval()
    return load_nvidia_checkpoint(path_or_id, adaptor_names, version)

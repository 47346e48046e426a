"""Files of transformers' own RADIO class, whose names on disk are NVIDIA's or its own."""

import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import PreTrainedConfig
from transformers import RadioConfig as NativeRadioConfig

from transformers_radio.modeling import RadioConfig
from transformers_radio.modeling.errors_radio import shown

from .nvidia_checkpoint import Tensors
from .releases import Release

# transformers' own names -> NVIDIA's, for the names that are not alike
_TO_NVIDIA = [
    (r"embeddings\.patch_projection\.", "patch_generator.embedder."),
    (r"embeddings\.position_embedding", "patch_generator.pos_embed"),
    (r"embeddings\.cls_register_token", "patch_generator.cls_token.token"),
    (r"encoder\.layer\.", "blocks."),
]
_LEFT_OUT = ("adaptors.", "intermediate_normalizer.")
# what the class does not know and keeps; windows are this package's, which a way there and back must not lose
_WINDOWS = {"window_num_global": 4, "window_num_windowed": None, "window_prefix": "bypass"}
_OWN = {"preferred_resolution", "version", "auto_map", "torch_dtype", "_name_or_path", "converted_from", *_WINDOWS}


def native_config(written: dict[str, Any], release: Release | None) -> Any:
    """The [`RadioConfig`] of a native config.json; `release` says what that class has no field for.

    Raises:
        ValueError: another type of model, a checkpoint of this package, or a field that nothing here honors.
    """
    if written.get("model_type") != NativeRadioConfig.model_type:
        raise ValueError(
            f"model_type is {shown(written.get('model_type'))} and there are no args, so this is neither a release of "
            "NVIDIA nor a RADIO of transformers"
        )
    if "adaptors" in written:
        raise ValueError("it is a checkpoint of this package already: RadioModel.from_pretrained opens it")
    known = {*NativeRadioConfig().to_dict(), *PreTrainedConfig().to_dict(), *_OWN}
    unknown = sorted(key for key in written if key not in known and written[key] not in (None, {}, []))
    if unknown:
        raise ValueError(f"the config's field {unknown[0]} is {shown(written[unknown[0]])}: it is not known here")
    fields = {key: value for key, value in written.items() if key not in ("architectures", "auto_map", "version")}
    side = fields.get("preferred_resolution")
    if isinstance(side, (list, tuple)):
        if len(set(side)) != 1:
            raise ValueError(f"preferred_resolution is {shown(side)}, expected a square")
        fields["preferred_resolution"] = side[0]
    if fields.get("preferred_resolution") is None:
        fields.pop("preferred_resolution", None)
        patch, largest = fields.get("patch_size", 16), fields.get("max_img_size", 2048)
        best = release.preferred if release else 512  # the size of C-RADIOv4
        fields["preferred_resolution"] = max(min(best, largest) // patch, 1) * patch
    return RadioConfig.from_dict({**((release.windows or {}) if release else {}), **fields})


class _Renamed(Tensors):
    def __init__(self, tensors: Tensors, names: dict[str, str]):
        self._tensors, self._names = tensors, names
        self.shapes = {new: tensors.shapes[old] for new, old in names.items()}
        self.dtypes = {new: tensors.dtypes[old] for new, old in names.items()}

    def read(self, name: str):
        return self._tensors.read(self._names[name])


def native_targets(tensors: Tensors) -> Tensors:
    """The same tensors under NVIDIA's Hub names; unchanged if they have these already."""
    if any(name.startswith("radio_model.") for name in tensors.shapes):
        return tensors
    names = {}
    for name in tensors.shapes:
        new = name
        for pattern, replacement in _TO_NVIDIA:
            new = re.sub(f"^{pattern}", replacement, new)
        is_model = new != name or name.startswith("blocks.")
        names[f"radio_model.{'model.' if is_model else ''}{new}"] = name
    return _Renamed(tensors, names)


def write_native(model: Any, folder: Path) -> list[str]:
    """Writes a student for transformers' own class: its backbone, which that class computes bit for bit.

    Returns:
        What was left out, in lines for a reader.

    Raises:
        ValueError: that class would compute something else; the fields are named.
    """
    config = model.config
    if not isinstance(config, RadioConfig):
        raise ValueError(f"transformers has no {type(model).__name__}; only a RADIO ViT can be written for it")
    if isinstance(refusal := config.to_dict()["use_swiglu_ffn"], str):
        fields = refusal.partition(": load it")[0]
        raise ValueError(f"{fields}: leave --for out, then AutoModel opens it with trust_remote_code=True")
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(_LEFT_OUT)}
    written = NativeRadioConfig(**{name: getattr(config, name) for name in _native_fields()})
    written.architectures, written.dtype = ["RadioModel"], model.dtype
    written.preferred_resolution, written.converted_from = config.preferred_resolution, config.converted_from
    for name, default in _WINDOWS.items():
        if getattr(config, name) != default:
            setattr(written, name, getattr(config, name))
    written.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    left_out = [f"adaptor {name}" for name in config.adaptors]
    left_out += ["the normalizer of intermediate features"] if config.intermediate_normalizer else []
    return [f"left out, as the class has no place for it: {', '.join(left_out)}"] if left_out else []


def _native_fields() -> list[str]:
    general = PreTrainedConfig().to_dict()
    derived = ("model_type", "patch_dim", "video_patch_dim", "video_temporal_patch_size")
    return [name for name in NativeRadioConfig().to_dict() if name not in general and name not in derived]

"""What each field of a RADIO configuration may hold, and the class that checks it."""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin

from .errors_radio import (
    check_kernels,
    check_layout,
    check_source,
    convert_command,
    naming_checkpoint,
    one_line,
    shown,
)

_LARGEST = 65536  # width or side: a mistyped number must not take all memory
_DEEPEST = 1000
_STUDENTS = ("radio", "eradio", "radio_timm")
_MODEL_TYPES = (*_STUDENTS, "radio_backbone", "radio_pyramid", "radio_vision_tower")
_Check = tuple[Callable[[Any], bool], str]


def is_integer(value: Any, smallest: int = 0, largest: int = _LARGEST) -> bool:
    """Whether `value` is an integer in this range; not a boolean, which Python counts among the integers."""
    return isinstance(value, int) and not isinstance(value, bool) and smallest <= value <= largest


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _integer(smallest: int, largest: int = _LARGEST) -> _Check:
    return lambda value: is_integer(value, smallest, largest), f"an integer from {smallest} to {largest}"


def _number(smallest: float, largest: float) -> _Check:
    return lambda value: is_number(value) and smallest <= value <= largest, f"a number from {smallest} to {largest}"


def _share() -> _Check:
    return lambda value: is_number(value) and 0 <= value < 1, "a number in [0, 1)"


def _choice(*choices: str) -> _Check:
    return lambda value: isinstance(value, str) and value in choices, f"one of {', '.join(choices)}"


def _list(is_item: Callable[[Any], bool], expected: str) -> _Check:
    return lambda value: isinstance(value, (list, tuple)) and all(map(is_item, value)), f"a list of {expected}"


def _optional(check: _Check) -> _Check:
    return lambda value: value is None or check[0](value), f"{check[1]}, or None"


def _is_dtype(value: Any) -> bool:
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


def _is_label_map(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(label, str) and (is_integer(key, -_LARGEST) or isinstance(key, str) and key.isdecimal())
        for key, label in value.items()
    )


_STAGES = (
    lambda value: isinstance(value, list) and len(value) > 0 and all(isinstance(name, str) for name in value),
    "a non-empty list of names of stages",
)
_INDICES = (
    lambda value: isinstance(value, (list, tuple)) and len(value) > 0 and all(is_integer(i, -_DEEPEST) for i in value),
    "a non-empty list of integers",
)
_BOOLEAN: _Check = (lambda value: isinstance(value, bool), "true or false")

FIELDS: dict[str, _Check] = {
    "hidden_size": _integer(1),
    # of E-RADIO
    "embed_dim": _integer(2, 8192),
    "stem_channels": _integer(1),
    "depths": _list(lambda depth: is_integer(depth, 1, _DEEPEST), "positive integers"),
    "num_heads": _list(lambda heads: is_integer(heads, 1), "positive integers"),
    "pre_convolution": _BOOLEAN,
    "neck": _optional(_choice("pixel_shuffle", "depthwise")),
    "max_window_size": _integer(1, 256),
    "num_hidden_layers": _integer(1, _DEEPEST),
    "num_attention_heads": _integer(1),
    "num_channels": _integer(1, 1024),
    "patch_size": _integer(1, 1024),
    "image_size": _optional(_integer(1)),
    "max_img_size": _integer(1),
    "preferred_resolution": _optional(_integer(1)),
    "num_cls_tokens": _integer(0, 1024),
    "num_registers": _integer(0, 1024),
    "num_labels": _optional(_integer(0, 1_000_000)),
    "summary_idxs": _optional(_list(is_integer, "CLS tokens, integers from 0 on")),
    "window_size": _optional(_integer(0)),
    "timm_model": (lambda value: isinstance(value, str) and len(value) > 0, "the name of a network of timm"),
    "model_args": (
        lambda value: isinstance(value, dict) and all(isinstance(name, str) for name in value),
        "a dict of arguments of timm.create_model",
    ),
    "feature_stride": _optional(_integer(1, 1024)),
    "summary_size": _integer(1),
    "window_num_global": _integer(1),
    "window_num_windowed": _optional(_integer(0)),
    "train_window_sizes": _optional(_list(lambda size: is_integer(size, 1), "integers, positive numbers of patches")),
    "mlp_ratio": _number(1e-3, 64),
    "layer_norm_eps": _number(0, 0.1),
    "initializer_range": _number(0, 100),
    "layerscale_value": _number(-1e4, 1e4),
    "attention_probs_dropout_prob": _number(0, 1),
    "hidden_dropout_prob": _number(0, 1),
    "drop_path_rate": _share(),
    "pos_dropout": _share(),
    "train_window_probability": _number(0, 1),
    "cpe_scale": _list(is_number, "two numbers"),
    "norm_mean": _list(is_number, "numbers, one for each channel"),
    "norm_std": _list(lambda std: is_number(std) and std > 0, "positive numbers, one for each channel"),
    "summary_type": _choice("cls", "mean"),
    "window_prefix": _choice("bypass", "average"),
    "hidden_act": _choice(*ACT2FN),
    "qkv_bias": _BOOLEAN,
    "final_norm": _BOOLEAN,
    "mlp_norm": _BOOLEAN,
    "use_swiglu_ffn": _BOOLEAN,
    "patch_bias": _BOOLEAN,
    "feature_normalizer": _BOOLEAN,
    "intermediate_normalizer": _optional(_choice("shared", "per_layer")),
    "converted_from": _optional((lambda value: isinstance(value, dict), "a dict of source, version and license")),
    "cpe_sampling": _BOOLEAN,
    "reshape_hidden_states": _BOOLEAN,
    "strides": _list(lambda stride: is_integer(stride, 1), "strides in pixels, positive integers"),
    "pyramid_size": _integer(1),
    "out_features": _optional(_STAGES),
    "out_indices": _optional(_INDICES),
    "output_attentions": _optional(_BOOLEAN),
    "adaptors": (
        lambda value: isinstance(value, dict) and all(isinstance(adaptor, dict) for adaptor in value.values()),
        "a dict of adaptors by name, each a dict",
    ),
    # fields of every configuration of transformers, which does not check them
    "id2label": _optional((_is_label_map, "a dict of names by number")),
    "label2id": _optional((lambda value: isinstance(value, dict), "a dict of numbers by name")),
    "problem_type": _optional(_choice("regression", "single_label_classification", "multi_label_classification")),
    "architectures": _optional(_list(lambda name: isinstance(name, str), "names of classes")),
    "output_hidden_states": _optional(_BOOLEAN),
    "return_dict": _optional(_BOOLEAN),
    "is_encoder_decoder": _BOOLEAN,
    "chunk_size_feed_forward": _integer(0),
    "transformers_version": _optional((lambda value: isinstance(value, str), "text")),
    "dtype": _optional((_is_dtype, "a floating point type of torch such as float32")),
}
# transformers' own class takes no integers for these
_FLOATS = (
    "mlp_ratio",
    "layer_norm_eps",
    "initializer_range",
    "layerscale_value",
    "attention_probs_dropout_prob",
    "hidden_dropout_prob",
    "drop_path_rate",
)


_ADAPTOR_REQUIRED = ("summary_dim", "feature_dim", "hidden_dim")
_ADAPTOR_OPTIONAL = {
    "summary_token": 0,
    "teacher": "",
    "teacher_weights": "",
    "mlp_version": "v2",
    "mlp_num_inner": 0,
    "spatial_mlp_version": None,
    "upsample_factor": 1,
    "mlp_pre_norm": False,
}
_ADAPTOR_SIZES = {
    "summary_dim": (1, 65536),
    "feature_dim": (1, 65536),
    "hidden_dim": (1, 65536),
    "mlp_num_inner": (0, 100),
    "upsample_factor": (1, 64),
}


def complete_adaptors(owner: str, adaptors: dict[str, dict[str, Any]], tokens: int) -> dict[str, dict[str, Any]]:
    """The field `adaptors` of a student's configuration with all keys, those left out at their defaults.

    Args:
        owner: name of the configuration's class, for messages.
        tokens: summary tokens that a head can choose from.

    Raises:
        ValueError: A name that cannot be part of a weight's name, a missing or unknown key, a value out of range.
    """
    adaptors = {name: {**_ADAPTOR_OPTIONAL, **adaptor} for name, adaptor in adaptors.items()}
    for name, adaptor in adaptors.items():
        _check_adaptor(f"{owner}: adaptor {shown(name)}", name, adaptor, tokens)
    return adaptors


def _check_adaptor(where: str, name: str, adaptor: dict[str, Any], tokens: int):
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"{where}: use letters, digits, `_` and `-` only, the name is part of the weights' keys.")
    if hasattr(nn.ModuleDict(), name):  # where the model keeps its adaptors
        raise ValueError(f"{where}: torch's ModuleDict has an attribute of this name; choose another one.")
    missing = [key for key in _ADAPTOR_REQUIRED if key not in adaptor]
    unknown = sorted(set(adaptor) - set(_ADAPTOR_REQUIRED) - set(_ADAPTOR_OPTIONAL))
    if missing or unknown:
        allowed = [*_ADAPTOR_REQUIRED, *_ADAPTOR_OPTIONAL]
        raise ValueError(f"{where}: missing keys {missing}, unknown keys {unknown}; the keys are {allowed}.")
    if adaptor["summary_dim"] is None and adaptor["feature_dim"] is None:
        raise ValueError(f"{where}: summary_dim and feature_dim are both None, give at least one.")
    for key, (smallest, largest) in _ADAPTOR_SIZES.items():
        value = adaptor[key]
        if value is None and key in ("summary_dim", "feature_dim"):
            continue
        if not is_integer(value, smallest, largest):
            raise ValueError(f"{where}: {key} is {shown(value)}, expected an integer from {smallest} to {largest}.")
    token = adaptor["summary_token"]
    if not is_integer(token, 0, max(tokens, 1) - 1):
        raise ValueError(
            f"{where}: summary_token is {shown(token)}, but the summary has {tokens} token(s), from 0 on."
        )
    for key in ("teacher", "teacher_weights"):
        if not isinstance(adaptor[key], str):
            raise ValueError(f"{where}: {key} is {shown(adaptor[key])}, expected text.")
    if not isinstance(adaptor["mlp_pre_norm"], bool) or (adaptor["mlp_pre_norm"] and adaptor["mlp_version"] != "v2"):
        raise ValueError(
            f'{where}: mlp_pre_norm is {shown(adaptor["mlp_pre_norm"])}, expected true or false; only "v2" has it.'
        )
    if adaptor["mlp_version"] not in ("v1", "v2"):
        raise ValueError(f'{where}: mlp_version is {shown(adaptor["mlp_version"])}, expected "v1" or "v2".')
    if adaptor["spatial_mlp_version"] not in (None, "v1", "v2", "attn"):
        version = adaptor["spatial_mlp_version"]
        raise ValueError(f'{where}: spatial_mlp_version is {shown(version)}, expected "v1", "v2", "attn" or None.')


class CheckedConfigMixin:
    """First base of a configuration: setting a field to a wrong type or out of its range raises a ValueError.

    `@strict`, with which transformers' own classes check types, raises an error of two lines, not a ValueError.
    """

    def __setattr__(self, name: str, value: Any):
        public = name.removeprefix("_")  # a backbone keeps its stages as _out_features and _out_indices
        is_right, expected = FIELDS.get(public, (None, ""))
        if is_right is not None and not is_right(value):
            raise ValueError(f"{type(self).__name__}: {public} is {shown(value)}, expected {expected}.")
        if name in _FLOATS:
            value = float(value)
        elif name in ("norm_mean", "norm_std"):
            value = [float(number) for number in value]
        if callable(getattr(type(self), name, None)):
            raise ValueError(f"{type(self).__name__} has no field {name}: it is a method; leave it out.")
        try:
            super().__setattr__(name, value)
        except StrictDataclassError as error:
            kind = self.__dataclass_fields__[name].type  # type: ignore[attr-defined]
            expected = kind.__name__ if isinstance(kind, type) else kind
            raise ValueError(f"{type(self).__name__}: {name} is {shown(value)}, expected {expected}.") from error
        except AttributeError as error:
            raise ValueError(f"{type(self).__name__}: {name} follows from other fields; leave it out.") from error

    def validate(self):
        """Check what concerns several fields; building a model and saving call this."""
        try:
            super().validate()  # type: ignore[misc]
        except StrictDataclassError as error:
            raise ValueError(f"{type(self).__name__}: {one_line(error.__cause__ or error)}.") from error

    @classmethod
    def adopt(cls, config: Any) -> Any:
        """`config` itself if it is of this type.

        Raises:
            ValueError: The configuration of another kind of model.
        """
        # not by isinstance: as remote code, one file may be imported more than once
        if getattr(config, "model_type", None) != cls.model_type:  # type: ignore[attr-defined]
            raise ValueError(
                f"expected a {cls.__name__}, got a {type(config).__name__}; load it with {cls.__name__}"
                ".from_pretrained(folder), or AutoConfig.from_pretrained(folder, trust_remote_code=True)."
            )
        return config

    @classmethod
    def check_known(cls, names: Iterable[str]):
        """ValueError unless all are fields: the constructor would keep others as attributes that nothing reads."""
        own = {one.name for one in fields(cls) if not one.name.startswith("_")}  # type: ignore[arg-type]
        known = own | {"num_labels", "attn_implementation"}
        unknown = sorted(set(names) - known)
        if unknown:
            raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}.")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As in transformers.

        Raises:
            ValueError: `config_dict` is not a dict of fields, or a field is out of range.
        """
        if not isinstance(config_dict, dict) or not all(isinstance(name, str) for name in config_dict):
            raise ValueError(f"{cls.__name__}: the configuration is {shown(config_dict)}, expected a dict of fields.")
        kind, mine = config_dict.get("model_type", _STUDENTS[0]), cls.model_type  # type: ignore[attr-defined]
        if kind not in _MODEL_TYPES:
            raise ValueError(
                f"{cls.__name__}: model_type is {shown(kind)}, expected one of {', '.join(_MODEL_TYPES)}."
            )
        if "model_type" in config_dict and kind != mine and ({kind, mine} & set(_STUDENTS[1:])):
            students = {"radio": "RadioModel", "eradio": "ERadioModel", "radio_timm": "RadioTimmModel"}
            raise ValueError(
                f"{cls.__name__}: model_type is {shown(kind)}, expected {shown(mine)}: another model. AutoModel with "
                f"trust_remote_code=True opens it, as does {students.get(kind, 'its own class')}."
            )
        try:
            made = super().from_dict(config_dict, **kwargs)  # type: ignore[misc]
        except (AttributeError, TypeError, KeyError) as error:  # e.g. about fields that transformers reads itself
            raise ValueError(f"{cls.__name__}: the configuration cannot be read ({one_line(error)}).") from error
        (made[0] if isinstance(made, tuple) else made).validate()  # keyword arguments were set after construction
        return made

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in transformers.

        Raises:
            OSError: There is no configuration, or it is not JSON.
            ValueError: The configuration of another kind of model, or a field is out of range.
        """
        check_source(cls.__name__, pretrained_model_name_or_path)
        check_layout(cls.__name__, pretrained_model_name_or_path)
        with naming_checkpoint(pretrained_model_name_or_path):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        if not config_dict:  # transformers would take its defaults, which describe another model
            raise FileNotFoundError(
                f"{pretrained_model_name_or_path} has no config.json, or an empty one; give a saved model's folder."
            )
        check_kernels(pretrained_model_name_or_path, config_dict)
        if isinstance(config_dict, dict) and isinstance(config_dict.get("args"), dict):
            raise ValueError(
                f"{cls.__name__}: {pretrained_model_name_or_path} has the layout of NVIDIA's releases. "
                f"{convert_command(pretrained_model_name_or_path)}."
            )
        return config_dict, kwargs


class StagesConfigMixin(BackboneConfigMixin):
    """First base of a configuration with a choice of feature maps, by `out_features` or `out_indices`."""

    def __post_init__(self, **kwargs):
        self.stage_names = self._stages()
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        super().__post_init__(**kwargs)  # type: ignore[misc]

    def set_output_features_output_indices(self, out_features: list[str] | None, out_indices: list[int] | None):
        """As in transformers, which would count an index below the first stage as another one."""
        self._out_features, self._out_indices = out_features, out_indices  # checks the types
        count = len(self.stage_names)
        if any(not -count <= index < count for index in out_indices or []):
            raise ValueError(
                f"{type(self).__name__}: out_indices is {shown(out_indices)}, expected indices into the {count} "
                f"stages {shown(self.stage_names)}."
            )
        super().set_output_features_output_indices(out_features, out_indices)

    def validate(self):
        """Check what concerns several fields; models do it before they are built, and saving does."""
        super().validate()  # type: ignore[misc]
        if self.stage_names != self._stages():
            raise ValueError(
                f"{type(self).__name__}: stage_names is {shown(self.stage_names)}, but the other fields (neck, "
                f"num_hidden_layers, ...) describe {shown(self._stages())}. Leave stage_names out, and pass no field "
                "to from_pretrained that decides the stages of a saved model."
            )

    def _stages(self) -> list[str]:
        """The names of all feature maps, in order."""
        raise NotImplementedError


class PartConfigMixin:
    """Base of a backbone's or tower's configuration: reads a student's folder, and remembers it until it is saved."""

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        if config_dict.get("model_type") in _STUDENTS:
            config_dict = cls._from_student(config_dict)
        config_dict["name_or_path"] = str(pretrained_model_name_or_path)  # for the warning about missing weights
        return config_dict, kwargs

    @classmethod
    def _from_student(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        """The fields of this configuration for the student with the fields `config_dict`."""
        raise NotImplementedError

    def to_dict(self):
        """As in transformers, without the folder that it was read from: a saved model has weights of its own."""
        output = super().to_dict()  # type: ignore[misc]
        output.pop("_name_or_path", None)
        return output

"""The teachers' heads of a release as entries of `config.adaptors`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers_radio.modeling.errors_radio import shown

from .nvidia_keys import Weights
from .releases import teacher_of

_KINDS = ("summary_head", "feature_head")
_VERSIONS = ("v1", "v2", "attn")


def whole(value: Any, name: str) -> int:
    """A setting that counts something.

    Raises:
        ValueError: it is no whole number; `name` says where it stands.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or int(value) != value:
        raise ValueError(f"{name} is {shown(value)}, expected a whole number")
    return int(value)


@dataclass
class Teachers:
    """The teachers of a release, each name once.

    entries: name -> its first entry of `args.teachers`.
    indices: name -> its place in `args.teachers`.
    tokens: name -> the CLS token that its summary head reads.
    num_tokens: CLS tokens; None where the arguments name no teachers.
    num_listed: entries of `args.teachers`.
    """

    entries: dict[str, dict[str, Any]]
    indices: dict[str, int]
    tokens: dict[str, int]
    num_tokens: int | None
    num_listed: int

    @property
    def summary_idxs(self) -> list[int]:
        """CLS tokens that make the summary: those of teachers with `use_summary`, which is the default."""
        used = [self.tokens[name] for name, entry in self.entries.items() if entry.get("use_summary", True)]
        return list(dict.fromkeys(used))


def read_teachers(args: dict[str, Any]) -> Teachers:
    """The teachers in the arguments of a training.

    Raises:
        ValueError: a teacher without a name, or CLS tokens that cannot be told.
    """
    listed = args.get("teachers") or []
    listed = listed if isinstance(listed, list) else [listed]
    entries: dict[str, dict[str, Any]] = {}
    indices: dict[str, int] = {}
    for index, entry in enumerate(listed):
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise ValueError(f"args.teachers[{index}] is {shown(entry)}, expected a teacher with a name")
        if entry["name"] not in entries:  # another one of this name is the same teacher at another resolution
            entries[entry["name"]], indices[entry["name"]] = entry, index
    per_teacher = bool(args.get("cls_token_per_teacher"))
    tokens: dict[str, int] = {}
    for place, name in enumerate(entries):
        slot = entries[name].get("token_slot")
        if not per_teacher:
            tokens[name] = 0
        elif slot is not None:
            tokens[name] = whole(slot, f"token_slot of {name}")
        elif indices[name] != place and indices[name] < len(entries) and entries[name].get("use_summary", True):
            raise ValueError(
                f"args.teachers repeats names before {name} and gives it no token_slot, so its CLS token is not known"
            )
        else:
            tokens[name] = place
    num_tokens = (len(entries) if per_teacher else 1) if entries else None
    return Teachers(entries, indices, tokens, num_tokens, len(listed))


def read_adaptors(
    weights: Weights, teachers: Teachers, configs: dict[str, Any]
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The heads that the file has.

    Args:
        configs: `adaptor_configs` of the Hub's config.json.

    Returns:
        The field `adaptors`, and prefix of the heads' tensors in `weights` -> prefix in the model. Heads that no
        output reads (a summary head of a teacher without `use_summary`, a repeated teacher's) are in neither.

    Raises:
        ValueError: heads of an unknown kind or of no teacher, or settings that do not fit them.
    """
    found: dict[str, dict[str, str]] = {}
    prefixes: dict[str, str] = {}
    keys = sorted({tuple(name.split(".")[:2]) for name in weights.shapes if name.startswith(_KINDS)})
    for kind, key in keys:
        name = _teacher_name(key, teachers, configs)
        if name is None:  # a repeated teacher, whose first head is the one that is read
            continue
        entry = {**teachers.entries.get(name, {}), **_settings(name, configs.get(name))}
        if kind == "summary_head" and not entry.get("use_summary", True):
            continue  # there because a loader builds it, and trained by nothing
        if kind in found.setdefault(name, {}):
            raise ValueError(f"{kind} of teacher {name} is in the file by its index and by its name")
        found[name][kind] = f"{kind}.{key}."
        prefixes[f"{kind}.{key}."] = f"adaptors.{name}.{kind}."
    adaptors = {}
    for name in sorted(found, key=lambda one: teachers.indices.get(one, len(teachers.indices))):
        entry = {**teachers.entries.get(name, {}), **_settings(name, configs.get(name))}
        heads = {kind: _describe(weights, prefix) for kind, prefix in found[name].items()}
        index = entry.get("head_idx")
        token = teachers.tokens.get(name, 0) if index is None else whole(index, f"head_idx of {name}")
        adaptors[name] = _entry(name, heads, entry, token)
        adaptors[name]["teacher"] = teacher_of(name, entry)
    return adaptors, prefixes


def choose(adaptors: dict[str, Any], names: Sequence[str] | None) -> list[str]:
    """The adaptors to take: all for None.

    Raises:
        ValueError: a name that is not an adaptor of the file.
    """
    if names is None:
        return list(adaptors)
    is_list = isinstance(names, (list, tuple))
    if not is_list or any(name not in adaptors for name in names):
        raise ValueError(
            f"adaptor_names is {shown(names)}, expected a list out of {list(adaptors)}"
            + ("" if adaptors else ": this file has no heads; they are in the .pth.tar of the release")
        )
    return list(dict.fromkeys(names))


def check_versions(args: dict[str, Any]) -> None:
    """Raises ValueError for a version of the heads that is not known, though their tensors may have known names."""
    for key in ("mlp_version", "spatial_mlp_version"):
        if args.get(key) not in (None, "", *_VERSIONS):
            raise ValueError(
                f"args.{key} is {shown(args[key])}, expected one of {', '.join(_VERSIONS)}; adaptor_names=[] converts "
                "the backbone alone"
            )


def _teacher_name(key: str, teachers: Teachers, configs: dict[str, Any]) -> str | None:
    """The teacher of heads that are stored under an index or a name; None for one that repeats another."""
    if key in teachers.entries or key in configs:
        return key
    if key.isdecimal():
        for name, index in teachers.indices.items():
            if index == int(key):
                return name
        if int(key) < teachers.num_listed:
            return None
    raise ValueError(f"the file has heads of {key!r}, which is none of args.teachers ({', '.join(teachers.entries)})")


_SETTINGS = {"type", "model", "pretrained", "head_idx", "name", "use_summary", "token_slot", "mlp_version"}
_SETTINGS |= {"spatial_mlp_version", "fd_upsample_factor", "fd_normalize", "mlp_hidden_size", "mlp_num_inner"}
_SETTINGS |= {"input_size", "vitdet_window_size", "amp", "dtype"}


def _settings(name: str, settings: Any) -> dict[str, Any]:
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ValueError(f"adaptor_configs.{name} is {shown(settings)}, expected settings by name")
    unknown = sorted(set(settings) - _SETTINGS)
    if unknown:
        raise ValueError(f"adaptor_configs.{name}.{unknown[0]} is {shown(settings[unknown[0]])}: it is not known here")
    return settings


def _describe(weights: Weights, prefix: str) -> dict[str, Any]:
    """Version and sizes of one head, from its tensors."""
    shapes = {key.removeprefix(prefix): shape for key, shape in weights.shapes.items() if key.startswith(prefix)}
    where = weights.original(prefix + min(shapes))
    if "blocks.0.attn.qkv.weight" in shapes and "mlp.fc1.weight" in shapes:
        version, first, last, inner = "attn", "mlp.fc1.weight", "mlp.final.2.weight", 0
        blocks = {key.split(".")[1] for key in shapes if key.startswith("blocks.")}
        if blocks != {"0", "1"} or any(key.startswith("mlp.blocks.") for key in shapes):
            raise ValueError(
                f"the head of {where} has {len(blocks)} attention blocks or inner blocks behind; expected 2"
            )
    elif "final.2.weight" in shapes:
        version, first, last = "v2", "fc1.weight", "final.2.weight"
        inner = len([key for key in shapes if re.fullmatch(r"blocks\.\d+\.0\.weight", key)])
    elif "fc2.weight" in shapes:
        version, first, last = "v1", "fc1.weight", "fc2.weight"
        inner = len([key for key, shape in shapes.items() if key.startswith("inner.") and len(shape) == 2])
    else:
        raise ValueError(f"the head of {where} is of no known kind (v1, v2 or attn)")
    if any(len(shapes.get(name, ())) != 2 for name in (first, last)):
        raise ValueError(f"the head of {where} lacks {first} or {last}, or they are no matrices")
    sizes = {"in": shapes[first][1], "hidden": shapes[first][0], "out": shapes[last][0]}
    return {"version": version, "inner": inner, "pre_norm": "pre_norm.0.weight" in shapes, **sizes}


def _entry(name: str, heads: dict[str, dict[str, Any]], entry: dict[str, Any], token: int) -> dict[str, Any]:
    """One adaptor of the configuration; the heads are as `_describe` gives them."""
    summary, feature = heads.get("summary_head"), heads.get("feature_head")
    mlps = [head for head in (summary, feature) if head is not None and head["version"] != "attn"]
    if summary is not None and summary["version"] == "attn":
        raise ValueError(f"the summary head of {name} has attention, which only feature heads have")
    for key, word in (("hidden", "hidden widths"), ("inner", "numbers of inner blocks"), ("pre_norm", "pre-norms")):
        of = mlps if key != "hidden" else list(heads.values())
        if len({head[key] for head in of}) > 1:
            raise ValueError(f"both heads of {name} have different {word}, which no adaptor here has")
    for key, head in (("mlp_version", summary), ("spatial_mlp_version", feature)):
        if head is not None and entry.get(key) not in (None, "", head["version"]):
            raise ValueError(f"{key} of {name} is {entry[key]!r}, but its tensors are those of {head['version']!r}")
    factor = whole(entry.get("fd_upsample_factor") or 1, f"fd_upsample_factor of {name}")
    if feature is not None and feature["out"] % factor**2:
        raise ValueError(f"fd_upsample_factor of {name} is {factor}, but its features are {feature['out']} wide")
    first = mlps[0] if mlps else None
    version = first["version"] if first is not None else "v2"
    return {
        "summary_dim": None if summary is None else summary["out"],
        "feature_dim": None if feature is None else feature["out"] // factor**2,
        "hidden_dim": next(iter(heads.values()))["hidden"],
        "summary_token": 0 if summary is None else token,
        "mlp_version": version,
        "mlp_num_inner": 0 if first is None else first["inner"],
        "mlp_pre_norm": False if first is None else first["pre_norm"],
        "spatial_mlp_version": None if feature is None or feature["version"] == version else feature["version"],
        "upsample_factor": factor,
    }

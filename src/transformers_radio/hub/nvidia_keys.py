"""What each tensor of a release is, and where it goes in this package's models."""

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .nvidia_checkpoint import Tensors

# Prefixes in a .pth.tar and in safetensors -> part of the model; heads follow as <index or name>.<rest>
_PTH = {
    "base_model.": "model.",
    "input_conditioner.": "conditioner.",
    "_heads.": "summary_head.",
    "_feature_projections.": "feature_head.",
    "_feature_normalizer.": "feature_normalizer.",
    "_intermediate_feature_normalizer.": "intermediate_normalizer.",
}
_HUB = {
    "radio_model.model.": "model.",
    "radio_model.input_conditioner.": "conditioner.",
    "radio_model.summary_idxs": "summary_idxs",
    "radio_model.adaptors.": "adaptor.",
    "radio_model.feature_normalizer.": "feature_normalizer.",
    "radio_model.inter_feature_normalizer.": "intermediate_normalizer.",
}
_PARAMETRIZED = ".parametrizations."


@dataclass
class Spectral:
    """The tensors of one spectrally reparametrized weight: the names of its parts' scale, u, v and version."""

    original: str
    parts: list[str]


class Weights:
    """The tensors of a release by the names of one vocabulary, without reparametrizations.

    Names are `model.*`, `conditioner.*`, `summary_idxs`, `summary_head.<teacher>.*`, `feature_head.<teacher>.*`,
    `feature_normalizer.*`, `intermediate_normalizer.*`.

    Args:
        tensors: of the file.
        eps: added to the spectral norm.

    Raises:
        ValueError: a name that belongs to none of these, or parts of a reparametrization that are missing.
    """

    def __init__(self, tensors: Tensors, eps: float):
        self._tensors, self._eps = tensors, eps
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._original: dict[str, str | Spectral] = {}
        plain = {name: _part(name) for name in tensors.shapes if _PARAMETRIZED not in name}
        for name, found in {**plain, **_folded(tensors)}.items():
            if found is None:
                raise ValueError(f"the tensor {name} has no place in a RADIO model, so it is not left out silently")
            logical, original = found if isinstance(found, tuple) else (found, name)
            if logical in self._original:
                raise ValueError(f"the tensors {name} and {self._original[logical]} are the same weight")
            first = original.original if isinstance(original, Spectral) else original
            self.shapes[logical], self.dtypes[logical] = tensors.shapes[first], tensors.dtypes[first]
            self._original[logical] = original

    def original(self, name: str) -> str:
        """The name in the file, for messages."""
        found = self._original[name]
        return found.original if isinstance(found, Spectral) else found

    def read(self, name: str) -> torch.Tensor:
        """A copy of one tensor, with its reparametrization folded in."""
        found = self._original[name]
        if not isinstance(found, Spectral):
            return self._tensors.read(found)
        weight = self._tensors.read(found.original)
        scaled = [
            self._spectral(chunk, part)
            for chunk, part in zip(weight.chunk(max(len(found.parts), 1)), found.parts, strict=bool(found.parts))
        ]
        return torch.cat(scaled) if scaled else weight

    def _spectral(self, weight: torch.Tensor, part: str) -> torch.Tensor:
        """`W * scale / (u^T W v + eps)` (paper, Section 4.3); a file without a version has version 1."""
        scale, u, v = (self._tensors.read(f"{part}.{name}").double() for name in ("scale", "_u", "_v"))
        version = 1
        if f"{part}._sn_version" in self._tensors.shapes:
            version = int(self._tensors.read(f"{part}._sn_version"))
        if version not in (1, 2):
            raise ValueError(f"{part}._sn_version is {version}, expected 1 or 2")
        if version == 2:
            scale = F.softplus(scale) + 0.05
        exact = weight.double()
        if u.numel() != exact.shape[0] or v.numel() != exact[0].numel() or scale.numel() != 1:
            raise ValueError(f"{part}: scale, _u and _v do not fit a weight of shape {tuple(weight.shape)}")
        sigma = u.flatten() @ exact.flatten(1) @ v.flatten()
        return (exact * (scale.squeeze() / (sigma + self._eps))).to(weight.dtype)


def _part(name: str) -> str | None:
    """The name in the vocabulary of [`Weights`]; None for a name that has no place there."""
    for prefix, part in (*_HUB.items(), *_PTH.items()):
        if not name.startswith(prefix):
            continue
        rest = name.removeprefix(prefix)
        if part == "adaptor.":
            found = re.fullmatch(r"([^.]+)\.(head_mlp|feat_mlp)\.(.+)", rest)
            if found is None:
                return None
            kind = "summary_head" if found.group(2) == "head_mlp" else "feature_head"
            return f"{kind}.{found.group(1)}.{found.group(3)}"
        if part == "model.":
            rest = rest.removeprefix("inner.")
        return part + rest
    return None


def _folded(tensors: Tensors) -> dict[str, tuple[str, Spectral] | None]:
    """Reparametrized weights: the name in the file -> the plain name, and what it is computed from.

    `X.parametrizations.weight.original` is the weight; `X.parametrizations.weight.<k>` is spectral, with one scale, or
    with one for each of its `parts`. Weight noise (DAMP) has no tensors and acts in training alone.
    """
    found: dict[str, tuple[str, Spectral] | None] = {}
    parts: dict[str, set[str]] = {}
    for name in tensors.shapes:
        if _PARAMETRIZED not in name:
            continue
        owner, _, rest = name.partition(_PARAMETRIZED)
        match = re.fullmatch(r"(\w+)\.(original|(\d+(?:\.parts\.\d+)?)\.(scale|_u|_v|_sn_version))", rest)
        part = match and _part(f"{owner}.{match.group(1)}")
        if not match or part is None:
            found[name] = None
        elif match.group(2) == "original":
            found[name] = (part, Spectral(name, []))
        else:
            parts.setdefault(f"{owner}{_PARAMETRIZED}{match.group(1)}", set()).add(match.group(3))
    norms: list[str] = []
    for weight, numbers in parts.items():
        name = f"{weight}.original"
        entry = found.get(name)
        if entry is None:
            raise ValueError(f"the tensor {name} is missing, of which {weight}.{min(numbers)}.scale is a part")
        by_number = sorted(numbers, key=lambda number: [int(digits) for digits in re.findall(r"\d+", number)])
        if len({number.partition(".")[0] for number in numbers}) > 1:
            raise ValueError(f"{name} has more than one spectral norm, which is no release's layout")
        entry[1].parts = [f"{weight}.{number}" for number in by_number]
        norms += entry[1].parts
        for part in entry[1].parts:
            absent = [key for key in ("scale", "_u", "_v") if f"{part}.{key}" not in tensors.shapes]
            if absent:
                raise ValueError(f"the tensor {part}.{absent[0]} is missing")
    old = [part for part in norms if f"{part}._sn_version" not in tensors.shapes]
    if old and len(old) < len(norms):  # a file without any has version 1
        raise ValueError(f"the tensor {old[0]}._sn_version is missing, which {len(norms) - len(old)} others have")
    return found


# A target is (name in this package, which part of the tensor, of how many along its first axis).
Target = tuple[str, int, int]

_VIT: list[tuple[str, tuple[str, ...]]] = [
    (r"patch_generator\.embedder\.(weight|bias)", (r"embeddings.patch_projection.\1",)),
    (r"patch_generator\.pos_embed", ("embeddings.position_embedding",)),
    (r"patch_generator\.cls_token\.token", ("embeddings.cls_register_token",)),
    (r"norm\.(weight|bias)", (r"norm.\1",)),
    (r"blocks\.(\d+)\.(norm[12])\.(weight|bias)", (r"encoder.layer.\1.\2.\3",)),
    (
        r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)",
        tuple(rf"encoder.layer.\1.attention.{name}_proj.\2" for name in "qkv"),
    ),
    (r"blocks\.(\d+)\.attn\.proj\.(weight|bias)", (r"encoder.layer.\1.attention.o_proj.\2",)),
    (r"blocks\.(\d+)\.mlp\.(fc1|fc2|norm)\.(weight|bias)", (r"encoder.layer.\1.mlp.\2.\3",)),
    (
        r"blocks\.(\d+)\.mlp\.w12\.(weight|bias)",
        (r"encoder.layer.\1.mlp.gate_proj.\2", r"encoder.layer.\1.mlp.up_proj.\2"),
    ),
    (r"blocks\.(\d+)\.mlp\.w3\.(weight|bias)", (r"encoder.layer.\1.mlp.down_proj.\2",)),
    # of transformers, which keeps its own names where NVIDIA's have none
    (r"blocks\.(\d+)\.mlp\.((?:gate|up|down)_proj)\.(weight|bias)", (r"encoder.layer.\1.mlp.\2.\3",)),
    (r"blocks\.(\d+)\.attention\.([qkvo])_proj\.(weight|bias)", (r"encoder.layer.\1.attention.\2_proj.\3",)),
    (r"blocks\.(\d+)\.ls([12])\.(?:gamma|grandma)", (r"encoder.layer.\1.layer_scale\2.lambda1",)),
    (r"blocks\.(\d+)\.layer_scale([12])\.lambda1", (r"encoder.layer.\1.layer_scale\2.lambda1",)),
    # stored and read by nothing: registers live in `cls_token.token`; a mask token is for masked training
    (r"(?:reg_token|mask_token)", ()),
]
_ATTENTION = r"levels\.(\d)\.blocks\.(\d+)\.attention_blocks\.(\d)\."
_BIAS = _ATTENTION + r"attn\.pos_emb_funct\."
_ERADIO: list[tuple[str, str | None]] = [
    (r"patch_embed\.conv_down\.0\.(conv|bn)\.(.+)", r"stem.conv1.\1.\2"),
    (r"patch_embed\.conv_down\.2\.(conv|bn)\.(.+)", r"stem.conv2.\1.\2"),
    (r"levels\.([01])\.blocks\.(?:0\.)?cv([12])\.(conv|bn)\.(.+)", r"stages.\1.0.conv\2.\3.\4"),
    (
        r"levels\.([01])\.blocks\.(?:0\.)?m\.(\d+)\.cv([12])\.(conv|bn)\.(.+)",
        r"stages.\1.0.bottlenecks.\2.conv\3.\4.\5",
    ),
    (r"levels\.([012])\.downsample\.reduction\.(?:conv|0)\.(.+)", r"downsamples.\1.conv.\2"),
    (r"levels\.([012])\.downsample\.reduction\.(?:bn|norm|1)\.(.+)", r"downsamples.\1.norm.\2"),
    (_ATTENTION + r"downsample_op\.(weight|bias)", r"stages.\1.\2.\3.reduce.\4"),
    (_ATTENTION + r"upsample_op\.(weight|bias)", r"stages.\1.\2.\3.expand.\4"),
    (_ATTENTION + r"pre_conv\.(conv|bn)\.(.+)", r"stages.\1.\2.\3.pre_conv.\4.\5"),
    (_ATTENTION + r"(norm[12]|mlp\.fc[12])\.(weight|bias)", r"stages.\1.\2.\3.\4.\5"),
    (_ATTENTION + r"attn\.(qkv|proj)\.(weight|bias)", r"stages.\1.\2.\3.attention.\4.\5"),
    (
        _BIAS + r"cpb_mlp\.0\.(weight|bias)",
        r"stages.\1.\2.\3.attention.position_bias.fc1.\4",
    ),
    (
        _BIAS + r"cpb_mlp\.2\.(weight|bias)",
        r"stages.\1.\2.\3.attention.position_bias.fc2.\4",
    ),
    # computed from cpb_mlp and the size of the window
    (_BIAS + r"relative_(?:bias|coords_table|position_index)", None),
    (r"high_res_neck\.neck_features_proj\.([01])\.conv1\.(.+)", r"neck.depthwise.\1.\2"),
    (r"high_res_neck\.neck_features_proj\.([01])\.norm\.(.+)", r"neck.norms.\1.\2"),
    (r"high_res_neck\.neck_features_proj\.([01])\.conv2\.(.+)", r"neck.convs.\1.\2"),
    (r"norm\.(?:weight|bias|running_mean|running_var|num_batches_tracked)", None),  # feeds no output
]


def vit_targets(name: str) -> list[Target] | None:
    """Where a tensor `model.<name>` of a ViT goes; empty if nothing reads it, None if it is unknown."""
    for pattern, targets in _VIT:
        found = re.fullmatch(pattern, name)
        if found is not None:
            return [(found.expand(target), part, len(targets)) for part, target in enumerate(targets)]
    return None


def eradio_targets(name: str) -> list[Target] | None:
    """Where a tensor `model.<name>` of E-RADIO goes; empty if nothing reads it, None if it is unknown."""
    for pattern, target in _ERADIO:
        found = re.fullmatch(pattern, name)
        if found is None:
            continue
        if target is None:
            return []
        new = found.expand(target).replace(".bn.", ".norm.")
        # a block of stage 3 is two of ours; one of stage 4 has a single attention block
        block = re.match(r"stages\.([23])\.(\d+)\.(\d)\.", new)
        if block is not None:
            stage, index, part = map(int, block.groups())
            if part > (1 if stage == 2 else 0):
                return None
            new = f"stages.{stage}.{2 * index + part if stage == 2 else index}.{new[block.end() :]}"
        return [(new, 0, 1)]
    return None


def head_target(adaptor: str, kind: str, rest: str) -> str:
    """The name of a head's tensor: `kind` is "summary_head" or "feature_head"."""
    rest = re.sub(r"(ls[12])\.grandma$", r"\1.gamma", rest)
    return f"adaptors.{adaptor}.{kind}.{rest}"

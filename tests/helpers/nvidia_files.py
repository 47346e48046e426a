"""Tiny checkpoints with random weights in the layouts of NVIDIA's releases, written from the names that they have."""

import argparse
import json
import math

import torch
from safetensors.torch import save_file

WIDTH, DEPTH, HEADS, SIDE, HIDDEN = 32, 4, 4, 6, 24
CLIP = {"name": "clip", "type": "open_clip", "model": "ViT-H-14-378-quickgelu", "pretrained": "dfn5b"}
OPENAI = {"name": "openai_clip", "type": "openai_clip", "model": "ViT-L/14@336px"}
DINO = {"name": "dino_v2", "type": "dino_v2", "model": "dinov2_vitg14_reg"}
SAM = {"name": "sam", "type": "sam", "model": "vit-h", "use_summary": False}
SIGLIP = {"name": "siglip", "type": "open_clip", "model": "ViT-SO400M-14-SigLIP-384", "pretrained": "webli"}
SIGLIP2 = {"name": "siglip2-g", "type": "siglip2", "model": "google/siglip2-giant-opt-patch16-384"}
DINO3 = {"name": "dino_v3_7b", "type": "dino_v3", "model": "dinov3_vit7b16"}
SAM3 = {"name": "sam3", "type": "sam3", "model": "sam3", "use_summary": False}
RTX = {"name": "rtx-translate", "type": "rtx_translate", "model": "rtx"}
V25 = [CLIP, SIGLIP, DINO, SAM]
V3 = [CLIP, SIGLIP2, DINO, SAM]

# ruff: noqa: E501
# What each release has. `by`: how the .pth.tar names its heads.
LAYOUTS = {
    "radio_v1": dict(model="vit_huge_patch14_224", patch=14, teachers=[CLIP, DINO], mlp="v1", inner=1, by="index"),
    "radio_v2": dict(
        model="vit_huge_patch16_224", teachers=[CLIP, OPENAI, DINO, SAM, RTX], multiple=8, by="index", spectral=2
    ),
    "radio_v2.1": dict(
        model="vit_huge_patch16_224",
        teachers=[CLIP, OPENAI, DINO, SAM, RTX],
        multiple=8,
        by="index",
        bf16=True,
        ema=True,
    ),
    "radio_v2.5-b": dict(model="vit_base_patch16_224", teachers=V25, multiple=8, spectral=1),
    "radio_v2.5-l": dict(model="vit_large_patch16_224", teachers=V25, multiple=8, ema=True),
    "radio_v2.5-h": dict(model="vit_huge_patch16_224", teachers=V25, multiple=8, upsample=2),
    "radio_v2.5-h-norm": dict(model="vit_huge_patch16_224", teachers=V25, multiple=8, normalizers="per_layer"),
    "radio_v2.5-g": dict(model="dinov2_vitg14_reg", patch=14, teachers=V25, multiple=8, gated=True, inner_prefix=True),
    "c-radio_v1": dict(model="vit_huge_patch16_224_mlpnorm", teachers=V25, registers=4, mlp_norm=True),
    "c-radio_v2-b": dict(model="vit_base_patch16_224", teachers=V25, multiple=8),
    "c-radio_v2-g": dict(model="vit_giant_patch16_224", teachers=V25, multiple=8, spectral=2),
    "c-radio_v2-vlm-h": dict(model="vit_huge_patch16_224", teachers=[CLIP], shared=True, registers=7, model_norm=True),
    "c-radio_v3-b": dict(model="vit_base_patch16_v2_224", teachers=V3, registers=4, scale=True, reg_token=True),
    "c-radio_v3-l": dict(model="vit_large_patch16_v2_224", teachers=V3, registers=4, scale=True, reg_token=True),
    "c-radio_v3-h": dict(model="vit_huge_patch16_224", teachers=V3, registers=4, normalizers="shared"),
    "c-radio_v3-g": dict(model="vit_giant_patch16_224", teachers=V3, registers=4),
    "c-radio_v4-h": dict(
        model="vit_huge_patch16_224",
        teachers=[SIGLIP2, DINO3, SAM3],
        multiple=10,
        inner=2,
        attn="siglip2-g",
        damp=True,
    ),
    "c-radio_v4-so400m": dict(model="vit_so400m_patch16_224", teachers=[SIGLIP2, DINO3, SAM3], multiple=10, inner=2),
}


class Randoms:
    """Random tensors, the same in every run."""

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape, scale=None):
        scale = (1 / math.sqrt(shape[-1]) if len(shape) > 1 else 0.3) if scale is None else scale
        return scale * torch.randn(*shape, generator=self.generator)

    def linear(self, state, name, out, into, bias=True):
        state[f"{name}.weight"] = self(out, into)
        if bias:
            state[f"{name}.bias"] = self(out)

    def norm(self, state, name, width):
        state[f"{name}.weight"] = 1 + self(width)
        state[f"{name}.bias"] = self(width)


def backbone(layout, rand, width=WIDTH, depth=DEPTH, side=SIDE):
    """The names that follow base_model. and radio_model.model., without inner."""
    patch, gated = layout.get("patch", 16), layout.get("gated", False)
    state = {}
    tokens = len(layout["teachers"]) if not layout.get("shared") else 1
    registers = layout.get("registers", 0)
    if layout.get("multiple"):
        registers = layout["multiple"] - tokens % layout["multiple"]
    state["patch_generator.embedder.weight"] = rand(width, 3 * patch**2, scale=0.05)
    if gated:
        state["patch_generator.embedder.bias"] = rand(width)
    state["patch_generator.pos_embed"] = rand(1, side**2, width, scale=0.5)
    state["patch_generator.cls_token.token"] = rand(tokens + registers, width, scale=0.5)
    if layout.get("reg_token"):
        state["reg_token"] = rand(1, 4, width)
    for block in range(depth):
        name = f"blocks.{block}"
        rand.norm(state, f"{name}.norm1", width)
        rand.linear(state, f"{name}.attn.qkv", 3 * width, width)
        rand.linear(state, f"{name}.attn.proj", width, width)
        rand.norm(state, f"{name}.norm2", width)
        if gated:
            wide = 8 * math.ceil(width * 8 / 3 / 8)
            rand.linear(state, f"{name}.mlp.w12", 2 * wide, width)
            rand.linear(state, f"{name}.mlp.w3", width, wide)
        else:
            rand.linear(state, f"{name}.mlp.fc1", 4 * width, width)
            rand.linear(state, f"{name}.mlp.fc2", width, 4 * width)
        if layout.get("mlp_norm"):
            rand.norm(state, f"{name}.mlp.norm", 4 * width)
        if layout.get("scale") or gated:
            state[f"{name}.ls1.grandma"] = 0.5 + rand(width)
            state[f"{name}.ls2.grandma"] = 0.5 + rand(width)
    if layout.get("model_norm"):
        rand.norm(state, "norm", width)
    return state


def mlp(rand, version, into, hidden, out, inner):
    state = {}
    rand.linear(state, "fc1", hidden, into)
    if version == "v1":
        rand.norm(state, "norm", hidden)
        for block in range(inner):
            rand.linear(state, f"inner.{3 * block}", hidden, hidden)
            rand.norm(state, f"inner.{3 * block + 1}", hidden)
        rand.linear(state, "fc2", out, hidden)
        return state
    for block in range(inner):
        rand.norm(state, f"blocks.{block}.0", hidden)
        rand.linear(state, f"blocks.{block}.2", hidden, hidden)
    rand.norm(state, "final.0", hidden)
    rand.linear(state, "final.2", out, hidden)
    return state


def attention_head(rand, width, hidden, out):
    state = {}
    for block in range(2):
        name = f"blocks.{block}"
        rand.norm(state, f"{name}.norm1", width)
        rand.linear(state, f"{name}.attn.qkv", 3 * width, width, bias=False)
        rand.linear(state, f"{name}.attn.proj", width, width)
        state[f"{name}.ls1.gamma"] = rand(width)
        rand.norm(state, f"{name}.norm2", width)
        rand.linear(state, f"{name}.mlp.fc1", 4 * width, width)
        rand.linear(state, f"{name}.mlp.fc2", width, 4 * width)
        state[f"{name}.ls2.gamma"] = rand(width)
    return state | {f"mlp.{key}": value for key, value in mlp(rand, "v2", width, hidden, out, 0).items()}


def heads(layout, rand, width=WIDTH):
    """teacher -> (summary head, feature head); every teacher has both, as in the releases."""
    version, inner, factor = layout.get("mlp", "v2"), layout.get("inner", 0), layout.get("upsample", 1)
    made = {}
    for index, teacher in enumerate(layout["teachers"]):
        summary = mlp(rand, version, width, HIDDEN, 10 + index, inner)
        out = (14 + index) * factor**2
        if layout.get("attn") == teacher["name"]:
            made[teacher["name"]] = (summary, attention_head(rand, width, HIDDEN, out))
        else:
            made[teacher["name"]] = (summary, mlp(rand, version, width, HIDDEN, out, inner))
    return made


def arguments(layout, width=WIDTH, side=SIDE, heads=HEADS):
    """`args`, with some of what only a training needs."""
    teachers = [dict(teacher) for teacher in layout["teachers"]]
    for teacher in teachers:
        if layout.get("upsample"):
            teacher["fd_upsample_factor"] = layout["upsample"]
        if layout.get("attn") == teacher["name"]:
            teacher["spatial_mlp_version"] = "attn"
    return {
        "model": layout["model"],
        "model_kwargs": {"embed_dim": width, "num_heads": heads},
        "in_chans": 3,
        "cpe_max_size": side * layout.get("patch", 16),
        "cpe_num_registers": layout.get("registers"),
        "register_multiple": layout.get("multiple"),
        "cls_token_per_teacher": not layout.get("shared"),
        "teachers": teachers,
        "model_norm": bool(layout.get("model_norm")),
        "mlp_version": layout.get("mlp", "v2"),
        "spectral_reparam": bool(layout.get("spectral")),
        "damp": layout.get("damp", False),
        "lr": 1e-3,
        "weight_decay": 0.02,
    }


def make(name, form="pth", seed=0):
    """(args, state dict as stored, plain state dict by the names behind the prefixes, heads) of a layout."""
    layout, rand = LAYOUTS[name], Randoms(seed)
    plain, adaptors = backbone(layout, rand), heads(layout, rand)
    normalizers = {}
    if layout.get("normalizers"):
        rotation = (DEPTH, WIDTH, WIDTH) if layout["normalizers"] == "per_layer" else (WIDTH, WIDTH)
        normalizers["inter"] = {"alphas": rand(DEPTH), "rotation": rand(*rotation), "means": rand(DEPTH, WIDTH)}
        if layout["normalizers"] == "per_layer":
            normalizers["feature"] = {"mean": rand(WIDTH), "tx": rand(WIDTH, WIDTH)}
    args = arguments(layout)
    mean, std = rand(3, 1, 1).abs(), 0.2 + rand(3, 1, 1).abs()
    stored = {}
    prefix = {"pth": "base_model.", "hub": "radio_model.model."}[form] + (
        "inner." if layout.get("inner_prefix") else ""
    )
    stored |= {prefix + key: value for key, value in plain.items()}
    outer = {"pth": "", "hub": "radio_model."}[form]
    stored |= {f"{outer}input_conditioner.norm_mean": mean, f"{outer}input_conditioner.norm_std": std}
    for index, (teacher, (summary, feature)) in enumerate(adaptors.items()):
        if form == "pth":
            key = index if layout.get("by") == "index" else teacher
            stored |= {f"_heads.{key}.{k}": v for k, v in summary.items()}
            stored |= {f"_feature_projections.{key}.{k}": v for k, v in feature.items()}
        else:
            stored |= {f"radio_model.adaptors.{teacher}.head_mlp.{k}": v for k, v in summary.items()}
            stored |= {f"radio_model.adaptors.{teacher}.feat_mlp.{k}": v for k, v in feature.items()}
    names = {"pth": ("_feature_normalizer", "_intermediate_feature_normalizer")}
    names["hub"] = ("radio_model.feature_normalizer", "radio_model.inter_feature_normalizer")
    for kind, name_in_file in zip(("feature", "inter"), names[form], strict=True):
        stored |= {f"{name_in_file}.{k}": v for k, v in normalizers.get(kind, {}).items()}
    if form == "hub":
        used = [i for i, t in enumerate(layout["teachers"]) if t.get("use_summary", True)]
        stored["radio_model.summary_idxs"] = torch.tensor([0] if layout.get("shared") else used)
    return args, stored, plain | {"norm_mean": mean, "norm_std": std}, adaptors, normalizers


def reparametrize(state, version, seed=1):
    """The same with a spectral parametrization on every Linear of the blocks; `folded` says what it computes to."""
    rand = Randoms(seed)
    new = {}
    for name, weight in state.items():
        if not (
            name.startswith("base_model.")
            and ".blocks." in f".{name}"
            and name.endswith(".weight")
            and weight.ndim == 2
        ):
            new[name] = weight
            continue
        base = f"{name.removesuffix('.weight')}.parametrizations.weight"
        new[f"{base}.original"] = weight
        parts = 3 if ".qkv." in name else 2 if ".w12." in name else 1
        for part, chunk in enumerate(weight.chunk(parts)):
            u, _, v = torch.linalg.svd(chunk)
            where = f"{base}.0" + (f".parts.{part}" if parts > 1 else "")
            new[f"{where}.scale"] = rand(1, 1).abs() + 0.5
            new[f"{where}._u"], new[f"{where}._v"] = u[:, 0].clone(), v[0].clone()
            if version == 2:
                new[f"{where}._sn_version"] = torch.tensor(2)
    return new


def folded(state, eps=1e-6):
    """What `reparametrize` computes to, by a loop over the definition: W * scale / (u^T W v + eps)."""
    new = {}
    for name, tensor in state.items():
        if name.endswith(".parametrizations.weight.original"):
            base = name.removesuffix(".original")
            parts = sorted(
                {key.rpartition(".")[0] for key in state if key.startswith(base) and key.endswith(".scale")}
            )
            chunks = []
            for chunk, part in zip(tensor.chunk(len(parts)), parts, strict=True):
                scale = state[f"{part}.scale"][0, 0]
                if f"{part}._sn_version" in state:
                    scale = torch.log(1 + torch.exp(scale)) + 0.05
                sigma = torch.einsum("o,oi,i->", state[f"{part}._u"], chunk, state[f"{part}._v"])
                chunks.append(chunk * scale / (sigma + eps))
            new[name.replace(".parametrizations.weight.original", ".weight")] = torch.cat(chunks)
        elif ".parametrizations." not in name:
            new[name] = tensor
    return new


def write_pth(path, args, state, ema=None, dtype=None):
    cast = (
        (lambda s: {k: v.to(dtype) if v.is_floating_point() else v for k, v in s.items()}) if dtype else (lambda s: s)
    )
    content = {"args": argparse.Namespace(**args), "state_dict": cast(state), "epoch": 3, "arch": args["model"]}
    if ema is not None:
        content["state_dict_ema"] = cast(ema)
    torch.save(content, path)
    return path


def write_hub(folder, args, state, version=None, **config):
    folder.mkdir(parents=True, exist_ok=True)
    written = {
        "architectures": ["RADIOModel"],
        "auto_map": {"AutoModel": "hf_model.RADIOModel"},
        "args": args,
        "version": version,
        "patch_size": 14 if "patch14" in args["model"] or "vitg14" in args["model"] else 16,
        "max_resolution": args["cpe_max_size"],
        "preferred_resolution": [64, 64],
        "adaptor_names": None,
        "adaptor_configs": {},
        "vitdet_window_size": None,
        "feature_normalizer_config": None,
        "inter_feature_normalizer_config": None,
        "torch_dtype": "float32",
        "transformers_version": "4.40.1",
    }
    (folder / "config.json").write_text(json.dumps({**written, **config}))
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors")
    return folder

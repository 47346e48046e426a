"""A tiny E-RADIO with NVIDIA's names, and what it computes, written out plainly."""

import torch
import torch.nn.functional as F

from helpers.nvidia_files import CLIP, DINO, SAM, Randoms, mlp

EMBED, DEPTHS, HEADS, WINDOW = 8, (2, 1, 1, 2), (2, 4), 4
TEACHERS = [CLIP, DINO, SAM]


def conv_bn(state, rand, name, out, into, kernel, bn="bn"):
    state[f"{name}.conv.weight"] = rand(out, into, kernel, kernel, scale=(into * kernel**2) ** -0.5)
    batch_norm(state, rand, f"{name}.{bn}", out)


def batch_norm(state, rand, name, width):
    rand.norm(state, name, width)
    state[f"{name}.running_mean"], state[f"{name}.running_var"] = rand(width), 0.5 + rand(width).abs()
    state[f"{name}.num_batches_tracked"] = torch.tensor(7)


def make_eradio(seed=0):
    """(args, stored state, state behind the prefix, heads), as in e-radio_v2.pth.tar."""
    rand, state = Randoms(seed), {}
    widths = [EMBED * 2**i for i in range(4)]
    conv_bn(state, rand, "patch_embed.conv_down.0", 6, 3, 3)
    conv_bn(state, rand, "patch_embed.conv_down.2", EMBED, 6, 3)
    for level in (0, 1):
        width, name = widths[level], f"levels.{level}.blocks"
        conv_bn(state, rand, f"{name}.cv1", width, width, 1)
        for block in range(DEPTHS[level]):
            conv_bn(state, rand, f"{name}.m.{block}.cv1", width // 2, width // 2, 3)
            conv_bn(state, rand, f"{name}.m.{block}.cv2", width // 2, width // 2, 3)
        conv_bn(state, rand, f"{name}.cv2", width, (2 + DEPTHS[level]) * width // 2, 1)
    for level in (0, 1, 2):
        name = f"levels.{level}.downsample.reduction"
        state[f"{name}.0.weight"] = rand(widths[level + 1], widths[level], 3, 3, scale=(9 * widths[level]) ** -0.5)
        batch_norm(state, rand, f"{name}.1", widths[level + 1])
    for level, heads in zip((2, 3), HEADS, strict=True):
        width = widths[level]
        for block in range(DEPTHS[level]):
            for part in range(2 if level == 2 else 1):
                name = f"levels.{level}.blocks.{block}.attention_blocks.{part}"
                if level == 2 and part == 0:
                    for op in ("downsample_op", "upsample_op"):
                        state[f"{name}.{op}.weight"] = rand(width, width, 2, 2, scale=(4 * width) ** -0.5)
                        state[f"{name}.{op}.bias"] = rand(width)
                else:
                    conv_bn(state, rand, f"{name}.pre_conv", width, width, 3)
                rand.norm(state, f"{name}.norm1", width)
                rand.linear(state, f"{name}.attn.qkv", 3 * width, width, bias=False)
                rand.linear(state, f"{name}.attn.proj", width, width, bias=False)
                rand.linear(state, f"{name}.attn.pos_emb_funct.cpb_mlp.0", 512, 2)
                rand.linear(state, f"{name}.attn.pos_emb_funct.cpb_mlp.2", heads, 512, bias=False)
                buffers = f"{name}.attn.pos_emb_funct"
                state[f"{buffers}.relative_bias"] = rand(1, heads, WINDOW**2, WINDOW**2)
                state[f"{buffers}.relative_coords_table"] = rand(1, 2 * WINDOW - 1, 2 * WINDOW - 1, 2)
                state[f"{buffers}.relative_position_index"] = torch.zeros(WINDOW**2, WINDOW**2, dtype=torch.int64)
                rand.norm(state, f"{name}.norm2", width)
                rand.linear(state, f"{name}.mlp.fc1", 4 * width, width, bias=False)
                rand.linear(state, f"{name}.mlp.fc2", width, 4 * width, bias=False)
    for index, width in enumerate(widths[2:]):
        name = f"high_res_neck.neck_features_proj.{index}"
        state[f"{name}.conv1.weight"], state[f"{name}.conv1.bias"] = rand(width, 1, 3, 3, scale=0.3), rand(width)
        batch_norm(state, rand, f"{name}.norm", width)
        state[f"{name}.conv2.weight"] = rand(widths[3], width, 1, 1, scale=width**-0.5)
        state[f"{name}.conv2.bias"] = rand(widths[3])
    batch_norm(state, rand, "norm", widths[3])
    args = {"model": "eradio", "model_kwargs": {}, "teachers": TEACHERS, "cls_token_per_teacher": True}
    args |= {"cpe_max_size": None, "mlp_version": "v2", "lr": 0.001}
    stored = {f"base_model.{key}": value for key, value in state.items()}
    mean, std = rand(3, 1, 1).abs(), 0.2 + rand(3, 1, 1).abs()
    stored |= {"input_conditioner.norm_mean": mean, "input_conditioner.norm_std": std}
    heads = {}
    for index, teacher in enumerate(TEACHERS):
        heads[teacher["name"]] = [mlp(rand, "v2", widths[3], 24, 10 + index + 4 * feature, 0) for feature in (0, 1)]
        for kind, head in zip(("_heads", "_feature_projections"), heads[teacher["name"]], strict=True):
            stored |= {f"{kind}.{index}.{key}": value for key, value in head.items()}
    return args, stored, {**state, "norm_mean": mean, "norm_std": std}, heads


def _bn(x, state, name):
    values = (state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, *values, eps=1e-5)


def _conv_bn(x, state, name, stride=1):
    kernel = state[f"{name}.conv.weight"]
    return _bn(F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2), state, f"{name}.bn")


def _c2f(x, state, name, depth):
    first, second = F.silu(_conv_bn(x, state, f"{name}.cv1")).chunk(2, 1)
    parts = [first, second]
    for block in range(depth):
        y = F.silu(_conv_bn(parts[-1], state, f"{name}.m.{block}.cv1"))
        parts.append(parts[-1] + F.silu(_conv_bn(y, state, f"{name}.m.{block}.cv2")))
    return F.silu(_conv_bn(torch.cat(parts, 1), state, f"{name}.cv2"))


def _bias(state, name, heads):
    """By a loop over pairs of places: 16 sigmoid(MLP(offset)), offsets from query to key on the log scale."""
    bias = torch.zeros(heads, WINDOW**2, WINDOW**2)
    for query in range(WINDOW**2):
        for key in range(WINDOW**2):
            offset = torch.tensor([query // WINDOW - key // WINDOW, query % WINDOW - key % WINDOW]).float()
            offset = 8 * offset / (WINDOW - 1)
            offset = offset.sign() * torch.log2(1 + offset.abs()) / 3
            hidden = F.relu(F.linear(offset, state[f"{name}.cpb_mlp.0.weight"], state[f"{name}.cpb_mlp.0.bias"]))
            bias[:, query, key] = 16 * torch.sigmoid(F.linear(hidden, state[f"{name}.cpb_mlp.2.weight"]))
    return bias


def _attention_block(x, state, name, heads):
    shortcut = x
    if f"{name}.downsample_op.weight" in state:
        x = F.conv2d(x, state[f"{name}.downsample_op.weight"], state[f"{name}.downsample_op.bias"], stride=2)
    else:
        x = x + _conv_bn(x, state, f"{name}.pre_conv")
    bias, width = _bias(state, f"{name}.attn.pos_emb_funct", heads), x.shape[1]
    out = torch.empty_like(x)
    for row in range(0, x.shape[2], WINDOW):
        for col in range(0, x.shape[3], WINDOW):
            window = (..., slice(row, row + WINDOW), slice(col, col + WINDOW))
            tokens = x[window].flatten(2).mT  # (B, W*W, C)
            y = F.layer_norm(tokens, (width,), state[f"{name}.norm1.weight"], state[f"{name}.norm1.bias"], 1e-5)
            qkv = F.linear(y, state[f"{name}.attn.qkv.weight"]).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            logits = qkv[0] @ qkv[1].mT / (width // heads) ** 0.5 + bias
            y = (logits.softmax(-1) @ qkv[2]).transpose(1, 2).flatten(2)
            tokens = tokens + F.linear(y, state[f"{name}.attn.proj.weight"])
            y = F.layer_norm(tokens, (width,), state[f"{name}.norm2.weight"], state[f"{name}.norm2.bias"], 1e-5)
            y = F.linear(F.gelu(F.linear(y, state[f"{name}.mlp.fc1.weight"])), state[f"{name}.mlp.fc2.weight"])
            out[window] = (tokens + y).mT.unflatten(-1, (WINDOW, WINDOW))
    if f"{name}.upsample_op.weight" in state:
        out = F.conv_transpose2d(out, state[f"{name}.upsample_op.weight"], state[f"{name}.upsample_op.bias"], stride=2)
    return out / 2 + shortcut / 2


def eradio(state, images):
    """Features (B, h*w, C) at stride 16; sides are multiples of 32 * WINDOW."""
    x = (images - state["norm_mean"]) / state["norm_std"]
    for part in (0, 2):
        x = F.relu(_conv_bn(x, state, f"patch_embed.conv_down.{part}", stride=2))
    kept = []
    for level in range(4):
        if level < 2:
            x = _c2f(x, state, f"levels.{level}.blocks", DEPTHS[level])
        else:
            for block in range(DEPTHS[level]):
                for part in range(2 if level == 2 else 1):
                    name = f"levels.{level}.blocks.{block}.attention_blocks.{part}"
                    x = _attention_block(x, state, name, HEADS[level - 2])
        kept.append(x)
        if level < 3:
            name = f"levels.{level}.downsample.reduction"
            x = _bn(F.conv2d(x, state[f"{name}.0.weight"], stride=2, padding=1), state, f"{name}.1")
    total = 0
    for index, maps in enumerate((kept[2], F.interpolate(kept[3], scale_factor=2, mode="nearest"))):
        name = f"high_res_neck.neck_features_proj.{index}"
        kernel, bias = state[f"{name}.conv1.weight"], state[f"{name}.conv1.bias"]
        maps = _bn(F.conv2d(maps, kernel, bias, padding=1, groups=len(kernel)), state, f"{name}.norm")
        total = total + F.conv2d(maps, state[f"{name}.conv2.weight"], state[f"{name}.conv2.bias"])
    return total.flatten(2).mT

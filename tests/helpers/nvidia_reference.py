"""What a release computes, written out plainly from its tensors: the reference for conversion."""

import torch
import torch.nn.functional as F


def linear(x, state, name):
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def layer_norm(x, state, name, eps):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def attention(x, state, name, heads):
    batch, length, width = x.shape
    query, key, value = linear(x, state, f"{name}.qkv").reshape(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    weights = (query @ key.mT / (width // heads) ** 0.5).softmax(-1)
    return linear((weights @ value).transpose(1, 2).reshape(batch, length, width), state, f"{name}.proj")


def mlp(x, state, name):
    if f"{name}.w12.weight" in state:
        gate, up = linear(x, state, f"{name}.w12").chunk(2, -1)
        return linear(gate * gate.sigmoid() * up, state, f"{name}.w3")
    x = F.gelu(linear(x, state, f"{name}.fc1"))
    if f"{name}.norm.weight" in state:
        x = layer_norm(x, state, f"{name}.norm", 1e-6)
    return linear(x, state, f"{name}.fc2")


def vit(state, images, patch, heads):
    """Tokens behind the last block (and a final norm), the rows of `cls_token.token` in front."""
    x = (images - state["norm_mean"]) / state["norm_std"]
    kernel = state["patch_generator.embedder.weight"]
    x = F.conv2d(x, kernel.reshape(len(kernel), 3, patch, patch), state.get("patch_generator.embedder.bias"), patch)
    rows, cols = x.shape[-2:]
    table = state["patch_generator.pos_embed"]
    side = round(table.shape[1] ** 0.5)
    table = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    table = F.interpolate(table, (max(rows, cols),) * 2, mode="bilinear", align_corners=False)[..., :rows, :cols]
    x = (x + table).flatten(2).mT
    x = torch.cat([state["patch_generator.cls_token.token"].expand(len(x), -1, -1), x], 1)
    for block in range(len({key.split(".")[1] for key in state if key.startswith("blocks.")})):
        name = f"blocks.{block}"
        scale1, scale2 = (state.get(f"{name}.ls{i}.grandma", torch.tensor(1.0)) for i in (1, 2))
        x = x + scale1 * attention(layer_norm(x, state, f"{name}.norm1", 1e-6), state, f"{name}.attn", heads)
        x = x + scale2 * mlp(layer_norm(x, state, f"{name}.norm2", 1e-6), state, f"{name}.mlp")
    return layer_norm(x, state, "norm", 1e-6) if "norm.weight" in state else x


def head(state, x):
    """A teacher's head of any kind."""
    if "fc2.weight" in state:
        x = F.relu(layer_norm(linear(x, state, "fc1"), state, "norm", 1e-5))
        for block in range(len([key for key in state if key.startswith("inner.")]) // 4):
            x = F.relu(layer_norm(linear(x, state, f"inner.{3 * block}"), state, f"inner.{3 * block + 1}", 1e-5))
        return linear(x, state, "fc2")
    if "mlp.fc1.weight" in state:
        for block in range(2):
            name = f"blocks.{block}"
            normed = layer_norm(x, state, f"{name}.norm1", 1e-6)
            x = x + state[f"{name}.ls1.gamma"] * attention(normed, state, f"{name}.attn", 16)
            normed = layer_norm(x, state, f"{name}.norm2", 1e-6)
            x = x + state[f"{name}.ls2.gamma"] * mlp(normed, state, f"{name}.mlp")
        return head({key.removeprefix("mlp."): value for key, value in state.items() if key.startswith("mlp.")}, x)
    if "pre_norm.0.weight" in state:
        x = F.gelu(layer_norm(x, state, "pre_norm.0", 1e-5))
    x = linear(x, state, "fc1")
    for block in range(len([key for key in state if key.startswith("blocks.")]) // 4):
        x = x + linear(F.gelu(layer_norm(x, state, f"blocks.{block}.0", 1e-5)), state, f"blocks.{block}.2")
    return linear(F.gelu(layer_norm(x, state, "final.0", 1e-5)), state, "final.2")

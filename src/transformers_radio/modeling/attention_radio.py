"""Attention by other means than the functions that transformers brings."""

import functools

import torch
from torch import nn

from .inputs_radio import can_read_values

_MOST_WEIGHTS = 2**21  # at a time: 4 MiB, which stay in the cache of a core
# Below, the time goes into starting operations: queries of an image in all heads, for each thread
_FEWEST_QUERIES, _FEWEST_QUERIES_IN_TRAINING = 1000, 100
# Tokens for each channel of a head. The backward pass keeps the weights: at 16 they take 16 times a block's input
_MOST_TOKENS_IN_TRAINING = 16


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.dropout(weights.softmax(dim=-1), p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def chunked_attention_forward(module, query, key, value, attention_mask=None, scaling=1.0, dropout=0.0, **kwargs):
    """As above without a mask, for so few images, heads and queries at a time that their weights stay in the cache."""
    # an offset that all keys share changes nothing but how much of the products is lost to rounding
    key = key - key.mean(dim=2, keepdim=True)
    length = query.shape[2]
    num_heads = max(1, _MOST_WEIGHTS // length**2)
    num_queries = max(1, _MOST_WEIGHTS // (num_heads * length))
    images = []
    with torch.autocast("cpu", enabled=False):  # which would compute the softmax in float32
        for image in zip(query * scaling, key, value, strict=True):
            groups = []
            for queries, keys, values in zip(*(tensor.split(num_heads) for tensor in image), strict=True):
                # (heads, L, D/heads) -> (heads, D/heads, L)
                keys, values = keys.contiguous().transpose(1, 2), values.contiguous()
                weights = ((some @ keys).softmax(dim=-1) for some in queries.split(num_queries, dim=1))
                groups.append(torch.cat([nn.functional.dropout(some, dropout) @ values for some in weights], dim=1))
            images.append(torch.cat(groups).transpose(0, 1))  # (L, heads, D/heads)
    return torch.stack(images), None


def gains_from_chunks(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, length: int
) -> bool:
    """Whether chunks are faster than torch's fused kernel; `length`: tokens of the longest image.

    Not in evaluation mode unless the student is fused: its bits are those of transformers' RADIO.
    """
    if not can_read_values(query) or query.device.type != "cpu":  # compiled and exported graphs keep the one operator
        return False
    if {query.dtype, key.dtype, value.dtype} != {torch.bfloat16} or not _fused_kernel_is_slow():
        return False
    if module.training or (module.qkv_proj is not None and torch.is_grad_enabled()):
        fewest, most = _FEWEST_QUERIES_IN_TRAINING, _MOST_TOKENS_IN_TRAINING * query.shape[3]
    elif module.qkv_proj is not None:
        fewest, most = _FEWEST_QUERIES, length
    else:
        return False
    return length <= most and query.shape[1] * length >= fewest * torch.get_num_threads()


@functools.cache
def _fused_kernel_is_slow() -> bool:
    """In bfloat16 with AVX-512 but without AMX, as on AMD processors: slower than products and a softmax."""
    if not hasattr(torch.cpu, "get_capabilities"):  # an older PyTorch
        return False
    able = torch.cpu.get_capabilities()
    return able.get("avx512_bf16", False) and not able.get("amx_bf16", False)

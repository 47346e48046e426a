"""Attention of the RADIO vision transformer, by the kernel that is the fastest for its length and dtype."""

import functools

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .inputs_radio import can_read_values

_FEWEST_TOKENS = 64  # below, torch's fused kernel is faster everywhere
_MOST_TOKENS_IN_TRAINING = 1024  # above, weights would be most of what is kept for the backward pass
_MOST_WEIGHTS = 2**21  # at a time: 4 MiB, which stay in the cache of a core


def attention_forward(
    module: nn.Module,
    implementation: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    **options,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """3 x `(B, heads, L, D/heads)` -> `(B, L, heads, D/heads)`, and the weights `(B, heads, L, L)` of "eager".

    `implementation` is one that transformers knows. While training and in fused students, whose bits need not be those
    of transformers' RADIO, "sdpa" stands for the fastest kernel, which on a CPU is not always torch's own.
    """
    is_free = module.training or module.qkv_proj is not None
    if implementation == "sdpa" and is_free and _gains_from_chunks(module, query):
        return chunked_attention_forward(module, query, key, value, **options)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    return attend(module, query, key, value, **options)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.dropout(weights.softmax(dim=-1), p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def chunked_attention_forward(module, query, key, value, attention_mask=None, scaling=1.0, dropout=0.0, **kwargs):
    """As above without a mask, for so few images, heads and queries at a time that their weights stay in the cache."""
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


def _gains_from_chunks(module: nn.Module, query: torch.Tensor) -> bool:
    length, trains = query.shape[2], module.training or torch.is_grad_enabled()
    return (
        query.dtype == torch.bfloat16
        and query.device.type == "cpu"
        and length >= _FEWEST_TOKENS
        and (length <= _MOST_TOKENS_IN_TRAINING or not trains)
        and _fused_kernel_is_slow()
        and can_read_values(query)  # compiled and exported graphs keep the one operator
    )


@functools.cache
def _fused_kernel_is_slow() -> bool:
    """In bfloat16 with AVX-512 but without AMX, as on AMD processors: half as fast as products and a softmax."""
    if not hasattr(torch.cpu, "get_capabilities"):  # an older PyTorch
        return False
    able = torch.cpu.get_capabilities()
    return able.get("avx512_bf16", False) and not able.get("amx_bf16", False)

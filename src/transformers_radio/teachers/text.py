"""Text towers of teachers: a list of texts in, embeddings in the space of the teacher's summaries out."""

from typing import Any

import torch
from torch import nn

TEXT_BATCH = 256


class TextEncoder(nn.Module):
    """A text tower with its tokenizer, frozen and in eval mode. A subclass implements `encode`."""

    def __init__(self, model: nn.Module, tokenizer: Any):
        super().__init__()
        self.model: Any = model.requires_grad_(False)
        self.tokenizer = tokenizer
        self.eval()

    def encode(self, texts: list[str]) -> torch.Tensor:
        """Embeddings (n, dim) of at most `TEXT_BATCH` texts, in any dtype."""
        raise NotImplementedError(f"{type(self).__name__} must implement encode(texts) -> (n, dim)")

    @torch.no_grad()
    def forward(self, texts: list[str]) -> torch.Tensor:
        """N texts -> (N, dim), float32 and not L2-normalized.

        Raises:
            ValueError: for one string instead of a list, or an empty list.
        """
        if isinstance(texts, str) or not texts:
            raise ValueError(f"texts must be a list of at least one string, got {texts!r}")
        batches = (texts[start : start + TEXT_BATCH] for start in range(0, len(texts), TEXT_BATCH))
        return torch.cat([self.encode(batch).float() for batch in batches])

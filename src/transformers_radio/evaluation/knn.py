"""k-NN top-1 accuracy over summaries (paper, Section 3.1 and Table 1; k and temperature as in DINO)."""

import torch
import torch.nn.functional as F
from tqdm import tqdm

from .features import check_labelled


@torch.no_grad()
def knn_accuracy(
    bank: torch.Tensor,
    bank_labels: torch.Tensor,
    queries: torch.Tensor,
    query_labels: torch.Tensor,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int | None = None,
    chunk_size: int = 4096,
) -> float:
    """Percent of the queries whose k nearest bank entries elect the right label.

    Nearest means the largest cosine similarity s, and each neighbour votes exp(s / temperature) for its own label.
    Equal votes go to the lowest class index. Which of several equally similar entries takes the last of the k places
    is left to `torch.topk`; it matters only when a bank holds copies of one image under different labels.

    Args:
        bank, queries: (N, D) and (M, D), any float dtype and any scale. Work happens in float32 on the queries'
            device, a block of chunk_size x chunk_size similarities at a time, so the bank may stay in CPU memory.
        bank_labels, query_labels: integers (N,) and (M,), from 0.
        num_classes: one more than the largest label unless given.

    Raises:
        ValueError: empty, non-finite or mismatched inputs, k outside 1..N, a non-positive temperature or chunk size.
    """
    check_labelled(bank, bank_labels, "bank vectors")
    check_labelled(queries, query_labels, "query vectors")
    if bank.shape[1] != queries.shape[1]:
        raise ValueError(f"The bank has {bank.shape[1]} dimensions, the queries {queries.shape[1]}: use one encoder.")
    if not 1 <= k <= len(bank):
        raise ValueError(f"k is {k}; expected 1 to {len(bank)}, the number of bank vectors.")
    if temperature <= 0 or chunk_size < 1:
        raise ValueError(f"temperature ({temperature}) must be above 0 and chunk_size ({chunk_size}) at least 1.")
    largest = max(int(bank_labels.max()), int(query_labels.max()))
    num_classes = largest + 1 if num_classes is None else num_classes
    if largest >= num_classes:
        raise ValueError(f"A label is {largest} but num_classes is {num_classes}; expected labels below it.")

    correct = 0
    for start in tqdm(range(0, len(queries), chunk_size), desc=f"{k}-NN", unit="chunk"):
        query = F.normalize(queries[start : start + chunk_size].float(), dim=1)
        target = query_labels[start : start + chunk_size].to(query.device).long()
        similarity = query.new_empty(len(query), 0)
        labels = target.new_empty(len(query), 0)
        # The running k best of the bank so far compete with each next chunk of it.
        for bank_start in range(0, len(bank), chunk_size):
            entries = F.normalize(bank[bank_start : bank_start + chunk_size].to(query), dim=1)
            entry_labels = bank_labels[bank_start : bank_start + chunk_size].to(target)
            similarity = torch.cat([similarity, query @ entries.T], dim=1)
            labels = torch.cat([labels, entry_labels.expand(len(query), -1)], dim=1)
            similarity, best = similarity.topk(min(k, similarity.shape[1]), dim=1)  # sorted, largest first
            labels = labels.gather(1, best)
        # Relative to the nearest neighbour: the same election, and no overflow at a small temperature.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(query), num_classes).scatter_add_(1, labels, weights)
        correct += int((votes.argmax(dim=1) == target).sum())
    return 100 * correct / len(queries)

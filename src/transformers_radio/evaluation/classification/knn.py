"""k-NN top-1 accuracy over summaries (paper, Section 3.1 and Table 1; k and temperature as in DINO)."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate.utils import reduce
from tqdm.auto import tqdm

from transformers_radio.evaluation.images.labelled import check_labelled
from transformers_radio.evaluation.images.summaries import SummaryStore
from transformers_radio.evaluation.processes import process_state

QUERY_ROWS = 1024  # of a block: enough for a matrix product to be fast


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

    device = queries.device
    correct = 0
    for start in tqdm(range(0, len(queries), chunk_size), desc=f"{k}-NN", unit="chunk"):
        chunks = zip(bank.split(chunk_size), bank_labels.split(chunk_size), strict=True)
        blocks = [queries[start : start + chunk_size]]
        (predictions,) = knn_predictions(chunks, blocks, k, temperature, num_classes, device)
        correct += int((predictions == query_labels[start : start + chunk_size].to(device)).sum())
    return 100 * correct / len(queries)


@torch.no_grad()
def knn_predictions(
    bank_chunks: Iterable[tuple[torch.Tensor, torch.Tensor]],
    queries: Sequence[torch.Tensor],
    k: int,
    temperature: float,
    num_classes: int,
    device: torch.device,
) -> list[torch.Tensor]:
    """The class that each query's neighbours elect, one pass over the bank.

    Args:
        bank_chunks: (vectors (n, D), labels (n,)), at least k rows in all.
        queries: blocks (m, D).

    Returns:
        int64 (m,) for each block, on `device`.
    """
    blocks = [F.normalize(block.to(device).float(), dim=1) for block in queries]
    best = [
        (block.new_empty(len(block), 0), torch.empty(len(block), 0, dtype=torch.int64, device=device))
        for block in blocks
    ]
    # The k best of the bank so far compete with those of each next chunk.
    for vectors, chunk_labels in bank_chunks:
        entries = F.normalize(vectors.to(device).float(), dim=1)
        entry_labels = chunk_labels.to(device).long()
        for number, block in enumerate(blocks):
            nearest, order = (block @ entries.T).topk(min(k, len(entries)), dim=1)
            similarity = torch.cat([best[number][0], nearest], dim=1)
            labels = torch.cat([best[number][1], entry_labels[order]], dim=1)
            similarity, order = similarity.topk(min(k, similarity.shape[1]), dim=1)  # sorted, largest first
            best[number] = (similarity, labels.gather(1, order))
    return [_elect(similarity, labels, temperature, num_classes) for similarity, labels in best]


def _elect(similarity: torch.Tensor, labels: torch.Tensor, temperature: float, num_classes: int) -> torch.Tensor:
    """(m, k) similarities, largest first, and labels -> (m,)."""
    # Relative to the nearest neighbour: the same election, and no overflow at a small temperature.
    weights = ((similarity - similarity[:, :1]) / temperature).exp()
    votes = weights.new_zeros(len(weights), num_classes).scatter_add_(1, labels, weights)
    return votes.argmax(dim=1)


@dataclass
class SearchPlan:
    """How a search fits into memory: rows of a block of queries, blocks a pass over the bank, rows of a bank chunk."""

    query_rows: int
    blocks_a_pass: int
    bank_rows: int


def plan_search(memory_bytes: float, dim: int, k: int, num_classes: int) -> SearchPlan:
    """Half of the memory holds queries, the other half a chunk of the bank and its similarities to one block.

    Raises:
        ValueError: not even one query or one row of the bank fits.
    """
    half = memory_bytes / 4 / 2  # float32 numbers
    query_width = 2 * dim + 3 * k + num_classes  # vector, also normalised; similarities, labels of the k best; votes
    query_rows = min(QUERY_ROWS, int(half / query_width))
    bank_width = 3 * dim + query_rows  # as stored, as float32, normalised; similarities to a block
    if query_rows < 1 or half < bank_width:
        least = 2 * 4 * max(query_width, 3 * dim + 1)
        raise ValueError(
            f"{memory_bytes / 1e9:.3g} GB are too little to search {dim} dimensions and {num_classes} classes; "
            f"expected some multiple of {least / 1e9:.3g} GB."
        )
    return SearchPlan(query_rows, max(1, int(half / (query_rows * query_width))), int(half / bank_width))


def knn_accuracy_of_stores(
    bank: SummaryStore, queries: SummaryStore, k: int, temperature: float, num_classes: int, memory_bytes: float
) -> float:
    """`knn_accuracy` of summaries on disk, in as much memory as is given, over all processes of `accelerate launch`.

    Blocks of queries are dealt out to the processes, each of which reads the whole bank, once where its queries fit
    into half of the memory. The blocks do not depend on the number of processes, so the result has the same bits.

    Args:
        memory_bytes: for vectors and similarities, in each process (of a GPU: its memory); pages of the files that
            the system keeps are not counted.

    Raises:
        ValueError: k outside 1..N, other dimensions of bank and queries, too little memory.
    """
    if bank.dim != queries.dim:
        raise ValueError(f"The bank has {bank.dim} dimensions, the queries {queries.dim}: use one encoder.")
    if not 1 <= k <= len(bank):
        raise ValueError(f"k is {k}; expected 1 to {len(bank)}, the number of bank vectors.")
    state = process_state()
    plan = plan_search(memory_bytes, bank.dim, k, num_classes)
    blocks = itertools.islice(queries.chunks(plan.query_rows), state.process_index, None, state.num_processes)
    correct = torch.zeros((), dtype=torch.int64, device=state.device)
    while held := list(itertools.islice(blocks, plan.blocks_a_pass)):
        rows = sum(len(labels) for _, labels in held)
        chunks = _shown(bank, plan.bank_rows, f"{k}-NN of {rows} queries", not state.is_main_process)
        vectors = [vectors for vectors, _ in held]
        predictions = knn_predictions(chunks, vectors, k, temperature, num_classes, state.device)
        for predicted, (_, labels) in zip(predictions, held, strict=True):
            correct += (predicted == labels.to(state.device)).sum()
    correct = reduce(correct, "sum")
    return 100 * int(correct) / len(queries)


def _shown(
    store: SummaryStore, rows: int, description: str, hidden: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    with tqdm(desc=description, unit="bank vectors", total=len(store), disable=hidden) as progress:
        for vectors, labels in store.chunks(rows):
            yield vectors, labels
            progress.update(len(labels))

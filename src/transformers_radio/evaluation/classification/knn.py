"""k-NN top-1 accuracy over summaries (paper, Section 3.1 and Table 1; k and temperature as in DINO)."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import PartialState
from tqdm.auto import tqdm

from transformers_radio.evaluation.images.summaries import SummaryStore
from transformers_radio.evaluation.processes import process_state

from .metrics import SummaryAccuracy, check_labeled

QUERY_ROWS = 1024  # of a block: enough for a matrix product to be fast


class KnnAccuracy(SummaryAccuracy):
    """Percent of the summaries whose k nearest bank entries elect the right class; a metric of `evaluate`.

    Nearest means the largest cosine similarity s, and each neighbor votes exp(s / temperature) for its own label.
    Equal votes go to the lowest class index. Which of several equally similar entries takes the last of the k places
    is left to `torch.topk`; it matters only when a bank holds copies of one image under different labels.

        metric = KnnAccuracy(bank, bank_labels)
        for images, labels in batches:
            metric.add_batch(predictions=encoder.summary(images), references=labels)
        metric.compute()  # {"knn_accuracy": 83.4, "images": 50000}

    Args:
        bank: summaries (N, D), any float dtype and any scale, or a `SummaryStore`. Every batch is compared with all
            of it, in float32 on the device of the batch, so make batches large.
        bank_labels: integers (N,), from 0; a store has its own.
        num_classes: one more than the largest label of the bank unless given.
        chunk_size: rows of the bank that are compared at once; the bank may stay in CPU memory or on disk.

    Raises:
        ValueError: an empty or non-finite bank, k outside 1..N, a non-positive temperature or chunk size.
    """

    score_name = "knn_accuracy"
    description = "Accuracy of a weighted k-NN vote over cosine similarities of summaries, in percent."

    def __init__(
        self,
        bank: torch.Tensor | SummaryStore,
        bank_labels: torch.Tensor | None = None,
        k: int = 20,
        temperature: float = 0.07,
        num_classes: int | None = None,
        chunk_size: int = 65536,
    ):
        if isinstance(bank, SummaryStore):
            self.dim, bank_labels = bank.dim, bank.labels
        else:
            assert bank_labels is not None
            check_labeled(bank, bank_labels, "bank vectors")
            self.dim = bank.shape[1]
        if not 1 <= k <= len(bank):
            raise ValueError(f"k is {k}; expected 1 to {len(bank)}, the number of bank vectors.")
        if temperature <= 0 or chunk_size < 1:
            raise ValueError(f"temperature ({temperature}) must be above 0 and chunk_size ({chunk_size}) at least 1.")
        self.bank, self.bank_labels, self.k = bank, bank_labels, k
        self.temperature, self.chunk_size = temperature, chunk_size
        super().__init__(int(bank_labels.max()) + 1 if num_classes is None else num_classes)

    def _predict(self, blocks: list[torch.Tensor]) -> list[torch.Tensor]:
        for block in blocks:
            _check_dimensions(self.dim, block.shape[1])
        chunks = self._bank_chunks(sum(map(len, blocks)))
        return knn_predictions(chunks, blocks, self.k, self.temperature, self.num_classes)

    def _bank_chunks(self, queries: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields (vectors, labels) of the bank; a store, which may take minutes to read, with a progress bar."""
        if not isinstance(self.bank, SummaryStore):
            yield from zip(self.bank.split(self.chunk_size), self.bank_labels.split(self.chunk_size), strict=True)
            return
        title, hidden = f"{self.k}-NN of {queries} queries", not PartialState().is_main_process
        with tqdm(desc=title, unit="bank vectors", total=len(self.bank), disable=hidden) as progress:
            for vectors, labels in self.bank.chunks(self.chunk_size):
                yield vectors, labels
                progress.update(len(labels))


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
    """Percent of the queries whose k nearest bank entries elect the right label; see `KnnAccuracy`.

    Args:
        bank, queries: (N, D) and (M, D), any float dtype and any scale. Work happens in float32 on the queries'
            device, a block of chunk_size x chunk_size similarities at a time, so the bank may stay in CPU memory.
        bank_labels, query_labels: integers (N,) and (M,), from 0.
        num_classes: one more than the largest label unless given.

    Raises:
        ValueError: empty, non-finite or mismatched inputs, k outside 1..N, a non-positive temperature or chunk size.
    """
    check_labeled(bank, bank_labels, "bank vectors")
    check_labeled(queries, query_labels, "query vectors")
    _check_dimensions(bank.shape[1], queries.shape[1])
    largest = max(int(bank_labels.max()), int(query_labels.max()))
    num_classes = largest + 1 if num_classes is None else num_classes
    if largest >= num_classes:
        raise ValueError(f"A label is {largest} but num_classes is {num_classes}; expected labels below it.")
    metric = KnnAccuracy(bank, bank_labels, k, temperature, num_classes, chunk_size)
    for start in tqdm(range(0, len(queries), chunk_size), desc=f"{k}-NN", unit="chunk"):
        chunk = slice(start, start + chunk_size)
        metric.add_batch(predictions=queries[chunk], references=query_labels[chunk])
    return metric.compute()["knn_accuracy"]


def _check_dimensions(bank: int, queries: int) -> None:
    if bank != queries:
        raise ValueError(f"The bank has {bank} dimensions, the queries {queries}: use one encoder.")


@torch.no_grad()
def knn_predictions(
    bank_chunks: Iterable[tuple[torch.Tensor, torch.Tensor]],
    queries: Sequence[torch.Tensor],
    k: int,
    temperature: float,
    num_classes: int,
) -> list[torch.Tensor]:
    """The class that each query's neighbors elect, from one pass over the bank.

    Args:
        bank_chunks: (vectors (n, D), labels (n,)), at least k rows in all.
        queries: blocks (m, D), all on one device, on which the work happens.

    Returns:
        int64 (m,) for each block, on its device.
    """
    device = queries[0].device
    blocks = [F.normalize(block.float(), dim=1) for block in queries]
    best = [
        (block.new_empty(len(block), 0), torch.empty(len(block), 0, dtype=torch.int64, device=device))
        for block in blocks
    ]
    # the k best of the bank so far compete with those of each next chunk
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
    # relative to the nearest neighbor: the same election, and no overflow at a small temperature.
    weights = ((similarity - similarity[:, :1]) / temperature).exp()
    votes = weights.new_zeros(len(weights), num_classes).scatter_add_(1, labels, weights)
    return votes.argmax(dim=1)


@dataclass
class SearchPlan:
    """How a search fits into memory."""

    query_rows: int  # of a block
    blocks_per_pass: int  # over the bank
    bank_rows: int  # of a chunk


def plan_search(memory_bytes: float, dim: int, k: int, num_classes: int) -> SearchPlan:
    """Half of the memory holds queries, the other half a chunk of the bank and its similarities to one block.

    Raises:
        ValueError: not even one query or one row of the bank fits.
    """
    half = memory_bytes / 4 / 2  # float32 numbers
    query_width = 2 * dim + 3 * k + num_classes  # vector, also normalized; similarities, labels of the k best; votes
    query_rows = min(QUERY_ROWS, int(half / query_width))
    bank_width = 3 * dim + query_rows  # as stored, as float32, normalized; similarities to a block
    if query_rows < 1 or half < bank_width:
        least = 2 * 4 * max(query_width, 3 * dim + 1)
        raise ValueError(
            f"{memory_bytes / 1e9:.3g} GB are too little to search {dim} dimensions and {num_classes} classes; "
            f"expected several times {least / 1e9:.3g} GB."
        )
    return SearchPlan(query_rows, max(1, int(half / (query_rows * query_width))), int(half / bank_width))


def knn_accuracy_of_stores(
    bank: SummaryStore, queries: SummaryStore, k: int, temperature: float, num_classes: int, memory_bytes: float
) -> float:
    """`KnnAccuracy` of summaries on disk, in as much memory as is given, over all processes of `accelerate launch`.

    Blocks of queries are dealt out to the processes, each of which reads the whole bank, once where its queries fit
    into half of the memory. The blocks do not depend on the number of processes, so the result has the same bits.

    Args:
        memory_bytes: for vectors and similarities, in each process (on a GPU: its memory); pages of the files that
            the system keeps are not counted.

    Raises:
        ValueError: k outside 1..N, other dimensions of bank and queries, too little memory.
    """
    _check_dimensions(bank.dim, queries.dim)
    state = process_state()
    plan = plan_search(memory_bytes, bank.dim, k, num_classes)
    metric = KnnAccuracy(bank, None, k, temperature, num_classes, plan.bank_rows)
    blocks = itertools.islice(queries.chunks(plan.query_rows), state.process_index, None, state.num_processes)
    while held := list(itertools.islice(blocks, plan.blocks_per_pass)):
        metric.add_blocks([(vectors.to(state.device), labels) for vectors, labels in held])
    metric.sum_over_processes()
    return metric.compute()["knn_accuracy"]

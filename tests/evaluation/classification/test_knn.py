"""k-NN against scikit-learn and hand-counted elections."""

import json
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from accelerate import PartialState
from safetensors.torch import save_file
from sklearn.neighbors import KNeighborsClassifier

from helpers.classification_world import run_processes
from transformers_radio.evaluation import knn_accuracy
from transformers_radio.evaluation.classification.knn import KnnAccuracy, knn_accuracy_of_stores, plan_search
from transformers_radio.evaluation.images.summaries import SummaryStore

torch.set_num_threads(1)  # as in the processes that the tests start: bits are equal only for the same number


def clusters(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(6, 12, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(0, 6, (count,), generator=generator)
    vectors = centers[labels] + 1.6 * torch.randn(count, 12, generator=generator)
    return vectors * torch.rand(count, 1, generator=generator).add(0.1), labels  # lengths must not matter


@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_equals_scikit_learn(k, temperature):
    bank, bank_labels = clusters(300, seed=0)
    queries, query_labels = clusters(150, seed=1)
    reference = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
    ).fit(bank.double().numpy(), bank_labels.numpy())
    expected = 100 * reference.score(queries.double().numpy(), query_labels.numpy())
    assert 30 < expected < 95  # neither trivial nor chance
    for chunk_size in (7, 128, 4096):
        accuracy = knn_accuracy(
            bank, bank_labels, queries, query_labels, k=k, temperature=temperature, chunk_size=chunk_size
        )
        assert accuracy == pytest.approx(expected, abs=1e-9)


def test_votes_are_weighted_and_ties_go_to_the_lowest_class():
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    query = torch.tensor([[1.0, 0.9]])
    near = dict(bank=bank, bank_labels=torch.tensor([1, 0, 0]), queries=query, k=3)
    # Two votes at cosine .669 beat one at .743 when the temperature is high, and lose when it is low.
    assert knn_accuracy(**near, query_labels=torch.tensor([0]), temperature=1.0) == 100
    assert knn_accuracy(**near, query_labels=torch.tensor([1]), temperature=0.07) == 100
    assert knn_accuracy(**near, query_labels=torch.tensor([1]), temperature=1e-4) == 100  # exp(1 / T) overflows
    tied = knn_accuracy(
        torch.eye(2), torch.tensor([4, 2]), torch.ones(1, 2), torch.tensor([2]), k=2, num_classes=9, chunk_size=1
    )
    assert tied == 100


def test_byte_labels_do_not_wrap_around():
    accuracy = knn_accuracy(
        torch.eye(2), torch.tensor([300, 1]), torch.eye(2), torch.tensor([44, 1], dtype=torch.uint8), k=1
    )
    assert accuracy == 50  # 300 is 44 in a byte


def test_no_block_is_larger_than_a_chunk(monkeypatch):
    bank, bank_labels = clusters(200, seed=0)
    widths = []
    topk = torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda self, *a, **kw: widths.append(self.shape) or topk(self, *a, **kw))
    knn_accuracy(bank, bank_labels, bank[:50], bank_labels[:50], k=5, chunk_size=16)
    assert len(widths) == 2 * 4 * 13  # of every chunk of the bank, then with the best so far
    assert max(rows for rows, _ in widths) == 16 and max(columns for _, columns in widths) == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k is 0; expected 1 to 4"),
        ({"k": 5}, "k is 5; expected 1 to 4"),
        ({"bank": torch.ones(0, 3), "bank_labels": torch.ones(0).long()}, "at least one row"),
        ({"queries": torch.ones(2, 5)}, "3 dimensions, the queries 5"),
        ({"query_labels": torch.tensor([1])}, "2 query vectors but labels of shape"),
        ({"bank_labels": torch.tensor([0, 1, -1, 0])}, "integers from 0"),
        ({"bank_labels": torch.ones(4)}, "integers from 0"),
        ({"queries": torch.tensor([[1, torch.nan, 0], [0, 0, 1]])}, "NaN"),
        ({"num_classes": 1}, "A label is 1 but num_classes is 1"),
        ({"temperature": 0}, r"temperature \(0\) must be above 0"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = dict(bank=torch.ones(4, 3), bank_labels=torch.tensor([0, 1, 1, 0]), queries=torch.ones(2, 3))
    arguments |= dict(query_labels=torch.tensor([0, 1]), k=2)
    with pytest.raises(ValueError, match=message):
        knn_accuracy(**(arguments | change))


def make_store(folder, vectors, labels, block=50):
    """The files that `store_summaries` leaves."""
    folder.mkdir()
    for number, (part, part_labels) in enumerate(zip(vectors.split(block), labels.split(block), strict=True)):
        tensors = {"summaries": part.contiguous(), "labels": part_labels.contiguous()}
        save_file(tensors, folder / f"00000-{number:05d}.safetensors", metadata={"skipped": "{}"})
    (folder / "00000.json").write_text(json.dumps({"blocks": number + 1}))
    return SummaryStore(folder)


@pytest.mark.parametrize("memory", [30e3, 100e3, 1e9])
def test_stores_equal_scikit_learn_in_any_memory(memory, tmp_path):
    bank, bank_labels = clusters(2000, seed=0)
    queries, query_labels = clusters(1500, seed=1)
    plan = plan_search(memory, 12, 20, 6)
    passes = -(-1500 // (plan.query_rows * plan.blocks_per_pass))
    assert (passes, plan.bank_rows < 2000) == {30e3: (37, True), 100e3: (11, True), 1e9: (1, False)}[memory]
    reference = KNeighborsClassifier(
        20, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(bank.double().numpy(), bank_labels.numpy())
    expected = 100 * reference.score(queries.double().numpy(), query_labels.numpy())
    stores = make_store(tmp_path / "bank", bank, bank_labels), make_store(tmp_path / "queries", queries, query_labels)
    assert knn_accuracy_of_stores(*stores, 20, 0.07, 6, memory) == pytest.approx(expected, abs=1e-9)


def score(folder, path):
    stores = SummaryStore(folder / "bank"), SummaryStore(folder / "queries")
    path.parent.mkdir(exist_ok=True)
    accuracy = knn_accuracy_of_stores(*stores, 20, 0.07, 6, 100e3)
    (path.parent / f"{path.name}.{PartialState().process_index}").write_text(repr(accuracy))


def test_two_processes_count_as_one(tmp_path):
    make_store(tmp_path / "bank", *clusters(500, seed=0))
    make_store(tmp_path / "queries", *clusters(431, seed=1))  # blocks and queries that do not divide by two
    score(tmp_path, tmp_path / "one" / "score")
    run_processes(score, tmp_path, tmp_path / "two" / "score")
    expected = (tmp_path / "one" / "score.0").read_text()
    assert [(tmp_path / "two" / f"score.{rank}").read_text() for rank in range(2)] == [expected] * 2
    assert 30 < float(expected) < 95


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
def test_a_bank_larger_than_the_memory_given(tmp_path):
    """160 MB of bank in 24 MB: the process grows by less than the bank."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(10, 1024, generator=generator)
    for number in range(8):
        labels = torch.randint(0, 10, (5000,), generator=generator)
        vectors = directions[labels] + torch.randn(5000, 1024, generator=generator)
        make_store(tmp_path / str(number), vectors, labels, block=500)
    del vectors
    bank_files = [path for number in range(8) for path in SummaryStore(tmp_path / str(number)).files]
    bank = SummaryStore(tmp_path / "0")
    bank.files, bank.labels = bank_files, torch.cat([SummaryStore(tmp_path / str(n)).labels for n in range(8)])
    labels = torch.arange(100) % 10
    queries = make_store(tmp_path / "queries", directions[labels], labels)
    before = memory_of("RssAnon")
    peaks = []
    chunks = bank.chunks

    def watched(rows):
        for chunk in chunks(rows):
            yield chunk
            peaks.append(memory_of("RssAnon"))

    bank.chunks = watched
    assert knn_accuracy_of_stores(bank, queries, 20, 0.07, 10, 24e6) == 100
    assert len(bank) == 40000 and len(peaks) > 40
    assert max(peaks) - before < 40e6


def memory_of(field):
    """Bytes, as Linux counts them for this process; RssAnon leaves out pages of files."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024


def test_the_papers_bank_fits_4_gb():
    plan = plan_search(4e9, 3840, 20, 1000)
    assert (
        plan.query_rows == 1024 and plan.query_rows * plan.blocks_per_pass >= 50_000
    )  # ImageNet's validation, one pass
    assert 20_000 < plan.bank_rows
    with pytest.raises(ValueError, match="1e-05 GB are too little to search 3840 dimensions and 1000 classes"):
        plan_search(1e4, 3840, 20, 1000)


def test_stores_that_do_not_fit_are_named(tmp_path):
    bank = make_store(tmp_path / "bank", torch.ones(4, 3), torch.tensor([0, 1, 1, 0]))
    other = make_store(tmp_path / "other", torch.ones(2, 5), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="3 dimensions, the queries 5"):
        knn_accuracy_of_stores(bank, other, 2, 0.07, 2, 1e9)
    with pytest.raises(ValueError, match="k is 5; expected 1 to 4"):
        knn_accuracy_of_stores(bank, bank, 5, 0.07, 2, 1e9)


def test_the_metric_of_evaluate_is_the_function():
    bank, bank_labels = clusters(300, seed=0)
    queries, query_labels = clusters(150, seed=1)
    metric = KnnAccuracy(bank, bank_labels, k=5, chunk_size=64)
    assert isinstance(metric, evaluate.Metric)
    for start in range(0, 140, 20):
        metric.add_batch(predictions=queries[start : start + 20], references=query_labels[start : start + 20])
    for row in range(140, 150):
        metric.add(prediction=queries[row].tolist(), reference=int(query_labels[row]))
    assert len(metric) == 150
    expected = knn_accuracy(bank, bank_labels, queries, query_labels, k=5)
    assert metric.compute() == {"knn_accuracy": pytest.approx(expected, abs=1e-9), "images": 150}
    scores = metric.compute(predictions=queries[:10].numpy(), references=query_labels[:10].numpy())
    assert scores["images"] == 10
    with pytest.raises(ValueError, match="no image to score"):
        metric.compute()
    with pytest.raises(ValueError, match="label is 6, but there are only 6 classes"):
        metric.add_batch(predictions=queries[:1], references=torch.tensor([6]))
    with pytest.raises(ValueError, match="bank has 12 dimensions, the queries 3"):
        metric.add_batch(predictions=torch.ones(1, 3), references=torch.tensor([0]))
    with pytest.raises(ValueError, match="k is 301"):
        KnnAccuracy(bank, bank_labels, k=301)

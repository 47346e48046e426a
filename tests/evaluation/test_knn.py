"""k-NN against scikit-learn and hand-counted elections."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from transformers_radio.evaluation import knn_accuracy


def clusters(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(6, 12, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(0, 6, (count,), generator=generator)
    vectors = centres[labels] + 1.6 * torch.randn(count, 12, generator=generator)
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

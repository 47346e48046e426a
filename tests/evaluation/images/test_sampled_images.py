"""Drawing from sources that are read part by part."""

import pytest

from transformers_radio.evaluation.images import sampled as labelled_files
from transformers_radio.evaluation.images.sampled import shuffled


class Parts:
    """Rows numbered through, in three parts of ten."""

    def __init__(self, content: bytes | None):
        self.content = content

    def rows(self, shard):
        for label in range(10 * shard, 10 * shard + 10):
            yield {"bytes": self.content, "path": None}, label


@pytest.mark.parametrize("content", [b"encoded", None])
def test_every_row_comes_once_in_an_order_of_the_seed(content, monkeypatch):
    monkeypatch.setattr(labelled_files, "FILES_SHUFFLED", 4)
    orders = [[label for _, label in shuffled(3, Parts(content).rows, seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    for order in orders:
        assert sorted(order) == list(range(30)) != order
    first = {label // 10 for label in orders[0][:6]}
    # encoded images: few are held, so the first ones are of the first part; paths: of any
    assert len(first) == 1 if content else len(first) > 1

"""Position tables against numpy's cosines, and what the figure shows of a table made by hand."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics.pairwise import cosine_similarity

from transformers_radio.modeling import RadioConfig, RadioModel
from transformers_radio.visualization.positions import position_similarity, position_table, positions_figure


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = RadioConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=4, max_img_size=24)
    return RadioModel(config).eval()


def test_table_is_the_model_s_own_in_rows_and_columns(model):
    table = position_table(model)
    assert table.shape == (6, 6, 16)
    assert torch.equal(table[2, 5], model.embeddings.position_embedding[0, 2 * 6 + 5])
    # at the table's own resolution the model adds exactly this to its patches
    torch.testing.assert_close(table.flatten(0, 1), model.embeddings.positions(1, 6, 6, torch.float32)[0].detach())


def test_similarity_equals_scikit_learn(model):
    table = position_table(model)
    flat = table.reshape(36, 16).double().numpy()
    expected = cosine_similarity(flat - flat.mean(axis=0))[4 * 6 + 1].reshape(6, 6)
    found = position_similarity(table, 4, 1)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.argmax() == 4 * 6 + 1


def test_figure_shows_neighbors_brighter_and_one_row_a_model(model, tmp_path):
    with torch.no_grad():  # Gaussian bumps: near places are similar, far ones are not
        places = torch.cartesian_prod(torch.arange(6.0), torch.arange(6.0))
        centers = torch.cartesian_prod(torch.linspace(0, 5, 4), torch.linspace(0, 5, 4))
        model.embeddings.position_embedding.copy_((-torch.cdist(places, centers).square() / 4).exp()[None] + 3)
    path = positions_figure({"one": model, "two": model}, tmp_path / "positions.png")
    pixels = np.asarray(Image.open(path).convert("L")).astype(int)
    side, gap, left, top = 256, 9.6, 60.8, 86.4  # 160 dpi
    assert pixels.shape[0] == pytest.approx(2 * (side + gap) + top + 9, abs=2)
    for column, (y, x) in {1: (0.2, 0.2), 2: (0.2, 0.8), 4: (0.8, 0.2), 5: (0.8, 0.8)}.items():
        at = round(left + column * (side + gap))
        for row in range(2):
            start = round(top + row * (side + gap))
            shown = pixels[start : start + side, at : at + side]
            near = shown[int(y * side) - 40 : int(y * side) + 40, int(x * side) - 40 : int(x * side) + 40]
            far = shown[int((1 - y) * side) - 40 : int((1 - y) * side) + 40]
            far = far[:, int((1 - x) * side) - 40 : int((1 - x) * side) + 40]
            assert near.mean() > far.mean() + 40

import pytest
import torch

from transformers_radio.training.phi_s.hadamard import hadamard

SIZES = (1, 2, 4, 12, 20, 28, 36, 44, 64, 128, 192, 256, 384, 512, 768, 1024, 1152, 1280, 1408, 1536, 4096)


@pytest.mark.parametrize("n", SIZES)
def test_hadamard_matrices_are_orthonormal_with_entries_of_one_size(n):
    matrix = hadamard(n)
    assert matrix.shape == (n, n) and matrix.dtype == torch.float64
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, n**-0.5), rtol=1e-15, atol=0)
    # H H^T = n I on random vectors (Freivalds' check): a wrong product passes once in 2^32. Whole numbers, so exact.
    signs, vectors = matrix.sign(), torch.randint(2, (n, 32), generator=torch.Generator().manual_seed(0)).double()
    assert torch.equal(signs @ (signs.T @ vectors), n * vectors)


def test_a_size_without_a_hadamard_matrix_is_named_with_its_neighbours():
    # 92 exists (Baumert, Golomb and Hall 1962), but not by Paley's and Sylvester's rules.
    for n, near in ((90, "88 and 96"), (92, "88 and 96"), (3, "2 and 4"), (0, "1")):
        with pytest.raises(ValueError, match=rf"size {n} .*such as {near}$"):
            hadamard(n)

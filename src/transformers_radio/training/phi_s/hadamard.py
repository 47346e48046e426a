"""Hadamard matrices of the widths that vision transformers have, for PHI-S (Sylvester 1867, Paley 1933)."""

import torch


def hadamard(n: int) -> torch.Tensor:
    """An orthonormal matrix (n, n) of entries +-1/sqrt(n), float64: a Paley matrix, doubled by Sylvester's rule.

    Raises:
        ValueError: no matrix of that size can be built this way; the message names the sizes next to it.
    """
    order = _base_order(n)
    if order is None:
        sizes = [size for size in range(1, 2 * max(n, 1) + 1) if _base_order(size)]
        near = [str(size) for size in (*[s for s in sizes if s < n][-1:], *[s for s in sizes if s > n][:1])]
        raise ValueError(
            f"no Hadamard matrix of size {n} here; possible are 2^k, 2^k (q + 1) with a prime q = 3 mod 4 and "
            f"2^k 2 (q + 1) with a prime q = 1 mod 4, such as {' and '.join(near)}"
        )
    matrix = _paley(order)
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / n**0.5


def _base_order(n: int) -> int | None:
    """The smallest of n, n / 2, n / 4, ... that is 1 or the order of a Paley matrix."""
    halves = [n >> k for k in range(max(n, 0).bit_length()) if n % (1 << k) == 0]
    return next((order for order in reversed(halves) if order == 1 or _paley_prime(order)), None)


def _paley_prime(order: int) -> int | None:
    """The prime q of Paley's first (order q + 1, q = 3 mod 4) or second construction (2 (q + 1), q = 1 mod 4)."""
    candidates = [order - 1] if order % 4 == 0 else []
    candidates += [order // 2 - 1] if order % 8 == 4 else []
    return next((q for q in candidates if q > 2 and all(q % d for d in range(2, int(q**0.5) + 1))), None)


def _paley(order: int) -> torch.Tensor:
    """(order, order) float64 of entries +-1."""
    q = _paley_prime(order)
    if q is None:
        return torch.ones(1, 1, dtype=torch.float64)
    character = torch.full((q,), -1.0, dtype=torch.float64)  # 1 for squares modulo q, -1 for others, 0 for 0
    character[[i * i % q for i in range(1, q)]] = 1.0
    character[0] = 0.0
    index = torch.arange(q)
    core = torch.ones(q + 1, q + 1, dtype=torch.float64)
    core[0, 0] = 0.0
    core[1:, 1:] = character[(index[:, None] - index) % q]
    if q == order - 1:  # first construction: the core is made skew
        core[1:, 0] = -1.0
        return core + torch.eye(order, dtype=torch.float64)
    off_diagonal = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(core, off_diagonal) + torch.kron(torch.eye(q + 1, dtype=torch.float64), diagonal)

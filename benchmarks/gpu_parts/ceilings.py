"""What the card can do at most: products of matrices, copies."""

from functools import partial

import torch
from measure import Case, Setup, matmul_tflops, seconds

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def cases(setup: Setup) -> list[Case]:
    sides = [64, 96] if setup.dry else [8192, 4096, 16384]
    return [
        *(
            Case(f"{name} matmul {side}", partial(matmul, DTYPES[name], side, setup))
            for side in sides
            for name in DTYPES
        ),
        *(
            Case(f"{name} matmul {sides[0]}", partial(float32_matmul, name, sides[0], setup))
            for name in ("tf32", "fp32")
        ),
        Case("copy on the device", partial(copy, setup)),
        Case("copy from pinned memory", partial(upload, setup)),
    ]


def matmul(dtype: torch.dtype, side: int, setup: Setup) -> dict[str, float]:
    return {"TFLOP/s": matmul_tflops(dtype, side, setup)}


def float32_matmul(name: str, side: int, setup: Setup) -> dict[str, float]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    matmul_tflops.cache_clear()  # the precision is not among its arguments
    try:
        return matmul(torch.float32, side, setup)
    finally:
        torch.set_float32_matmul_precision(before)


def copy(setup: Setup) -> dict[str, float]:
    """Read and written bytes both count."""
    source = torch.empty(2**20 if setup.dry else 2**32, dtype=torch.uint8, device=setup.device)
    target = torch.empty_like(source)
    return {"GB/s": 2 * source.nbytes / seconds(lambda: target.copy_(source), setup) / 1e9}


def upload(setup: Setup) -> dict[str, float]:
    """From the host to the device."""
    source = torch.empty(2**20 if setup.dry else 2**28, dtype=torch.uint8, pin_memory=setup.device.type == "cuda")
    target = torch.empty_like(source, device=setup.device)
    return {"GB/s": source.nbytes / seconds(lambda: target.copy_(source, non_blocking=True), setup) / 1e9}

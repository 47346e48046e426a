"""How the parts of `benchmarks/gpu.py` measure: seconds, memory, graphs and compilers, alike on a GPU and on a CPU."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

Run = Callable[[], Any]
GIB = 2**30


class NotThereError(Exception):
    """What is to be measured is not part of this package yet."""


@dataclass(frozen=True)
class Setup:
    """Where a part measures. A dry run differs in sizes and device alone.

    Attributes:
        device: a GPU, or the CPU in a dry run.
        dry: tiny sizes; every number is without meaning.
        until: seconds since the epoch at which the part's share of the time ends.
    """

    device: torch.device
    dry: bool
    until: float = float("inf")


@dataclass(frozen=True)
class Case:
    """One measurement: `run` returns the columns of its row, or several rows, each with a `name` of its own.

    Attributes:
        limit: seconds after which it counts as hung; a dry run waits longer.
    """

    name: str
    run: Callable[[], dict[str, Any] | list[dict[str, Any]]]
    limit: float = 60


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Run, setup: Setup, budget: float = 0.4) -> float:
    """Of one call: the median of as many as fit into `budget` seconds, at least two, after two that warm up."""
    run()
    synchronize(setup.device)
    started = time.perf_counter()
    run()
    synchronize(setup.device)
    calls = 1 if setup.dry else min(max(int(budget / (time.perf_counter() - started)), 2), 100)
    if setup.device.type != "cuda":
        times = []
        for _ in range(calls):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        return statistics.median(times)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    synchronize(setup.device)
    return statistics.median(left.elapsed_time(right) for left, right in zip(events, events[1:], strict=False)) / 1e3


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, float]]:
    """GiB that torch's allocator held at most; on a CPU 0, as nothing counts there."""
    peak = {"peak GiB": 0.0}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield peak
    if device.type == "cuda":
        synchronize(device)
        peak["peak GiB"] = torch.cuda.max_memory_allocated(device) / GIB


def free(device: torch.device) -> None:
    """Gives back what the last case has left."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def graphed(run: Run, setup: Setup) -> Run:
    """`run` as one CUDA graph; as it is on a CPU."""
    if setup.device.type != "cuda":
        return run
    side = torch.cuda.Stream(setup.device)
    side.wait_stream(torch.cuda.current_stream(setup.device))
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream(setup.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@contextmanager
def compiled_blocks(model: nn.Module, setup: Setup) -> Iterator[None]:
    """The blocks of a transformer compiled, which share one compiled function as their code is one."""
    torch.compiler.reset()  # or functions past the limit of recompilations would run as they are, without a word
    stack = blocks(model)
    for block in stack:
        block.compile(backend=compiler(setup), dynamic=False)
    try:
        yield
    finally:
        for block in stack:
            block._compiled_call_impl = None
        torch.compiler.reset()


def compiler(setup: Setup) -> str:
    return "aot_eager" if setup.dry else "inductor"


def blocks(model: nn.Module) -> list[nn.Module]:
    """The children of the stack of modules that holds the most weights."""
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    stacks = [stack for stack in stacks if len(stack) > 1]
    return list(max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters())).children())


@torch.no_grad()
def forward_flops(run: Run) -> int:
    """Two for each multiply-add of matrix products, convolutions and attention."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@lru_cache
def matmul_tflops(dtype: torch.dtype, side: int, setup: Setup) -> float:
    """TFLOP/s of a product of two square matrices of random numbers."""
    left, right = (torch.randn(side, side, device=setup.device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * side**3 / seconds(lambda: torch.mm(left, right, out=out), setup) / 1e12


def ceiling(setup: Setup) -> float:
    """TFLOP/s in bfloat16 that shares of the peak are of: measured here, not the data sheet's."""
    return matmul_tflops(torch.bfloat16, 64 if setup.dry else 8192, setup)


def share(flops: float, time_taken: float, setup: Setup) -> float:
    """Percent of `ceiling`."""
    return 100 * flops / time_taken / 1e12 / ceiling(setup)

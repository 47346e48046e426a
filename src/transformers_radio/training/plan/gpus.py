"""What GPUs can do, from data sheets; apart, so that a mistyped name is told before torch is loaded."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """Peak TFLOP/s without sparsity, in half precision with float32 sums, and in float32 outside the tensor cores (as
    PyTorch has it). Memory in GB of 10^9 bytes: a data sheet's are 7 % larger, which CUDA and fragmentation need.
    """

    half_tflops: float
    float32_tflops: float
    memory_gb: float


# NVIDIA's data sheets: A100 (2021), H100 and H200 (SXM), L40S, A10, L4, RTX A6000; for GeForce the architecture papers
# of GA102 and AD102.
GPUS = {
    "a100-40": GPU(312, 19.5, 40),
    "a100-80": GPU(312, 19.5, 80),
    "h100": GPU(989, 67, 80),
    "h200": GPU(989, 67, 141),
    "l40s": GPU(362, 91.6, 48),
    "a10": GPU(125, 31.2, 24),
    "l4": GPU(121, 30.3, 24),
    "a6000": GPU(155, 38.7, 48),
    "rtx3090": GPU(71, 35.6, 24),
    "rtx4090": GPU(165, 82.6, 24),
}


def find_gpu(name: str) -> GPU:
    """Raises ValueError with the known names."""
    if name not in GPUS:
        raise ValueError(f"gpu {name!r} is unknown; choose one of {', '.join(GPUS)}")
    return GPUS[name]

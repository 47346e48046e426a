"""Which precision a device computes fast in, and a warning for those that it does not.

A CPU without bfloat16 units computes bfloat16 products 50 to 100 times slower than float32 ones.
"""

import logging
import time
from collections.abc import Mapping

import torch

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Accelerate's names, for autocast
MIXED_PRECISION = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MEASURED_SECONDS = 0.1
MEASURED_SIDE = 192  # a product of two such matrices takes a hundredth of a second where it is slow


def is_fast(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device has units for products in `dtype`, by what torch reports. float32 is fast everywhere."""
    if dtype == torch.float32:
        return True
    if device.type == "cuda":
        # one that is only planned for has such units, as all that `plan` knows
        absent = not torch.cuda.is_available()
        return dtype == torch.float16 or absent or torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        name = "bf16" if dtype == torch.bfloat16 else "fp16"
        try:
            return bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")())
        except (AttributeError, RuntimeError):  # a torch without oneDNN
            return False
    return dtype == torch.float16  # Apple's and other accelerators; their bfloat16 may be emulated


def resolve_dtype(dtype: str, device: torch.device) -> str:
    """`auto` -> "bfloat16" where the device has units for it, else "float32"; another name as it is."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if is_fast(torch.bfloat16, device) else "float32"


def resolve_mixed_precision(mixed_precision: str, device: torch.device) -> str:
    """`auto` -> "bf16" where the device has units for it, else "no"; another name as it is."""
    if mixed_precision != "auto":
        return mixed_precision
    return "bf16" if is_fast(torch.bfloat16, device) else "no"


def slowdown(dtype: torch.dtype) -> float:
    """How many times longer a product of matrices takes on this CPU in `dtype` than in float32, measured now."""
    seconds = {}
    for each in (torch.float32, dtype):
        matrix = torch.ones(MEASURED_SIDE, MEASURED_SIDE, dtype=each)
        matrix @ matrix  # the first one prepares kernels
        products, start = 0, time.perf_counter()
        while products == 0 or time.perf_counter() - start < MEASURED_SECONDS / 2:
            matrix @ matrix
            products += 1
        seconds[each] = (time.perf_counter() - start) / products
    return seconds[dtype] / seconds[torch.float32]


def warn_if_slow(settings: Mapping[str, tuple[str, str]], device: torch.device) -> None:
    """Warns once, before long work, about settings that this CPU computes slowly.

    Args:
        settings: field -> (the precision that it asks for, the value to set instead), e.g.
            {"mixed_precision": ("bf16", "auto")}.
        device: on which it will compute. Accelerators are not looked at.
    """
    dtypes = {**DTYPES, **MIXED_PRECISION}
    if device.type != "cpu":
        return
    # an unknown name is refused by whoever reads the setting
    slow = {field: asked for field, asked in settings.items() if asked[0] in dtypes}
    slow = {field: asked for field, asked in slow.items() if not is_fast(dtypes[asked[0]], device)}
    if not slow:
        return
    ratios = {name: slowdown(dtypes[name]) for name in sorted({name for name, _ in slow.values()})}
    logger.warning(
        "%s: this CPU has no units for that precision, in which a product of matrices takes %s times as long as in "
        "float32. Set %s.",
        ", ".join(f"{field}={name}" for field, (name, _) in slow.items()),
        ", ".join(f"{ratio:.3g} ({name})" for name, ratio in ratios.items()),
        " ".join(f"{field}={instead}" for field, (_, instead) in slow.items()),
    )

"""The processes of `accelerate launch` or torchrun, as evaluation uses them."""

from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

# Processes that are done wait for the others; with streamed data they may be far apart.
LONGEST_WAIT = timedelta(hours=12)


def process_state() -> PartialState:
    """This process's rank, the number of processes, and the device. It joins the others if it has not done so yet."""
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu, timeout=LONGEST_WAIT)

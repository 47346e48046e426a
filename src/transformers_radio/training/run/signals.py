"""Ctrl-C and SIGTERM: the step in hand ends and is saved."""

import signal
from types import FrameType

import torch
from accelerate import Accelerator

STEPS_PER_AGREEMENT = 5  # steps between agreements of several processes, as agreeing waits for the device


class StopSignal:
    """Remembers the first Ctrl-C or SIGTERM, so that the step in hand ends and is saved; a second one stops at once.

    Attributes:
        received: the signal's number, on this process; 0 if there was none.
        number: the signal that all processes have agreed to follow.
    """

    def __init__(self) -> None:
        self.received = 0
        self.number: int | None = None

    def __enter__(self) -> "StopSignal":
        self.before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in self.before:
            signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.received = number
        self.__exit__()

    def agreed(self, accelerator: Accelerator) -> bool:
        """True on every process as soon as one has been told to stop: all must save the same step."""
        number = self.received
        if accelerator.num_processes > 1:  # a signal that comes during the gathering counts the next time
            number = int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())
        self.number = number or None
        return self.number is not None

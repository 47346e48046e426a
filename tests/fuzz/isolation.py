"""Cases of damaged input in a process of their own, so that a crash, a hang or too much memory is one outcome of many.

A category is a module of this folder with two functions:

    prepare(folder) -> world            sound input, made once, and what it gives; can be pickled
    draw(rng, world, folder) -> Case    one damage, drawn from `rng` alone, in the empty folder
"""

import faulthandler
import importlib
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

# As without the damage; images left out and counted, none lost; an error in one line that says where; other results
# of input that has no checksum or the like.
SOUND, COUNTED, REFUSED, UNDETECTABLE = WITHIN = ("sound", "counted", "refused", "undetectable")
OUTSIDE = ("crash", "hang", "memory", "raw exception", "multi-line", "names nothing", "other bits")

SECONDS = 20.0  # that a case may take
# Bytes that a case may hold at once, beside what the process held before: about what the largest image takes.
RESIDENT = 5 * 2**29
ADDRESSES = 4 * 2**30  # bytes that it may ask for; more is a MemoryError

context = multiprocessing.get_context("forkserver")


class Case(NamedTuple):
    """`run()` returns one of `WITHIN`, or raises; `names`: of these a message has to hold one."""

    what: str
    names: tuple[str, ...]
    run: Callable[[], str]


class Result(NamedTuple):
    number: int
    what: str
    outcome: str
    message: str


class OtherBits(Exception):
    """Other results without a word, though the input tells that it is damaged."""


def judge(case: Case) -> tuple[str, str]:
    """Run a case in this process -> (outcome, message)."""
    from transformers_radio.data import SourceError

    try:
        return case.run(), ""
    except OtherBits as error:
        return "other bits", str(error)
    except BaseException as error:
        message = f"{type(error).__name__}: {error}"
        if isinstance(error, MemoryError) or "allocate" in message:
            return "memory", message
        if not isinstance(error, (ValueError, OSError, SourceError)):
            return "raw exception", message
        if "\n" in str(error):
            return "multi-line", message
        return ("refused" if any(name in str(error) for name in case.names) else "names nothing"), message


class Worker:
    """Runs the cases of one category; a process that a case has ended is followed by another one."""

    def __init__(self, category: str, seed: int, folder: Path, seconds: float = SECONDS):
        self.category, self.seed, self.folder, self.seconds = category, seed, folder, seconds
        self.folder.mkdir(parents=True, exist_ok=True)
        self.process = None

    def run(self, number: int) -> Result:
        if self.process is None:
            self._start()
        what, outcome = "", None
        try:
            self.connection.send(number)
            what = self._receive(10 * self.seconds)
            outcome, message = self._receive(self.seconds)
        except TimeoutError:
            outcome, message = "hang", f"more than {self.seconds:g} s"
        except (EOFError, ConnectionError):
            self.process.join()
            code = self.process.exitcode
            if not what or code >= 0:
                raise RuntimeError(f"{self.category}, case {number} {what}: {self._output()}") from None
            outcome, message = "crash", signal.Signals(-code).name
        if outcome in ("hang", "crash"):
            self.process.kill()
            self.close()
            stack = self._output().split("most recent call first")[-1].splitlines()  # of the main thread
            message += ": " + " < ".join(line.strip() for line in stack[:16] if line[:6] == "  File")
        return Result(number, what, outcome, message)

    def close(self) -> None:
        if self.process is not None:
            self.connection.close()  # which ends it
            self.process.join(10)
            self.process.kill()
            self.process.join()
            self.process = None

    def _start(self) -> None:
        self.connection, other = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(other, self.category, self.seed, self.folder, self.seconds), daemon=True
        )
        self.process.start()
        other.close()
        try:
            self._receive(300)
        except EOFError:
            raise RuntimeError(f"{self.category} cannot be prepared: {self._output()}") from None

    def _receive(self, seconds: float):
        if not self.connection.poll(seconds):
            raise TimeoutError
        return self.connection.recv()

    def _output(self) -> str:
        return (self.folder / "output.txt").read_text(errors="replace")[-20000:]


def _serve(connection, category: str, seed: int, folder: Path, seconds: float) -> None:
    for stream in (1, 2):
        os.dup2(os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    import torch

    torch.set_num_threads(1)  # bits are equal only for the same number of threads
    module = importlib.import_module(category)
    kept = folder / "world.pickle"
    if not kept.exists():
        kept.write_bytes(pickle.dumps(module.prepare(folder)))
    world = pickle.loads(kept.read_bytes())
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + ADDRESSES, -1))
    connection.send("ready")
    while (number := _next(connection)) is not None:
        shutil.rmtree(folder / "case", ignore_errors=True)
        (folder / "case").mkdir()
        os.chdir(folder / "case")  # where relative paths do no harm
        os.truncate(folder / "output.txt", 0)
        rng = np.random.default_rng([seed, zlib.crc32(category.encode()), number])
        case = module.draw(rng, world, folder / "case")
        connection.send(case.what)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _status("VmHWM")
        faulthandler.dump_traceback_later(0.8 * seconds)
        outcome, message = judge(case)
        faulthandler.cancel_dump_traceback_later()
        sys.stdout.flush()
        if (held := _status("VmHWM") - before) > RESIDENT:
            outcome, message = "memory", f"{held / 2**30:.1f} GiB ({message or outcome})"
        connection.send((outcome, message))


def _next(connection) -> int | None:
    try:
        return connection.recv()
    except EOFError:
        return None


def _status(field: str) -> int:
    """Bytes of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))

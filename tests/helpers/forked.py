"""Training processes that fork from one in which torch and transformers are loaded: loading them takes seconds."""

import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path

context = multiprocessing.get_context("forkserver")


def train(*arguments):
    """`python -m transformers_radio.training ARGUMENTS --trust-code`"""
    from transformers_radio.training.__main__ import main

    return main([*arguments, "--trust-code"])


def _run(target, arguments, environment, output):
    os.environ.update(environment)
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), stream)
    faulthandler.enable()
    import torch

    torch.set_num_threads(1)
    sys.exit(target(*arguments))


class Forked:
    """A process that exits with what `target(*arguments)` returns; it has the methods of `subprocess.Popen`."""

    def __init__(self, *arguments, target=train, **environment):
        handle, self.output = tempfile.mkstemp()
        os.close(handle)
        self.process = context.Process(target=_run, args=(target, [*map(str, arguments)], environment, self.output))
        self.process.start()

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def send_signal(self, number):
        os.kill(self.process.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=600):
        """(stdout and stderr together, None) at the end; what hangs is killed and says where it was."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.send_signal(signal.SIGABRT)  # on which faulthandler writes what all threads were doing
            self.process.join(20)
        if self.process.exitcode is None:
            self.kill()
            self.process.join()
        return Path(self.output).read_text(), None


def fork_group(processes, *arguments, target=train, **environment):
    """The processes of a group, as a launcher would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    group |= {"ACCELERATE_USE_CPU": "true", **environment}
    return [
        Forked(
            *arguments, target=target, **{k: str(v) for k, v in {**group, "RANK": rank, "LOCAL_RANK": rank}.items()}
        )
        for rank in range(processes)
    ]


def finish(group):
    """What rank 0 of the group wrote. A rank that failed, or hung and was killed, fails the test with its output."""
    outputs = [process.communicate()[0] for process in group]
    failed = {f"rank {rank}": (p.returncode, outputs[rank][-5000:]) for rank, p in enumerate(group) if p.returncode}
    assert not failed, "\n".join(f"{rank}, exit code {code}:\n{output}" for rank, (code, output) in failed.items())
    return outputs[0]

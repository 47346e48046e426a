"""Training in several gloo processes, with and without a launcher."""

import os
import subprocess
import sys

from helpers.forked import finish, fork_group
from helpers.paths import TESTS

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def start(processes, *arguments):
    """`python -m transformers_radio.training RECIPE [key=value ...] --trust-code` under torchrun."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *launcher, "-m", "transformers_radio.training", *map(str, arguments), "--trust-code"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def children(process):
    """The ranks that a launcher has started."""
    listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(number) for number in listed.stdout.split()]


def run(processes, *arguments, **options):
    """All to the end, without a launcher; a deadlock is a failure, and leaves no processes behind."""
    return finish(fork_group(processes, *arguments, **options))

"""Of other processes, for the tests of this folder."""

import os
import time


def wait_for_the_end_of(pids: list[int], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while (alive := [pid for pid in pids if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:  # a dead process that nobody has waited for yet still has a number
        return file.read().rpartition(")")[2].split()[0] != "Z"

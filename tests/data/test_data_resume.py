"""A stopped stream continues as if it had never stopped."""

import hashlib
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from helpers.processes import wait_for_the_end_of
from helpers.sample_images import encode, picture, write_tar
from transformers_radio.data import Batch, DataConfig, ImageStream, merge_states

STEPS = 24
LANES = 4


@pytest.fixture(scope="module")
def broken_tars(tmp_path_factory):
    """38 usable and 4 broken images in 3 tars."""
    root = tmp_path_factory.mktemp("broken_tars")
    for part in range(3):
        samples = {f"{n:03}": {"jpg": encode(picture(n)), "txt": b"x"} for n in range(part * 14, part * 14 + 14)}
        samples[f"{part * 14 + 5:03}"]["jpg"] = b"broken"
        if part == 1:
            samples["020"]["jpg"] = samples["020"]["jpg"][:-60]
        write_tar(root / f"{part:03}.tar", samples)
    return root


def stream_of(path, num_workers: int = 0, rank: int = 0, world_size: int = 1, seed: int = 7, **fields) -> ImageStream:
    fields = {"lanes": LANES, "shuffle_window": 4, "max_skipped_share": 0.5, **fields}
    config = DataConfig(str(path), num_workers=num_workers, **fields)
    return ImageStream(config, [16, 24], batch_size=4, seed=seed, rank=rank, world_size=world_size)


def take(stream: ImageStream, count: int) -> list[Batch]:
    batches = iter(stream)
    taken = [next(batches) for _ in range(count)]
    stream.close()
    return taken


def assert_same(found: list[Batch], expected: list[Batch], counters: bool = True) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys == theirs.keys and ours.epochs == theirs.epochs
        assert all(torch.equal(ours.images[r], theirs.images[r]) for r in (16, 24))
        if counters:
            assert ours.seen == theirs.seen and ours.skipped == theirs.skipped


@pytest.fixture(scope="module", params=["broken_tars", "broken_folder"])
def source(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def uninterrupted(source) -> list[Batch]:
    batches = take(stream_of(source), STEPS)
    assert batches[-1].epochs[-1] >= 1 and sum(batches[-1].skipped.values()) >= 4
    return batches


def test_resume_at_every_step(source, uninterrupted):
    """Saved by one process or by workers, and resumed by the other, at every step."""
    for workers in (0, 2):
        stream, states = stream_of(source, workers), []
        batches = iter(stream)
        for step in range(STEPS):
            states.append(json.loads(json.dumps(stream.state_dict())))
            assert_same([next(batches)], uninterrupted[step : step + 1])
        stream.close()
        for stopped_at, state in enumerate(states):
            resumed = stream_of(source, 2 if workers == 0 and stopped_at % 8 == 3 else 0)
            resumed.load_state_dict(state)
            assert resumed.state_dict() == state
            assert_same(take(resumed, min(6, STEPS - stopped_at)), uninterrupted[stopped_at : stopped_at + 6])


def test_resume_by_other_numbers_of_ranks(source, uninterrupted):
    """2 ranks, then 4, then 1, with the number of steps no multiple of the lanes."""
    found, state = [], None
    for world_size, num_workers, steps in [(2, 1, 3), (4, 0, 2), (1, 2, 5), (2, 2, 2)]:
        streams = [stream_of(source, num_workers, rank, world_size) for rank in range(world_size)]
        if state is not None:
            for stream in streams:
                stream.load_state_dict(state)
        sequences = [take(stream, steps) for stream in streams]
        found += [batch for step in zip(*sequences, strict=True) for batch in step]
        state = json.loads(json.dumps(merge_states([stream.state_dict() for stream in streams])))
    assert_same(found, uninterrupted[: len(found)], counters=False)
    assert len(found) == 23
    stream = stream_of(source)
    stream.load_state_dict(state)
    assert_same(take(stream, 1), uninterrupted[23:])


def test_lanes_of_the_state_are_kept_when_none_are_set(source):
    first = stream_of(source, 2, lanes=None)
    take(first, 5)
    resumed = stream_of(source, 0, lanes=None)
    assert resumed.lanes == 1
    resumed.load_state_dict(first.state_dict())
    assert resumed.lanes == 2
    assert_same(take(resumed, 5), take(first, 5))
    with pytest.raises(ValueError, match=r"data\.lanes=2 cannot be shared out to 1 ranks with 3 workers"):
        stream_of(source, 3, lanes=None).load_state_dict(first.state_dict())


def test_state_is_that_of_the_batches_taken_not_of_those_prefetched(source, uninterrupted):
    stream = stream_of(source, 2)
    batches = iter(stream)
    for step in range(6):
        assert_same([next(batches)], uninterrupted[step : step + 1])
        state = stream.state_dict()
        assert state["next_batch"] == step + 1
    other = stream_of(source)
    other.load_state_dict(state)
    assert_same([next(batches) for _ in range(4)], take(other, 4))


SCRIPT = """
import hashlib, json, multiprocessing, os, sys
from transformers_radio.data import DataConfig, ImageStream

path, workers, state_file = sys.argv[1], int(sys.argv[2]), sys.argv[3]
config = DataConfig(path, num_workers=workers, lanes=4, shuffle_window=4, max_skipped_share=0.5)
stream = ImageStream(config, [16, 24], batch_size=4, seed=7)
for step, batch in enumerate(stream):
    if step == 0:
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    if step == 15:
        input()  # waits to be killed
    digest = hashlib.sha256(batch.images[24].numpy().tobytes()).hexdigest()
    with open(state_file + ".tmp", "w") as file:
        json.dump(stream.state_dict(), file)
    os.replace(state_file + ".tmp", state_file)
    print(digest, *batch.keys, flush=True)
"""


def test_resume_after_sigkill_which_ends_the_workers_too(broken_tars, tmp_path):
    expected = take(stream_of(broken_tars), STEPS)
    state_file = tmp_path / "state.json"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(broken_tars), "2", str(state_file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    workers = [int(pid) for pid in process.stdout.readline().split()]
    printed = [process.stdout.readline().strip() for _ in range(7)]
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(workers) == 2
    wait_for_the_end_of(workers)
    assert printed == [
        " ".join([hashlib.sha256(batch.images[24].numpy().tobytes()).hexdigest(), *batch.keys])
        for batch in expected[:7]
    ]
    state = json.loads(state_file.read_text())
    start = state["next_batch"]
    assert 7 <= start <= 15  # it may have run a little further before the signal
    stream = stream_of(broken_tars, num_workers=1)
    stream.load_state_dict(state)
    assert_same(take(stream, STEPS - start), expected[start:])


def test_a_changed_source_or_setting_is_refused(source, tmp_path):
    state = stream_of(source).state_dict()
    for fields, named in [
        ({"seed": 8}, "seed: 7 when saved, 8 now"),
        ({"shuffle_window": 5}, "shuffle_window: 4 when saved, 5 now"),
        ({"crop_scale": (0.2, 1.0)}, r"crop_scale: \[0.5, 1.0\] when saved, \[0.2, 1.0\] now"),
        ({"min_side": 20}, "min_side"),
        ({"max_pixels": 2000}, "max_pixels: 120000000 when saved, 2000 now"),
        ({"lanes": 8}, r"saved with data\.lanes=4 and cannot continue with 8"),
    ]:
        with pytest.raises(ValueError, match=named):
            stream_of(source, **fields).load_state_dict(state)
    del state["order"]["max_pixels"]  # saved before there was such a limit
    stream_of(source).load_state_dict(state)
    for name in ("a", "b"):
        (tmp_path / f"{name}.jpg").write_bytes(encode(picture(1)))
    state = stream_of(tmp_path, lanes=1).state_dict()
    (tmp_path / "c.jpg").write_bytes(encode(picture(1)))
    with pytest.raises(ValueError, match="files: .* when saved.*start a new run"):
        stream_of(tmp_path, lanes=1).load_state_dict(state)


def test_a_source_may_move(broken_folder, tmp_path):
    stream = stream_of(broken_folder)
    take(stream, 3)
    (tmp_path / "moved").symlink_to(broken_folder)
    moved = stream_of(tmp_path / "moved")
    moved.load_state_dict(stream.state_dict())
    assert_same(take(moved, 3), take(stream, 3))


def test_states_of_ranks_have_to_be_joined_and_of_one_step(source):
    ranks = [stream_of(source, rank=rank, world_size=2) for rank in range(2)]
    with pytest.raises(ValueError, match="merge_states"):
        stream_of(source).load_state_dict(ranks[0].state_dict())
    take(ranks[1], 1)
    with pytest.raises(ValueError, match="'next_batch'.*not saved at the same step"):
        merge_states([stream.state_dict() for stream in ranks])

"""Order, counting and checks of the stream."""

import errno
import shutil
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
from torch import multiprocessing

from helpers.processes import wait_for_the_end_of
from helpers.sample_images import encode, picture, write_tar
from transformers_radio.data import Batch, DataConfig, ImageStream


def config_of(path, **fields) -> DataConfig:
    return DataConfig(str(path), **{"num_workers": 0, "shuffle_window": 5, "max_skipped_share": 0.2, **fields})


def take(stream: ImageStream, count: int) -> list[Batch]:
    batches = iter(stream)
    taken = [next(batches) for _ in range(count)]
    stream.close()
    return taken


def test_batch(folder):
    stream = ImageStream(config_of(folder), [48, 16, 16, 32], batch_size=6, seed=1)
    batch = take(stream, 1)[0]
    assert sorted(batch.images) == [16, 32, 48]
    for r, images in batch.images.items():
        assert images.shape == (6, 3, r, r) and images.dtype == torch.uint8
    assert len(set(batch.keys)) == 6 and batch.epochs == [0] * 6 and batch.seen == 6 and batch.skipped == {}


LANES = 8


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """45 images in 5 tars of unequal size; two cannot be used."""
    root = tmp_path_factory.mktemp("tars")
    start = 0
    for part, size in enumerate((3, 14, 8, 11, 9)):
        samples = {f"{number:03}": {"jpg": encode(picture(number))} for number in range(start, start + size)}
        write_tar(root / f"{part:03}.tar", samples)
        start += size
        if part in (1, 3):
            samples["broken"] = {"jpg": b"not a jpeg"}
            write_tar(root / f"{part:03}.tar", samples)
    return root


def run_ranks(path, world_size: int, num_workers: int, batches: int) -> list[Batch]:
    """The global sequence of batches: those of all ranks in turn."""
    config = config_of(path, num_workers=num_workers, lanes=LANES, max_skipped_share=0.5)
    ranks = [ImageStream(config, [16], 2, seed=5, rank=rank, world_size=world_size) for rank in range(world_size)]
    sequences = [take(stream, batches // world_size) for stream in ranks]
    return [batch for step in zip(*sequences, strict=True) for batch in step]


@pytest.mark.parametrize("source", ["tars", "broken_folder"])
def test_ranks_and_workers_share_every_image_once_an_epoch_and_change_nothing(source, request):
    path = request.getfixturevalue(source)
    usable = 45 if source == "tars" else 36
    whole_epochs = 2
    reference = run_ranks(path, 1, 0, 80)
    counts = Counter(
        zip((e for b in reference for e in b.epochs), (k for b in reference for k in b.keys), strict=True)
    )
    for epoch in range(whole_epochs):
        assert sum(count for (e, _), count in counts.items() if e == epoch) == usable
    assert max(counts.values()) == 1  # in one epoch, never twice
    for world_size, num_workers in [(1, 2), (2, 1), (2, 2), (4, 0), (8, 1)]:
        other = run_ranks(path, world_size, num_workers, 80)
        for ours, theirs in zip(reference, other, strict=True):
            assert ours.keys == theirs.keys and ours.epochs == theirs.epochs
            assert torch.equal(ours.images[16], theirs.images[16])


def test_epochs_and_seeds_give_other_orders_and_crops(folder):
    def epochs(seed, **fields):
        batches = take(ImageStream(config_of(folder, **fields), [16], 12, seed=seed), 6)
        first, second = batches[:3], batches[3:]
        return [[k for b in part for k in b.keys] for part in (first, second)], torch.cat(
            [b.images[16] for b in batches]
        )

    (first, second), images = epochs(seed=1)
    assert sorted(first) == sorted(second) and len(set(first)) == 36
    assert first != second and first != sorted(first)
    by_key = [{k: images[offset + i] for i, k in enumerate(part)} for offset, part in ((0, first), (36, second))]
    assert sum(torch.equal(by_key[0][key], by_key[1][key]) for key in first) < 3  # crops are drawn anew
    (other, _), _ = epochs(seed=2)
    assert other != first
    (unshuffled, _), _ = epochs(seed=1, shuffle_window=1)
    assert unshuffled == sorted(unshuffled)


def test_reading_leaves_the_global_random_state_alone(folder):
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    take(ImageStream(config_of(folder, num_workers=1, horizontal_flip=True), [16], 4, seed=0), 3)
    assert (torch.rand(1), np.random.rand()) == expected


@pytest.mark.parametrize("shards, lanes", [(1, 4), (3, 4), (5, 2), (7, 6), (11, 8), (40, 8)])
def test_lanes_get_even_shares_of_an_epoch_whatever_the_number_of_shards(shards, lanes, tmp_path):
    blob = {"jpg": encode(picture(1, 16, 16))}
    for part in range(shards):
        write_tar(tmp_path / f"{part:03}.tar", {f"{i:03}": blob for i in range(24)})
    stream = ImageStream(config_of(tmp_path, lanes=lanes), [8], batch_size=1, seed=0)
    shares = Counter()
    for number, batch in enumerate(stream):
        shares[number % lanes] += batch.epochs[0] == 0
        if all(lane["epoch"] > 0 for lane in stream.state_dict()["lanes"].values()):
            break
    assert sum(shares.values()) == shards * 24
    assert max(shares.values()) <= 1.25 * min(shares.values())


def test_order_does_not_depend_on_the_start_of_workers_nor_on_hashes_nor_on_the_global_random_state(
    folder, monkeypatch
):
    """A spawned worker is a new Python with another hash seed: nothing is inherited but the stream."""
    expected = take(ImageStream(config_of(folder, lanes=2), [16], 4, seed=0), 6)
    monkeypatch.setenv("PYTHONHASHSEED", "12345")
    usual = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    torch.manual_seed(99)
    try:
        found = take(ImageStream(config_of(folder, lanes=2, num_workers=1), [16], 4, seed=0), 6)
    finally:
        multiprocessing.set_start_method(usual, force=True)
    assert [batch.keys for batch in found] == [batch.keys for batch in expected]
    assert all(torch.equal(a.images[16], b.images[16]) for a, b in zip(found, expected, strict=True))


def test_workers_of_a_fork_server_end_with_a_killed_main_process(folder):
    code = """
import os, signal, sys
from torch import multiprocessing
from transformers_radio.data import DataConfig, ImageStream
if __name__ == "__main__":
    multiprocessing.set_start_method("forkserver")
    batches = iter(ImageStream(DataConfig(sys.argv[1], num_workers=1, shuffle_window=5), [16], 4, seed=0))
    next(batches)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    script = folder.parent / "killed.py"
    script.write_text(code)
    run = subprocess.run([sys.executable, script, folder], capture_output=True, text=True, timeout=600)
    workers = [int(pid) for pid in run.stdout.split()]
    assert len(workers) == 1, run.stderr
    wait_for_the_end_of(workers)


def test_skipped_images_are_counted_and_the_first_are_named(broken_folder, caplog):
    stream = ImageStream(config_of(broken_folder, num_workers=2), [16], batch_size=4, seed=0)
    batches = take(stream, 18)  # two epochs of 36
    assert batches[0].seen >= 4 and [b.seen for b in batches] == sorted(b.seen for b in batches)
    skipped = batches[-1].skipped
    assert set(skipped) == {"truncated", "undecodable", "too small", "missing"}
    assert sum(skipped.values()) == batches[-1].seen - 18 * 4 == sum(stream.skipped.values())
    assert "003.jpg (truncated)" in caplog.text and "025.jpg (too small)" in caplog.text


@pytest.fixture(scope="module")
def two_percent_broken(tmp_path_factory):
    root = tmp_path_factory.mktemp("two_percent")
    for number in range(300):
        data = encode(picture(number, 24, 24))
        (root / f"{number:03}.jpg").write_bytes(data[:100] if number % 50 == 7 else data)
    return root


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_share_of_broken_images_stops_the_run_or_is_counted(two_percent_broken, num_workers):
    fields = {"num_workers": num_workers, "lanes": 2, "shuffle_window": 100}
    stream = ImageStream(DataConfig(str(two_percent_broken), **fields), [16], batch_size=10, seed=0)
    with pytest.raises(RuntimeError) as error:
        take(stream, 60)
    message = str(error.value)
    assert stream.seen >= 200
    assert "data.max_skipped_share=0.01" in message and "Repair the source, or raise" in message
    assert message.count(".jpg (") == sum(stream.skipped.values()) <= 6
    stream = ImageStream(
        DataConfig(str(two_percent_broken), max_skipped_share=0.05, **fields), [16], batch_size=10, seed=0
    )
    batches = take(stream, 60)
    used = sum(len(batch.keys) for batch in batches)
    assert used == 600 and batches[-1].seen == used + sum(batches[-1].skipped.values())
    assert 12 <= sum(batches[-1].skipped.values()) <= 14


def test_the_share_is_not_judged_on_the_first_images_but_at_the_end_of_a_small_epoch(tmp_path):
    for number in range(50):
        data = encode(picture(number, 24, 24))
        (tmp_path / f"{number:02}.jpg").write_bytes(b"broken" if number == 0 else data)
    config = DataConfig(str(tmp_path), num_workers=0, shuffle_window=1)  # 1 of the first 5, 2 % of all
    batches = iter(ImageStream(config, [16], batch_size=4, seed=0))
    for _ in range(12):
        assert next(batches).skipped == {"undecodable": 1}
    with pytest.raises(RuntimeError, match=r"2 of 5\d images|1 of 50 images"):
        for _ in range(2):
            next(batches)


def test_one_rank_with_few_images_does_not_speak_for_all(tmp_path):
    for number in range(80):
        (tmp_path / f"{number:02}.jpg").write_bytes(encode(picture(number, 24, 24)) if number != 40 else b"broken")
    config = config_of(tmp_path, max_skipped_share=0.02)  # 1.25 % of all, 5 % of the images of one of four ranks
    ranks = [take(ImageStream(config, [16], 4, seed=0, rank=rank, world_size=4), 6) for rank in range(4)]
    assert sum(sum(batches[-1].skipped.values()) for batches in ranks) >= 1


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_source_without_a_single_usable_image_does_not_run_for_ever(tmp_path, num_workers):
    for number in range(20):
        (tmp_path / f"{number:02}.jpg").write_bytes(b"broken")
    stream = ImageStream(DataConfig(str(tmp_path), num_workers=num_workers), [16], batch_size=4, seed=0)
    with pytest.raises(RuntimeError, match=r"no usable image.*20 undecodable.*\.jpg \(undecodable\)") as error:
        next(iter(stream))
    assert not multiprocessing.active_children() and error.value  # no worker lives as long as its error


def test_more_lanes_than_images_is_an_error_and_not_a_hang(tmp_path):
    write_tar(tmp_path / "a.tar", {f"{number}": {"jpg": encode(picture(number))} for number in range(3)})
    with pytest.raises(ValueError, match="holds 3 images.*over 4 lanes needs 4"):
        ImageStream(config_of(tmp_path, lanes=4), [16], 1, seed=0).check()
    with pytest.raises(RuntimeError, match="lower data.num_workers or data.lanes"):
        take(ImageStream(config_of(tmp_path, lanes=4), [16], 1, seed=0), 8)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"lanes": 3, "num_workers": 2},
            r"data\.lanes=3 cannot be shared out to 2 ranks with 2 workers.*data\.lanes=4",
        ),
        ({"crop_scale": (0.0, 1.0)}, r"data\.crop_scale=\(0\.0, 1\.0\)"),
        ({"crop_ratio": (2.0, 1.0)}, r"data\.crop_ratio=\(2\.0, 1\.0\)"),
        ({"num_workers": -1}, r"data\.num_workers=-1: expected 0 or more"),
        ({"shuffle_window": 0}, r"data\.shuffle_window=0"),
        ({"max_skipped_share": 1.5}, r"data\.max_skipped_share=1\.5: expected a share"),
        ({"min_side": 0}, r"data\.min_side=0"),
        ({"max_pixels": 0}, r"data\.max_pixels=0: expected 1 to 178956970 pixels"),
        ({"max_pixels": 200_000_000}, r"data\.max_pixels=200000000"),
        ({"image_root": "/no/such/folder"}, r"data\.image_root='/no/such/folder': expected a folder"),
        ({"lanes": 0}, r"data\.lanes=0"),
        ({"path": ""}, r"data\.path=''"),
    ],
)
def test_settings_out_of_range(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageStream(DataConfig(**{"path": str(folder), **arguments}), [16], 4, seed=0, rank=0, world_size=2)


@pytest.mark.parametrize(
    "arguments",
    [{"resolutions": []}, {"resolutions": [0]}, {"batch_size": 0}, {"seed": -1}, {"rank": 2}, {"rank": -1}],
)
def test_arguments_out_of_range(folder, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        ImageStream(
            config_of(folder), **{"resolutions": [16], "batch_size": 4, "seed": 0, "world_size": 2, **arguments}
        )


def test_a_vanished_file_is_skipped_but_an_unreadable_one_surfaces_from_the_worker(folder, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    stream = ImageStream(config_of(copy, num_workers=1), [16], 4, seed=0)
    (copy / "a" / "000.jpg").unlink()
    assert take(stream, 10)[-1].skipped["missing"] >= 1
    (copy / "a" / "000.jpg").mkdir()
    assert take(stream, 10)[-1].skipped["missing"] >= 2

    def fail(path):  # for root as well, unlike a mode of 000
        raise OSError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr("transformers_radio.data.source.read_file", fail)
    with pytest.raises(OSError, match="Permission denied.*jpg"):
        take(stream, 20)


def test_workers_survive_the_signals_that_are_meant_for_the_main_process(folder):
    expected = [batch.keys for batch in take(ImageStream(config_of(folder, lanes=2), [16], 4, seed=0), 40)]
    stream = ImageStream(config_of(folder, num_workers=2), [16], batch_size=4, seed=0)
    batches = iter(stream)
    found = [next(batches).keys, next(batches).keys]  # one of each worker: both have started
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    # From another process, as a terminal or a cluster sends them; from this one, SIGTERM is the order to stop.
    pids = " ".join(str(worker.pid) for worker in workers)
    subprocess.run(["sh", "-c", f"kill -INT {pids}; kill -TERM {pids}"], check=True)
    time.sleep(0.2)
    found += [next(batches).keys for _ in range(38)]
    assert found == expected and all(worker.is_alive() for worker in workers)
    workers[0].terminate()
    workers[0].join(timeout=10)
    assert not workers[0].is_alive()


def test_a_batch_that_is_kept_does_not_change_while_others_are_made(folder):
    stream = ImageStream(config_of(folder, num_workers=2), [16, 24], batch_size=4, seed=0)
    batches = iter(stream)
    kept = [next(batches) for _ in range(3)]
    copies = [{r: images.clone() for r, images in batch.images.items()} for batch in kept]
    for _ in range(20):
        next(batches)
    for batch, copy in zip(kept, copies, strict=True):
        assert all(torch.equal(batch.images[r], copy[r]) for r in (16, 24))


def test_too_little_shared_memory_is_an_error_and_not_a_bus_error(folder, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(total=1000 * 2**20, free=free * 2**20))
    stream = ImageStream(config_of(folder, num_workers=2), [1024], batch_size=8, seed=0)

    free = 64
    for start in (stream.check, lambda: next(iter(stream))):
        with pytest.raises(ValueError, match=r"2 workers need 144 MiB.*/dev/shm has 64 MiB.*data\.num_workers"):
            start()
    free = 500
    stream.check()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # as torchrun and accelerate launch set it: 576 MiB together
    with pytest.raises(ValueError, match=r"144 MiB.*on each of 4 ranks of this machine.* 500 MiB left of 1000\."):
        stream.check()
    stream._check_shared_memory()  # later the others may already have theirs, which is not counted twice
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")  # 1152 MiB
    with pytest.raises(ValueError, match="on each of 8 ranks"):
        next(iter(stream))


def test_close_ends_the_workers_and_keeps_the_position(folder):
    expected = [batch.keys for batch in take(ImageStream(config_of(folder, lanes=2), [16], 4, seed=0), 6)]
    stream = ImageStream(config_of(folder, num_workers=2), [16], batch_size=4, seed=0)
    found = [batch.keys for batch in take(stream, 3)]  # take closes
    assert not multiprocessing.active_children()
    assert found + [batch.keys for batch in take(stream, 3)] == expected

"""The cache of teachers' outputs against what the teacher says itself, also when processes are killed."""

import json
import multiprocessing
import os
import random
import re
import resource
import signal
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors import safe_open
from torch import nn

from transformers_radio.data import DataConfig
from transformers_radio.teachers import Teacher, TeacherOutput
from transformers_radio.training import cache as cache_module
from transformers_radio.training.cache import TeacherCaches, cache_fingerprint, check_room, estimate_bytes
from transformers_radio.training.recipe import TeacherRecipe
from transformers_radio.training.student import TeacherShape

torch.set_num_threads(1)

IMAGES, SIDE = 48, 16
AN_IMAGE = 2 * (4 * 5 + 7)  # bytes of CountingTeacher's outputs
FORK = multiprocessing.get_context("fork")


class CountingTeacher(Teacher):
    """Remembers which images it has seen. With `mixing`, an output depends on the other images of its batch."""

    def __init__(self, summary=True, mixing=0.0):
        super().__init__(
            nn.AvgPool2d(8),
            image_size=SIDE,
            patch_size=8,
            summary_dim=7 if summary else None,
            feature_dim=5,
            normalization=((0.5, 0.5, 0.5), (0.3, 0.3, 0.3)),
        )
        self.mixing, self.seen = mixing, []

    def encode(self, pixel_values):
        self.seen += [round(float(image[0, 0, 0] * 0.3 + 0.5) * IMAGES) for image in pixel_values]
        cells = self.model(pixel_values).flatten(2).transpose(1, 2)  # (B, 3, 2, 2) -> (B, 4, 3)
        cells = cells + self.mixing * cells.mean(dim=0, keepdim=True)
        features = (cells[..., :1] * torch.arange(1, 6) / 7).sin()  # (B, 4, 5)
        summary = (cells.mean(dim=1)[:, :1] * torch.arange(1, 8) / 3).cos()  # (B, 7)
        return TeacherOutput(summary if self.summary_dim else None, features, (2, 2))


def image(index):
    """Noise whose first pixel holds its number."""
    pixels = torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(index))
    pixels[:, 0, 0] = index / IMAGES
    return pixels


def batch_of(indices):
    return [f"train.tar/{index:03d}" for index in indices], torch.stack([image(index) for index in indices])


def schedule(epochs, batch_size, rank=0, ranks=1):
    """Batches of image numbers of one of several processes, in another order in each epoch."""
    order = [index for epoch in range(epochs) for index in random.Random(epoch).sample(range(IMAGES), IMAGES)]
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return batches[rank::ranks]


def round_to_bf16(values):
    """To the nearest, ties to even, on the bits of float32."""
    bits = values.numpy().view(np.uint32)
    return torch.from_numpy(((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32))


def open_caches(folder, shard_bytes=5 * AN_IMAGE, fingerprint=None):
    return TeacherCaches(
        Accelerator(cpu=True), folder, {"clip": fingerprint or {"type": "test"}}, ["clip"], shard_bytes
    )


def shards(folder):
    return sorted((folder / "clip").glob("[0-9]*/*.safetensors"))


def as_bytes(output):
    return output.summary.numpy().tobytes() + output.features.numpy().tobytes()


def fill(folder, **options):
    """12 images in batches of 4, the first two batches in one shard."""
    caches, teacher = open_caches(folder, **options), CountingTeacher()
    for start in range(0, 12, 4):
        caches["clip"].targets(*batch_of(range(start, start + 4)), teacher)
    caches.flush()
    caches.close()


@pytest.mark.parametrize("summary", [True, False])
def test_each_image_is_encoded_once_and_every_answer_is_the_rounded_output(summary, tmp_path):
    caches, teacher = open_caches(tmp_path), CountingTeacher(summary)
    for step, indices in enumerate(schedule(epochs=3, batch_size=7)):  # batches span epochs
        keys, images = batch_of(indices)
        found, said = caches["clip"].targets(keys, images, teacher), CountingTeacher(summary)(images)
        assert torch.equal(found.features, round_to_bf16(said.features)) and found.grid == (2, 2)
        assert not torch.equal(found.features, said.features)
        if summary:
            assert torch.equal(found.summary, round_to_bf16(said.summary)) and found.summary.dtype == torch.float32
        else:
            assert found.summary is None
        if step % 3 == 0:
            caches.flush()
    assert sorted(teacher.seen) == list(range(IMAGES))
    caches.flush()
    assert len(shards(tmp_path)) > 3
    for path in shards(tmp_path):
        with safe_open(path, "pt") as shard:
            assert ("summary" in shard.keys()) == summary and shard.get_slice("features").get_dtype() == "BF16"

    caches.close()
    again, unused = open_caches(tmp_path), CountingTeacher(summary)
    found = again["clip"].targets(*batch_of(range(IMAGES)), unused)
    assert unused.seen == [] and found.grid == (2, 2)
    said = CountingTeacher(summary)(batch_of(range(IMAGES))[1])
    assert torch.equal(found.features, round_to_bf16(said.features))


def test_an_image_that_comes_twice_in_a_batch_is_encoded_once(tmp_path):
    caches, teacher = open_caches(tmp_path), CountingTeacher()
    found = caches["clip"].targets(*batch_of([4, 2, 4, 9, 2]), teacher)
    assert teacher.seen == [4, 2, 9]
    assert torch.equal(found.features, round_to_bf16(CountingTeacher()(batch_of([4, 2, 4, 9, 2])[1]).features))


def test_shards_are_of_bounded_size_and_what_is_not_flushed_is_not_found(tmp_path):
    caches, teacher = open_caches(tmp_path, shard_bytes=5 * AN_IMAGE), CountingTeacher()
    for indices in schedule(epochs=1, batch_size=3):
        caches["clip"].targets(*batch_of(indices), teacher)
    assert shards(tmp_path) == []
    caches.flush()
    rows = []
    for path in shards(tmp_path):
        with safe_open(path, "pt") as shard:
            rows.append(shard.get_slice("features").get_shape()[0])
    assert sum(rows) == IMAGES and max(rows) == 6  # two batches of 3 reach 5 images
    assert not (tmp_path / "clip" / "pending.tmp").exists()


def run(folder, batches, mixing=0.5, die=None):
    """A training run as the cache sees it, with a checkpoint every 4 steps, from the last checkpoint on.

    Args:
        die: at the how-manieth time of what this process kills itself: (what, how-manieth).
    """
    accelerator = Accelerator(cpu=True)
    rank, lives = accelerator.process_index, die[1] if die else 0

    def may_die(what):
        nonlocal lives
        lives -= bool(die) and die[0] == what
        if die and lives == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def save_file(tensors, path, metadata=None):
        save(tensors, path, metadata)
        if die and die[0] == "write" and lives == 1:
            os.truncate(path, path.stat().st_size // 2)
        may_die("write")

    def replace(source, target):
        may_die("flush")
        rename(source, target)

    save, rename = cache_module.save_file, os.replace
    cache_module.save_file, cache_module.os.replace = save_file, replace
    checkpoint = folder / f"checkpoint-{rank}.json"
    state = json.loads(checkpoint.read_text()) if checkpoint.exists() else {"step": 0, "targets": []}
    caches, teacher = open_caches(folder), CountingTeacher(mixing=mixing)
    for step in range(state["step"], len(batches)):
        state["targets"].append(as_bytes(caches["clip"].targets(*batch_of(batches[step]), teacher)).hex())
        may_die("step")
        if (step + 1) % 4 == 0 or step + 1 == len(batches):
            caches.flush()
            may_die("checkpoint")
            accelerator.wait_for_everyone()  # all of them have a checkpoint, or none
            state["step"] = step + 1
            checkpoint.with_suffix(".new").write_text(json.dumps(state))
            rename(checkpoint.with_suffix(".new"), checkpoint)
            accelerator.wait_for_everyone()
    (folder / f"seen-{rank}.json").write_text(json.dumps(teacher.seen))


def start(folder, batches, dying=0, die=None, **options):
    """Runs one process for each list of batches. When one dies, the others are killed, as launchers do."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]

    def process(rank):
        AcceleratorState._reset_state(reset_partial_state=True)  # the test process has one already
        if len(batches) > 1:
            rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": len(batches)}
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "ACCELERATE_USE_CPU": "true"}
            os.environ.update({key: str(value) for key, value in {**rendezvous, **ranks}.items()})
        run(folder, batches[rank], die=die if rank == dying else None, **options)
        os._exit(0)

    folder.mkdir(exist_ok=True)
    processes = [FORK.Process(target=process, args=(rank,)) for rank in range(len(batches))]
    for one in processes:
        one.start()
    processes[dying].join(240)
    for one in processes:
        if processes[dying].exitcode == 0:
            one.join(240)
        one.kill()
        one.join()
    return processes[dying].exitcode


def results(folder):
    """What all processes were taught with, by rank."""
    return [json.loads(path.read_text())["targets"] for path in sorted(folder.glob("checkpoint-*.json"))]


ALONE = [schedule(epochs=3, batch_size=4)]
# Images change hands between epochs, and epochs end between two flushes, so that some images are encoded by both.
PAIR = [schedule(epochs=3, batch_size=4, rank=rank, ranks=2) for rank in range(2)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The targets of runs of one and of two processes that are not killed."""
    results_of = {}
    for processes, batches in {1: ALONE, 2: PAIR}.items():
        folder = tmp_path_factory.mktemp(f"undisturbed{processes}")
        assert start(folder, batches) == 0
        results_of[processes] = results(folder)
    seen = [set(json.loads((folder / f"seen-{rank}.json").read_text())) for rank in range(2)]
    assert seen[0] & seen[1]  # each encoded them in another batch, with other bits
    return results_of


@pytest.mark.parametrize(
    ("batches", "dying", "die"),
    [
        *[(ALONE, 0, die) for die in [("write", 1), ("write", 4), ("flush", 2), ("checkpoint", 1), ("checkpoint", 3)]],
        *[(PAIR, 1, die) for die in [("write", 2), ("write", 3), ("step", 6), ("checkpoint", 1), ("checkpoint", 2)]],
        *[(PAIR, 0, die) for die in [("flush", 1), ("flush", 2)]],
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_killed_run_resumes_with_the_same_bits(batches, dying, die, undisturbed, tmp_path):
    assert start(tmp_path, batches, dying, die) == -signal.SIGKILL
    for path in shards(tmp_path):  # all that counts is whole
        with safe_open(path, "pt") as shard:
            assert len(json.loads(shard.get_tensor("keys").numpy().tobytes())) == len(shard.get_tensor("features"))
    assert start(tmp_path, batches) == 0
    assert results(tmp_path) == undisturbed[len(batches)]
    assert list((tmp_path / "clip").glob("*.tmp")) == []


def test_the_resumed_runs_would_differ_if_batches_were_cut_otherwise(undisturbed):
    """The teacher of these tests mixes the images of a batch, so that equal bits say something."""
    teacher = CountingTeacher(mixing=0.5)
    indices = schedule(epochs=1, batch_size=4)[0]
    whole = teacher(batch_of(indices)[1])
    assert (
        as_bytes(TeacherOutput(*map(round_to_bf16, (whole.summary, whole.features)), (2, 2))).hex()
        == (undisturbed[1][0][0])
    )
    assert not torch.equal(
        round_to_bf16(teacher(batch_of(indices[:3])[1]).features), round_to_bf16(whole.features[:3])
    )


def test_two_processes_share_a_folder_and_what_they_have_encoded(tmp_path):
    epochs = [random.Random(epoch).sample(range(24), 24) for epoch in range(3)]
    # 4 steps an epoch and process, so that there is a flush after each
    batches = [
        [epoch[i : i + 3] for epoch in epochs for i in range(12 * rank, 12 * rank + 12, 3)] for rank in range(2)
    ]
    assert start(tmp_path, batches, mixing=0.0) == 0
    seen = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in range(2)]
    assert len(seen[0]) == len(seen[1]) == 12 and sorted(seen[0] + seen[1]) == list(range(24))
    assert {path.name[:5] for path in shards(tmp_path)} == {"00000", "00001"}
    for rank, found in enumerate(results(tmp_path)):
        for indices, one in zip(batches[rank], found, strict=True):
            said = CountingTeacher()(batch_of(indices)[1])
            rounded = TeacherOutput(round_to_bf16(said.summary), round_to_bf16(said.features), said.grid)
            assert as_bytes(rounded).hex() == one


def test_what_a_killed_run_had_not_flushed_never_counts(tmp_path):
    leftover = tmp_path / "clip" / "pending.tmp" / "00003-000000.safetensors"  # a fourth process wrote it
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"half a sh")
    fill(tmp_path)
    assert {path.name[:5] for path in shards(tmp_path)} == {"00000"} and not leftover.exists()


def test_another_run_is_kept_out_until_the_first_is_done(tmp_path):
    first = open_caches(tmp_path)
    with pytest.raises(FileExistsError, match="another run writes"):
        open_caches(tmp_path)
    first.close()
    open_caches(tmp_path).close()


def test_a_damaged_shard_is_named_and_its_images_are_encoded_again(tmp_path, caplog):
    fill(tmp_path)
    damaged, *others = shards(tmp_path)
    os.truncate(damaged, damaged.stat().st_size - 1)
    kept = {path: path.read_bytes() for path in [damaged, *others]}
    caches, teacher = open_caches(tmp_path), CountingTeacher()
    assert damaged.name in caplog.text and "damaged" in caplog.text
    found = caches["clip"].targets(*batch_of(range(12)), teacher)
    caches.flush()
    assert teacher.seen == list(range(8))  # the first two batches were in it
    assert torch.equal(found.features, round_to_bf16(CountingTeacher()(batch_of(range(12))[1]).features))
    assert {path: path.read_bytes() for path in kept} == kept and len(shards(tmp_path)) == len(kept) + 1


@pytest.mark.parametrize("part", ["features", "summary", "mean", "checksums"])
def test_a_flipped_bit_in_an_output_is_refused_by_name(part, tmp_path):
    fill(tmp_path)
    path, *_ = shards(tmp_path)
    data = bytearray(path.read_bytes())
    header = int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8 : 8 + header])[part]["data_offsets"]
    data[8 + header + random.Random(part).randrange(begin, end)] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=rf"{path.name} is damaged: the outputs of train.tar/00\d have another checksum"
    ):
        open_caches(tmp_path)["clip"].targets(*batch_of(range(8)), CountingTeacher())
    path.unlink()
    found = open_caches(tmp_path)["clip"].targets(*batch_of(range(12)), CountingTeacher())
    assert torch.equal(found.features, round_to_bf16(CountingTeacher()(batch_of(range(12))[1]).features))


def test_shards_of_older_versions_without_checksums_are_read(tmp_path, caplog):
    fill(tmp_path)
    for path in shards(tmp_path):
        with safe_open(path, "pt") as shard:
            tensors = {name: shard.get_tensor(name) for name in shard.keys() if name != "checksums"}
            metadata = shard.metadata()
        cache_module.save_file(tensors, path, metadata)
    teacher = CountingTeacher()
    open_caches(tmp_path)["clip"].targets(*batch_of(range(12)), teacher)
    assert teacher.seen == [] and not caplog.text


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, metadata: metadata.update(grid="[3, 2]"),
        lambda tensors, metadata: metadata.update(grid="2"),
        lambda tensors, metadata: metadata.clear(),
        lambda tensors, metadata: tensors.update(keys=tensors["keys"][:-1].clone()),
        lambda tensors, metadata: tensors.update(mean=tensors["mean"][:-1].clone()),
        lambda tensors, metadata: tensors.pop("features"),
    ],
)
def test_a_shard_whose_parts_do_not_fit_is_named_and_encoded_again(change, tmp_path, caplog):
    fill(tmp_path)
    path, *_ = shards(tmp_path)
    with safe_open(path, "pt") as shard:
        tensors, metadata = {name: shard.get_tensor(name) for name in shard.keys()}, shard.metadata()
    change(tensors, metadata)
    cache_module.save_file(tensors, path, metadata)
    teacher = CountingTeacher()
    open_caches(tmp_path)["clip"].targets(*batch_of(range(8)), teacher)
    assert teacher.seen == list(range(8)) and f"{path} is damaged" in caplog.text


def test_another_image_under_a_known_name_is_refused(tmp_path):
    fill(tmp_path)
    keys, images = batch_of(range(4))
    images[2] = images[2] * 0.9
    with pytest.raises(ValueError, match=r"train.tar/002 is not the image.*frozen_crops"):
        open_caches(tmp_path)["clip"].targets(keys, images, CountingTeacher())


def test_a_full_disk_is_reported_and_breaks_no_shard(tmp_path):
    fill(tmp_path)
    before = shards(tmp_path)

    def write_into_a_full_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        caches = open_caches(tmp_path)
        caches["clip"].targets(*batch_of(range(12, 20)), CountingTeacher())
        with pytest.raises(OSError, match=r"pending.tmp/\S+ could not be written .*make room"):
            caches.flush()

    process = FORK.Process(target=write_into_a_full_disk)
    process.start()
    process.join(240)
    assert process.exitcode == 0 and shards(tmp_path) == before


def fingerprint(data=None, checkpoint="somewhere/clip.pt", **changes):
    teacher = TeacherRecipe(type="open_clip", checkpoint=checkpoint, options={"features": "trunk"})
    values = {"weights": "0f", "image_size": 224, "files": {"": "abc"}, "largest_side": 256, **changes}
    return cache_fingerprint(teacher, data=data or DataConfig(path="images"), **values)


def test_a_cache_of_anything_else_is_refused_with_what_differs(tmp_path):
    fill(tmp_path, fingerprint=fingerprint())
    fill(tmp_path, fingerprint=fingerprint(checkpoint="ViT-B-16:moved/clip.pt"))  # the same weights elsewhere
    cases = {
        # trained on under the same name, or another revision on the Hub
        "weights ('0f' there, '10' here)": fingerprint(weights="10"),
        "image_size (224 there, 336 here)": fingerprint(image_size=336),
        "files of data.path ('abc' there, 'abd' here)": fingerprint(files={"": "abd"}),
        "largest_side (256 there, 432 here)": fingerprint(largest_side=432),
        "data.crop_scale ([0.5, 1.0] there, [0.2, 1.0] here)": fingerprint(
            DataConfig(path="images", crop_scale=(0.2, 1.0))
        ),
        "options.features ('trunk' there, None here)": {
            key: value for key, value in fingerprint().items() if not key.startswith("options")
        },
    }
    for message, changed in cases.items():
        with pytest.raises(ValueError, match=re.escape(f"other crops: it differs in {message};")):
            open_caches(tmp_path, fingerprint=changed)


def test_the_estimate_is_what_the_shards_take_and_room_is_asked_for_the_rest(tmp_path, monkeypatch):
    shapes = [TeacherShape.of(CountingTeacher())]
    assert estimate_bytes(12, shapes) == 12 * AN_IMAGE
    # CLIP ViT-L/14 at 224 and SAM at 1024, an image: 256 x 1024 + 768 and 4096 x 256 numbers of 2 bytes
    large = [TeacherShape(768, 1024, 224, 14), TeacherShape(None, 256, 1024, 16)]
    assert estimate_bytes(1, large) == 2 * (256 * 1024 + 768) + 2 * 4096 * 256
    fill(tmp_path, shard_bytes=1 << 20)
    [path] = shards(tmp_path)
    with safe_open(path, "pt") as shard:
        extra = shard.get_tensor("keys").nbytes + shard.get_tensor("mean").nbytes
    held = path.stat().st_size
    assert 0 < held - estimate_bytes(12, shapes) - extra < 1000  # the header and the checksums

    usage = SimpleNamespace(free=10_000)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda folder: usage if Path(folder).exists() else None)
    assert check_room(tmp_path / "not" / "yet", {"clip": 6_000, "sam": 4_000}) == 10_000
    with pytest.raises(OSError, match=r"clip 6\.0 GB, sam 4\.0 GB\) need another 10\.0 GB .* 0\.0 GB free; choose"):
        check_room(tmp_path / "not" / "yet", {"clip": 6_000_000_000, "sam": 4_000_000_000})
    assert check_room(tmp_path, {"clip": held + 10_000}) == 10_000
    assert check_room(tmp_path, {"clip": held - 1, "sam": 500}) == 500
    with pytest.raises(OSError, match="train without it"):
        check_room(tmp_path, {"clip": held + 10_001})
    assert check_room(tmp_path, {"clip": held + 4_000}, checkpoints=6_000) == 4_000
    with pytest.raises(OSError, match=r"and the checkpoints 0\.0 GB on the same disk, which has"):
        check_room(tmp_path, {"clip": held + 4_000}, checkpoints=6_001)

"""The probe against PyTorch's own modules and schedulers; killed, continued, and on two processes."""

import itertools
import json
import multiprocessing
import os
import signal
import socket

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from helpers.segmentation_set import LITTLE, describe, encode, write_set
from transformers_radio.evaluation.segmentation.config import SegmentationConfig
from transformers_radio.evaluation.segmentation.data import Sample, SegmentationSplit
from transformers_radio.evaluation.segmentation.probe import (
    FrozenInputBatchNorm,
    LinearHead,
    segmentation_loss,
    segmentation_probe,
    train_head,
)
from transformers_radio.evaluation.segmentation.transforms import training_sample

torch.set_num_threads(1)  # as in the processes that the tests start: bits are equal only for the same number


def probe(folder, output, **changes):
    return segmentation_probe(encode, "colors of patches", describe(folder), config(**changes), output)


def config(**changes):
    return SegmentationConfig(**{**LITTLE, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("colors"))


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A probe that nothing disturbed, and its report."""
    output = tmp_path_factory.mktemp("finished") / "probe"
    return output, probe(folder, output)


def start(folder, output, dies_at=None, rank=0, world=1, port=0, **changes):
    """The probe in another process. All are forked from one server, which imports everything once.

    dies_at: which call of the encoder is a kill -9; the first two ask for the features' width.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_run, args=(folder, output, dies_at, rank, world, port, changes))
    process.start()
    return process


def _run(folder, output, dies_at, rank, world, port, changes):
    os.environ.update(ACCELERATE_USE_CPU="true", CUDA_VISIBLE_DEVICES="")
    if world > 1:
        place = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": world,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        os.environ.update({name: str(value) for name, value in place.items()})

    calls = itertools.count(1)

    def mortal(images):
        if next(calls) == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(images)

    segmentation_probe(mortal, "colors of patches", describe(folder), config(**changes), output)


def weights(output):
    return load_file(output / "head.safetensors")


def test_the_schedule_is_pytorchs_warm_up_and_polynomial_decay():
    for power in (1.0, 0.9):
        setting = SegmentationConfig(iterations=60, warmup_iterations=15, power=power)
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
        schedules = [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1e-6, total_iters=15),
            torch.optim.lr_scheduler.PolynomialLR(optimizer, 45, power),
        ]
        schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, schedules, [15])
        for iteration in range(60):
            assert setting.learning_rate_at(iteration) == pytest.approx(schedule.get_last_lr()[0], rel=1e-6)
            optimizer.step()
            schedule.step()


def test_the_defaults_are_the_papers():
    setting = SegmentationConfig()
    setting.check()
    assert (setting.iterations, setting.batch_size, setting.learning_rate) == (160_000, 16, 1e-3)
    assert (setting.weight_decay, setting.warmup, setting.crop_size, setting.stride) == (0, 1500, 512, 341)
    assert setting.learning_rate_at(0) == pytest.approx(1e-9) and setting.learning_rate_at(1500) == 1e-3


def test_the_loss_counts_labeled_pixels_over_all_pixels():
    logits = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    masks = torch.tensor([0, 1, 2, 255]).repeat(2, 8, 2)  # (2, 8, 8), every fourth pixel without a label
    upsampled = F.interpolate(logits, size=(8, 8), mode="bilinear", align_corners=False)
    terms = [
        -upsampled[b, :, y, x].log_softmax(0)[masks[b, y, x]]
        for b in range(2) for y in range(8) for x in range(8) if masks[b, y, x] != 255
    ]  # fmt: skip
    assert segmentation_loss(logits, masks).item() == pytest.approx(sum(terms).item() / 128, rel=1e-5)


def test_training_is_a_plain_loop_of_pytorch(tmp_path):
    rng = np.random.default_rng(0)
    samples = [
        Sample(
            torch.from_numpy(rng.integers(0, 256, (3, 40, 48), dtype=np.uint8)),
            torch.from_numpy(rng.choice([0, 1, 2, 255], (40, 48))),
            str(number),
        )
        for number in range(6)
    ]
    setting = config(iterations=5, warmup_iterations=2, weight_decay=0.01, photometric_distortion=True)
    head = train_head(encode, samples, 3, setting, tmp_path / "checkpoint.pt")

    torch.manual_seed(setting.seed)
    expected = nn.Sequential(nn.BatchNorm2d(6), nn.Conv2d(6, 3, 1))
    nn.init.normal_(expected[1].weight, std=0.01)
    nn.init.zeros_(expected[1].bias)
    optimizer = torch.optim.AdamW(expected.parameters(), betas=(0.9, 0.999), weight_decay=0.01)
    used = []
    for step in range(5):
        batch = []
        for position in range(4 * step, 4 * step + 4):
            order = np.random.default_rng([0, 0, position // 6]).permutation(6)
            used.append(int(order[position % 6]))
            image, mask, _ = samples[used[-1]]
            batch.append(training_sample(image, mask, setting, np.random.default_rng([0, 1, position])))
        images, masks = (torch.stack(part) for part in zip(*batch, strict=True))
        features, grid = encode(images.float() / 255)
        logits = expected(features.transpose(1, 2).reshape(4, 6, *grid))
        logits = F.interpolate(logits, size=(32, 32), mode="bilinear", align_corners=False)
        loss = F.cross_entropy(logits, masks, ignore_index=255, reduction="sum") / masks.numel()
        rate = setting.learning_rate * (1e-6 + (1 - 1e-6) * step / 2 if step < 2 else 1 - (step - 2) / 3)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert sorted(used[:6]) == sorted(used[6:12]) == list(range(6)) and used[:6] != used[6:12]  # whole epochs
    torch.testing.assert_close(list(head.state_dict().values()), list(expected.state_dict().values()))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_change_no_bit_and_lose_no_batch(workers, folder, tmp_path):
    samples = SegmentationSplit(describe(folder), "train")
    seen = []

    def watched(images):
        seen.append(images)
        return encode(images)

    setting = config(iterations=7, num_workers=workers)
    head = train_head(watched, samples, 3, setting, tmp_path / "checkpoint.pt")
    assert head.batch_norm.num_batches_tracked == 7
    for step, images in enumerate(seen[1:]):  # the first call asks for the number of features
        for position, image in enumerate(images, 4 * step):
            order = np.random.default_rng([0, 0, position // 16]).permutation(16)
            sample = samples[int(order[position % 16])]
            expected, _ = training_sample(*sample[:2], setting, np.random.default_rng([0, 1, position]))
            assert torch.equal(image, expected.float() / 255)
    assert len(seen) == 8


def test_the_probe_learns_and_reports_its_conditions(finished, folder):
    output, report = finished
    assert report["mIoU"] > 80 and report["aAcc"] > 90 and set(report["IoU"]) == {"red", "green", "blue"}
    sizes = [sample.mask.shape for sample in SegmentationSplit(describe(folder), "validation")]
    assert report["pixels_left_out"] == sum(width for _, width in sizes) and report["images"] == 5
    assert report["pixels"] == sum((height - 1) * width for height, width in sizes)
    assert "40 iterations of 4 crops of 32; test: 32 pixels, sliding window 32, stride 16" in report["protocol"]
    assert (report["train_images"], report["num_classes"], report["feature_dim"], report["processes"]) == (16, 3, 6, 1)
    assert report["probe"]["seed"] == 0 and report["model"] == "colors of patches"
    assert json.loads((output / "result.json").read_text()) == report


def test_the_head_is_that_of_radio_for_semantic_segmentation(finished):
    from transformers_radio.modeling import RadioConfig
    from transformers_radio.modeling.modeling_radio_heads import RadioForSemanticSegmentation

    tiny = {"hidden_size": 6, "num_hidden_layers": 1, "num_attention_heads": 1, "patch_size": 8, "max_img_size": 32}
    model = RadioForSemanticSegmentation(RadioConfig.from_size("vit-ti-16", **tiny, num_labels=3)).eval()
    missing, unexpected = model.load_state_dict(weights(finished[0]), strict=False)
    assert not unexpected and all(name.startswith("model.") for name in missing)
    images = torch.rand(2, 3, 32, 24)
    head = LinearHead(6, 3).eval()
    head.load_state_dict(weights(finished[0]))
    with torch.no_grad():
        features = model.model.features_to_grid(model.model(images, adaptors=[]).features, 32, 24)
        torch.testing.assert_close(model(images).logits, head(features))


def test_a_finished_probe_is_left_alone_and_another_is_refused(finished, folder):
    output, report = finished
    before = (output / "checkpoint.pt").stat().st_mtime_ns
    assert probe(folder, output, num_workers=1, checkpoint_every=7) == report
    assert (output / "checkpoint.pt").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match=r"differs in learning_rate \(0.05 there, 0.1 here\)"):
        probe(folder, output, learning_rate=0.1)
    with pytest.raises(FileExistsError, match="the encoder's weights"):
        other = lambda images: (encode(images)[0] * 1.1, encode(images)[1])  # noqa: E731
        segmentation_probe(other, "colors of patches", describe(folder), config(), output)


def test_killed_probes_end_with_the_same_bits(finished, folder, tmp_path):
    output = tmp_path / "killed"
    for done in (5, 13):  # iterations; a checkpoint is written after every second one
        process = start(folder, output, dies_at=2 + done + 1 - _iteration(output), num_workers=1)
        process.join()
        assert process.exitcode == -signal.SIGKILL and _iteration(output) == done - 1
    assert not (output / "result.json").exists()
    report = probe(folder, output)
    same = {name: torch.equal(value, weights(output)[name]) for name, value in weights(finished[0]).items()}
    assert set(same.values()) == {True}, same
    assert report == finished[1]


def _iteration(output):
    path = output / "checkpoint.pt"
    return torch.load(path, weights_only=True)["iteration"] if path.exists() else 0


def test_two_processes_are_one(folder, tmp_path):
    short = {"iterations": 8, "warmup_iterations": 2, "checkpoint_every": 8}
    expected = probe(folder, tmp_path / "one", **short)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pair = [start(folder, tmp_path / "two", rank=rank, world=2, port=port, **short) for rank in range(2)]
    for process in pair:
        process.join(timeout=200)
    hung = [process for process in pair if process.is_alive()]
    for process in hung:
        process.kill()
    assert not hung and [process.exitcode for process in pair] == [0, 0]
    report = json.loads((tmp_path / "two" / "result.json").read_text())
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), atol=1e-5, rtol=1e-4)
    # Every image is counted once although five do not divide by two.
    assert report["processes"] == 2 and report["pixels"] == expected["pixels"]
    assert report["mIoU"] == pytest.approx(expected["mIoU"], abs=0.1)


def test_batch_norm_over_one_process_group_is_batch_norm(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        ours, native = FrozenInputBatchNorm(5), nn.BatchNorm2d(5)
        for _ in range(3):
            features = 3 + 2 * torch.randn(4, 5, 6, 7)
            torch.testing.assert_close(ours(features), native(features))
        torch.testing.assert_close(ours.state_dict(), native.state_dict())
        with pytest.raises(ValueError, match="require gradients"):
            ours(features.requires_grad_())
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(ours.eval()(features), native.eval()(features))


def test_faults_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match="encode returned NaN"):
        broken = lambda images: (encode(images)[0] * torch.nan, encode(images)[1])  # noqa: E731
        segmentation_probe(broken, "broken", describe(folder), config(), tmp_path / "nan")
    assert not (tmp_path / "nan").exists()
    with pytest.raises(ValueError, match="batch_size is 0"):
        probe(folder, tmp_path / "zero", batch_size=0)
    with pytest.raises(FloatingPointError, match="The loss of iteration 1 is nan.*last checkpoint is kept"):
        probe(folder, tmp_path / "diverged", learning_rate=float("inf"))
    assert not (tmp_path / "diverged" / "checkpoint.pt").exists()

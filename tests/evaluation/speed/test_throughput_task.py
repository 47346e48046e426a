"""`eval throughput` on tiny models under a clock that the test turns; the decoders against their own libraries."""

import json
import time

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor

from helpers.tiny_sam import SIDE, make_student
from transformers_radio.evaluation.models.encoder import load_encoder
from transformers_radio.evaluation.result import Result
from transformers_radio.evaluation.run import run_task
from transformers_radio.evaluation.speed import task
from transformers_radio.evaluation.speed.task import ThroughputConfig
from transformers_radio.teachers.segment_anything import load_sam

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "small"
    make_student().save_pretrained(folder)
    return str(folder)


def settings(**changes):
    return [f"{key}={value}" for key, value in {"device": "cpu", "repeats": 3, "warmup": 1, **changes}.items()]


def test_every_figure_of_two_interleaved_models(student, tmp_path, monkeypatch):
    now, order = 0.0, []
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    real = load_encoder

    def timed(*arguments):
        nonlocal now
        encoder = real(*arguments)
        encode = encoder.features
        per_image = {"fast": 0.25, "slow": 0.5}[encoder.name]

        def features(images):
            nonlocal now
            now += 1 + per_image * len(images)
            order.append((encoder.name, len(images)))
            return encode(images)

        encoder.features = features
        return encoder

    monkeypatch.setattr(task, "load_encoder", timed)
    models = [f"fast={student}", f"slow={student}"]
    overrides = settings(image_size=32, batch_sizes="[1,4]")
    fast, slow = run_task("throughput", models, None, None, tmp_path, overrides)
    assert order[-16:] == [("fast", 1), ("fast", 4), ("slow", 1), ("slow", 4)] * 4
    assert fast.metrics["ms, batch 1"] == 1250 and fast.metrics["ms, batch 4"] == 2000
    assert fast.metrics["Throughput"] == fast.metrics["images/s, batch 4"] == 2
    assert slow.metrics["Throughput"] == pytest.approx(4 / 3) and slow.metrics["ms (95%), batch 4"] == 3000
    assert fast.metrics["GFLOPs an image"] == slow.metrics["GFLOPs an image"] > 0
    backbone = [p.numel() for name, p in make_student().named_parameters() if not name.startswith("adaptors.")]
    assert fast.metrics["Parameters (M)"] == sum(backbone) / 1e6 == fast.params / 1e6
    assert fast.metrics["Peak MiB, batch 4"] > fast.metrics["Peak MiB, batch 1"] > 4 * fast.params / 2**20
    assert "batch 4, 32x32, float32, cpu (1 threads)" in fast.protocol and "2 models in turn" in fast.protocol
    assert fast.data == "32x32, float32, cpu (1 threads)" and fast.resolution == 32
    assert fast.settings["batch_sizes"] == [1, 4] and "2 FLOPs" in fast.settings["FLOPs"]

    calls = len(order)
    assert run_task("throughput", models, None, None, tmp_path, overrides) == [fast, slow]
    assert len(order) == calls  # nothing was timed again
    with pytest.raises(ValueError, match="interleaved"):  # other company, other figures
        run_task("throughput", models[:1], None, None, tmp_path, overrides)
    (alone,) = run_task("throughput", models[:1], None, None, tmp_path, [*overrides, "overwrite=true"])
    files = sorted(tmp_path.rglob("*.json"))
    assert [file.parent.name for file in files] == ["fast", "slow"] and Result.read(files[0]) == alone


def test_a_linear_head_adds_its_own_work(student, tmp_path):
    (result,) = run_task("throughput", [student], None, None, tmp_path, settings(decoder="linear", image_size=48))
    metrics = result.metrics
    added = metrics["GFLOPs an image + linear"] - metrics["GFLOPs an image"]
    assert added == pytest.approx(2 * 6 * 6 * 32 * 150 / 1e9)
    head = 32 * 150 + 150 + 2 * 32  # convolution, batch norm
    assert metrics["Parameters (M) + linear"] - metrics["Parameters (M)"] == pytest.approx(head / 1e6)
    # logits at the image's size are alive at the end, in float32
    assert metrics["Peak MiB, batch 32 + linear"] > 32 * 150 * 48 * 48 * 4 / 2**20
    assert result.data.endswith("linear decoder")


def test_windows_save_what_their_attention_does_not_compute(student, tmp_path):
    """64 patches and 4 other tokens. Of 4 blocks 2 stay global; in the others 4 windows of 16 patches attend."""

    def measure(**changes):
        own = settings(image_size=64, batch_sizes="[1]", **changes)
        return run_task("throughput", [f"m={student}"], None, None, tmp_path, own)[0]

    default, everywhere, windowed = measure(), measure(window_size=0), measure(window_size=4)
    flops = [result.metrics["GFLOPs an image"] * 1e9 for result in (default, everywhere, windowed)]
    assert flops[0] == flops[1]  # this student's default is global attention
    attention = 2 * 2 * 32  # two products of width 32
    bypassing = 4 * 2 * (4 * 32 * 32 + 2 * 32 * 64)  # the other tokens skip windowed blocks
    saved = 2 * (attention * (68**2 - 4 * 16**2) + bypassing)
    assert flops[1] - flops[2] == pytest.approx(saved)
    assert windowed.data.endswith(", windows of 4 patches") and "windows of 4 patches; model" in windowed.protocol
    assert "windows of 4 patches" in windowed.settings["features"] and everywhere.data.endswith(", global attention")
    assert len(list(tmp_path.rglob("*.json"))) == 3
    with pytest.raises(ValueError, match="multiples of 24, not 64 x 64: use 72 x 72"):
        measure(window_size=3)
    with pytest.raises(ValueError, match="window_size is -1; expected patches"):
        measure(window_size=-1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sams_decoder_behind_a_student_and_sam(student, sam_file, tmp_path, dtype):
    models = [student, f"segment_anything:{sam_file}"]
    overrides = settings(decoder="sam", sam=sam_file, batch_sizes="[1,2]", dtype=dtype)
    results = run_task("throughput", models, None, None, tmp_path, overrides)
    for result in results:
        assert result.resolution == SIDE  # SAM's own
        assert result.metrics["GFLOPs an image + sam"] > result.metrics["GFLOPs an image"]
        assert result.metrics["images/s, batch 2 + sam"] > 0
        assert len(json.dumps(result.settings)) and "one box per image" in result.protocol
    sam = load_sam(str(sam_file))
    decoder = sum(tensor.numel() for part in (sam.prompt_encoder, sam.mask_decoder) for tensor in part.parameters())
    encoder = sum(parameter.numel() for parameter in sam.image_encoder.parameters())
    assert results[1].metrics["Parameters (M) + sam"] == pytest.approx((encoder + decoder) / 1e6)


def test_what_is_timed_with_sam_are_sams_masks(sam_file):
    sam = load_sam(str(sam_file))
    encoder = load_encoder(f"segment_anything:{sam_file}", SIDE)
    config = ThroughputConfig(decoder="sam", sam=str(sam_file), device="cpu")
    forward = task._with_decoder(encoder, config, sam)
    images = task._images(encoder, 2, torch.uint8)
    masks = forward.run(images)
    predictor = SamPredictor(sam)
    for image, mask in zip(images, masks, strict=True):
        predictor.set_image(image.permute(1, 2, 0).numpy())
        box = np.array([SIDE / 4, SIDE / 4, 3 * SIDE / 4, 3 * SIDE / 4])
        expected, _, _ = predictor.predict(box=box, multimask_output=False)
        assert np.array_equal(mask.numpy(), expected)


def test_zero_shot_runs_the_language_adaptor_and_one_product(tmp_path):
    from importlib import resources

    clip = resources.files("transformers_radio") / "quickstart" / "teachers" / "clip"
    (result,) = run_task(
        "throughput", [f"open_clip:{clip}"], None, None, tmp_path, settings(decoder="zero-shot", batch_sizes="[1]")
    )
    added = result.metrics["GFLOPs an image + zero-shot"] - result.metrics["GFLOPs an image"]
    assert added == pytest.approx(2 * 128 * 1000 / 1e9, rel=1e-6)


def test_what_cannot_be_measured_is_refused_first(student, sam_file, tmp_path, monkeypatch):
    monkeypatch.setattr(task, "latencies", lambda *_: pytest.fail("something was timed"))
    for changes, message in [
        ({"decoder": "masks"}, "decoder is 'masks'; expected one of none, linear"),
        ({"batch_sizes": "[8]"}, "put 1 into it"),
        ({"batch_sizes": "[1,1]"}, "expected different numbers"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"repeats": 0}, "repeats is 0"),
        ({"classes": 0}, "classes is 0"),
        ({"image_size": 30}, "multiples of 8"),
        ({"decoder": "zero-shot"}, "no adaptor to a teacher with a text tower"),
        ({"color": "red"}, "color"),
    ]:
        with pytest.raises(ValueError, match=message):
            run_task("throughput", [student], None, None, tmp_path, settings(**changes))
    with pytest.raises(FileNotFoundError, match="no file missing.pth"):
        run_task("throughput", [student], None, None, tmp_path, settings(decoder="sam", sam="missing.pth"))
    with pytest.raises(ValueError, match="its own 64 pixels, not at 32"):
        run_task(
            "throughput",
            [f"segment_anything:{sam_file}"],
            None,
            None,
            tmp_path,
            settings(decoder="sam", sam=sam_file, image_size=32),
        )
    with pytest.raises(ValueError, match="The settings are"):
        run_task("throughput", [student], "images", None, tmp_path, settings())
    assert not list(tmp_path.rglob("*.json"))

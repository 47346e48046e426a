"""Norms and moments against numpy and scipy, resizing against Pillow, position noise against closed forms."""

import math
from importlib import resources

import numpy as np
import pytest
import scipy.fft
import scipy.stats
import torch
from PIL import Image

from transformers_radio.evaluation.features.statistics import (
    channel_statistics,
    feature_cosine,
    patch_norms,
    position_noise,
    position_table,
)
from transformers_radio.evaluation.models.encoder import load_encoder
from transformers_radio.evaluation.result import Result
from transformers_radio.evaluation.run import run_task
from transformers_radio.modeling import RadioConfig, RadioModel
from transformers_radio.teachers import build_teacher

torch.set_num_threads(1)
TEACHERS = resources.files("transformers_radio") / "quickstart" / "teachers"


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wave(size, u, v, phase=0.0):
    """A plane wave of (u, v) cycles over the table, (size, size)."""
    row, column = torch.arange(size)[:, None], torch.arange(size)
    return (2 * math.pi * (u * row + v * column) / size + phase).cos()


class TestPatchNorms:
    def test_against_numpy_and_planted_outliers(self):
        features = noise(5, 6 * 4, 16).double()
        features /= features.norm(dim=2, keepdim=True) / (1 + 0.1 * noise(5, 24, 1, seed=1).clamp(-2, 2))
        features[:, 13] *= 20  # row 3, column 1, in every image
        features[:2, 23] *= 50  # row 5, column 3, in two of five
        found = patch_norms(features.float(), (6, 4), factor=3)
        norms = np.linalg.norm(features.numpy(), axis=2)
        np.testing.assert_allclose(found.norms.reshape(5, 24), norms, rtol=1e-6)
        assert found.median == pytest.approx(np.median(norms)) and found.p99 == pytest.approx(np.percentile(norms, 99))
        assert found.threshold == pytest.approx(3 * np.median(norms))
        assert found.share == pytest.approx((5 + 2) / 120)
        assert found.most_frequent(10) == [(3, 1, 1.0), (5, 3, pytest.approx(0.4))]
        assert found.most_frequent(1) == [(3, 1, 1.0)]
        assert found.border_share == pytest.approx(2 / 7)  # the corner, and not row 3, column 1
        assert found.positions.sum() == pytest.approx(1.4)

    def test_no_outliers_and_bad_input(self):
        found = patch_norms(torch.ones(2, 6, 3), (2, 3))
        assert found.share == 0 and found.most_frequent(5) == [] and math.isnan(found.border_share)
        with pytest.raises(ValueError, match=r"\(2, 6, 3\); expected \(N, 2 \* 2, C\)"):
            patch_norms(torch.ones(2, 6, 3), (2, 2))
        with pytest.raises(ValueError, match="factor is 1"):
            patch_norms(torch.ones(2, 6, 3), (2, 3), factor=1)
        with pytest.raises(ValueError, match="NaN"):
            patch_norms(torch.full((2, 6, 3), math.nan), (2, 3))


class TestChannels:
    def test_moments_are_scipys_even_far_from_zero(self):
        features = noise(7, 50, 6).double().pow(3) * torch.tensor([1.0, 2, 3, 4, 5, 6]) + 1e3
        features[..., 2] = 5e4  # constant
        found = channel_statistics(features.float())
        flat = features.float().double().flatten(0, 1).numpy()
        np.testing.assert_allclose(found.mean, flat.mean(0))
        np.testing.assert_allclose(found.std, flat.std(0))
        np.testing.assert_allclose(found.rms, np.sqrt((flat**2).mean(0)))
        alive = [0, 1, 3, 4, 5]
        np.testing.assert_allclose(found.kurtosis[alive], scipy.stats.kurtosis(flat[:, alive]))
        assert found.dead.tolist() == [False, False, True, False, False, False] and math.isnan(found.kurtosis[2])
        assert found.largest == 2 and found.largest_ratio == pytest.approx(5e4 / float(found.rms.median()))

    def test_many_patches_go_through_in_parts(self):
        features = noise(70000, 2)
        assert found_kurtosis(features) == pytest.approx(scipy.stats.kurtosis(features.double().numpy()).tolist())
        with pytest.raises(ValueError, match="at least two patches"):
            channel_statistics(noise(1, 3))


def found_kurtosis(features):
    return channel_statistics(features).kurtosis.tolist()


class TestFeatureCosine:
    def test_the_finer_grid_is_brought_to_the_coarser_as_pillow_does(self):
        coarse, fine = noise(2, 4 * 6, 5), noise(2, 8 * 9, 5, seed=1)
        found = feature_cosine(coarse, (4, 6), fine, (8, 9))
        expected = []
        for image, other in zip(coarse.numpy(), fine.numpy(), strict=True):
            maps = other.reshape(8, 9, 5)
            # Pillow's bilinear is antialiased
            small = [
                np.array(Image.fromarray(maps[..., c]).resize((6, 4), Image.Resampling.BILINEAR)) for c in range(5)
            ]
            small = np.stack(small, axis=-1).reshape(24, 5)
            cosine = (image * small).sum(1) / np.linalg.norm(image, axis=1) / np.linalg.norm(small, axis=1)
            expected.append(cosine.mean())
        np.testing.assert_allclose(found, expected, atol=1e-5)
        np.testing.assert_allclose(feature_cosine(fine, (8, 9), coarse, (4, 6)), expected, atol=1e-5)

    def test_equal_is_one_and_one_grid_may_be_higher_and_the_other_wider(self):
        features = noise(3, 12, 4)
        torch.testing.assert_close(feature_cosine(features, (3, 4), 5 * features, (3, 4)), torch.ones(3))
        ramp = torch.linspace(1, 2, 4).repeat(6)[None, :, None] * torch.tensor([1.0, 2.0])  # (1, 6 x 4, 2)
        torch.testing.assert_close(feature_cosine(ramp, (6, 4), ramp[:, :12], (2, 6)), torch.ones(1))
        with pytest.raises(ValueError, match="one B and one C"):
            feature_cosine(features, (3, 4), noise(3, 12, 5), (3, 4))


class TestPositionNoise:
    def test_equals_scipys_cosine_transform(self):
        table = noise(12, 9, 7).double() + 3
        transformed = scipy.fft.dctn(table.numpy(), axes=(0, 1), norm="ortho")
        energy = (transformed**2).sum(2)
        energy[0, 0] = 0
        frequency = np.hypot(np.arange(12)[:, None] / 24, np.arange(9) / 18)
        assert position_noise(table) == pytest.approx(energy[frequency > 0.25].sum() / energy.sum())

    @pytest.mark.parametrize("u, v, expected", [(1, 0, 0), (0, 7, 0), (4, 5, 0), (7, 0, 0), (9, 0, 1), (12, 12, 1)])
    def test_a_cosine_of_the_transform_is_all_signal_or_all_noise(self, u, v, expected):
        """u, v half periods over 16 patches: u / 32 cycles a patch."""
        place = torch.arange(16, dtype=torch.float64) + 0.5
        table = (math.pi * u * place / 16).cos()[:, None] * (math.pi * v * place / 16).cos()
        table = table[..., None] * torch.tensor([1.0, -2.0]) + 5
        assert position_noise(table) == pytest.approx(expected, abs=1e-12)

    def test_plane_waves_of_any_phase(self):
        """Whole periods that do not fit the mirrored borders leak a little, as close to the threshold as to 0."""
        phases = [0.0, 0.7, 1.4, 2.1]
        smooth = torch.stack([wave(32, 2, 1, phase) for phase in phases], dim=2)
        rough = torch.stack([wave(32, 13, 9, phase) for phase in phases], dim=2)
        assert position_noise(smooth) < 0.01 and position_noise(rough) > 0.95
        assert position_noise(smooth.double() + 100) == pytest.approx(position_noise(smooth), rel=1e-3)
        assert position_noise(-3 * smooth) == pytest.approx(position_noise(smooth), rel=1e-6)

    def test_white_noise_has_its_share_of_the_coefficients(self):
        rows, columns = np.indices((32, 32))
        expected = (np.hypot(rows, columns) / 64 > 0.25).sum() / (32 * 32 - 1)
        assert expected == pytest.approx(1 - math.pi / 16, abs=0.02)
        assert position_noise(noise(32, 32, 256)) == pytest.approx(expected, abs=0.005)

    def test_a_mixture_has_the_mixture_of_their_energies(self):
        place = torch.arange(32) + 0.5
        smooth = (math.pi * 3 * place / 32).cos()[:, None, None].expand(32, 32, 64)  # variance 1/2
        found = position_noise(smooth + 0.25 * noise(32, 32, 64))  # variance 1/16, 0.80 of it fast
        assert found == pytest.approx(0.80 * (1 / 16) / (1 / 2 + 1 / 16), abs=0.005)

    def test_slopes_are_no_noise(self):
        slope = torch.linspace(-1, 1, 32)[:, None, None].expand(32, 32, 1)
        assert position_noise(slope) < 1e-3  # a Fourier transform would see the jump from border to border
        power = torch.fft.fft2(slope[..., 0]).abs().square()
        power[0, 0] = 0
        frequency = torch.hypot(*torch.meshgrid(*[torch.fft.fftfreq(32)] * 2, indexing="ij"))
        assert power[frequency > 0.25].sum() / power.sum() > 0.01

    def test_a_constant_or_a_line_is_refused(self):
        with pytest.raises(ValueError, match="constant"):
            position_noise(torch.full((8, 8, 3), 0.1))
        with pytest.raises(ValueError, match=r"\(1, 8, 3\)"):
            position_noise(noise(1, 8, 3))


class TestPositionTable:
    def test_of_each_library(self):
        clip = build_teacher("open_clip", str(TEACHERS / "clip"))
        dino = build_teacher("transformers", str(TEACHERS / "dinov2"))
        sam = build_teacher("segment_anything", str(TEACHERS / "sam" / "sam.pth"))
        for teacher, stored, prefix in [
            (clip, clip.model.positional_embedding, 1),
            (dino, dino.model.embeddings.position_embeddings[0], 1),
            (sam, sam.model.pos_embed[0].flatten(0, 1), 0),
        ]:
            side = teacher.image_size // teacher.patch_size
            table = position_table(teacher)
            assert table.shape == (side, side, teacher.feature_dim)
            assert torch.equal(table.flatten(0, 1), stored[prefix:])

    def test_of_a_student_and_of_networks_without_one(self):
        torch.manual_seed(0)
        config = RadioConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, patch_size=8, max_img_size=64)
        student = RadioModel(config)
        table = position_table(student)
        assert table.shape == (8, 8, 16)
        # row by row, as the model itself uses it
        assert torch.equal(table.flatten(0, 1), student.eval().embeddings.positions(1, 8, 8, torch.float32)[0])
        assert position_table(torch.nn.Conv2d(3, 4, 3)) is None
        relative = torch.nn.Module()
        relative.rel_pos_h = torch.nn.Parameter(torch.zeros(9, 4))
        relative.pos_embed = torch.nn.Parameter(torch.zeros(1, 80, 4))  # neither a square nor a square and a few more
        assert position_table(relative) is not None  # 64 and 16
        relative.pos_embed = torch.nn.Parameter(torch.zeros(1, 40, 24, 4)[:, :, 0])
        assert position_table(relative).shape == (6, 6, 4)


@pytest.fixture
def student(tmp_path):
    """Its position table is a plane wave with white noise on it, and one channel stands out."""
    torch.manual_seed(0)
    tiny = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2.0}
    model = RadioModel(RadioConfig(**tiny, patch_size=8, max_img_size=64, preferred_resolution=32)).eval()
    with torch.no_grad():
        table = wave(8, 1, 0)[..., None] + 0.3 * noise(8, 8, 24)
        model.embeddings.position_embedding.copy_(table.flatten(0, 1))
        model.encoder.layer[-1].mlp.fc2.bias[7] = 30
    model.save_pretrained(tmp_path / "student")
    return tmp_path / "student"


def test_the_task_reports_what_is_in_the_features(student, tmp_path):
    folder = tmp_path / "pictures" / "validation"
    folder.mkdir(parents=True)
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    overrides = ["images=6", "batch_size=2", "outlier_factor=1.02"]
    (result,) = run_task(
        "features", [f"mine={student}"], str(tmp_path / "pictures"), None, tmp_path / "out", overrides
    )
    assert result.counts == {"images": 5, "skipped_images": 1, "patches": 5 * 16, "channels": 24}
    assert result.settings["largest_channel"] == 7 and result.metrics["Largest channel over median"] > 5

    encoder = load_encoder(str(student))
    images = [
        torch.from_numpy(np.array(Image.open(folder / f"{n}.png").resize((32, 32), Image.Resampling.BICUBIC)))
        for n in range(5)
    ]
    features, _ = encoder.features(torch.stack(images).permute(0, 3, 1, 2).float() / 255)
    norms = np.linalg.norm(features.numpy(), axis=2)
    assert result.metrics["Norm, median"] == pytest.approx(np.median(norms), rel=1e-5)
    high = norms > 1.02 * np.median(norms)
    assert result.metrics["High-norm patches"] == pytest.approx(100 * high.mean())
    row, column, share = result.settings["high_norm_positions"][0]
    assert share == pytest.approx(high.mean(0).max()) == pytest.approx(high.mean(0)[4 * row + column])
    kurtosis = scipy.stats.kurtosis(features.double().flatten(0, 1).numpy())
    assert result.metrics["Channel kurtosis, median"] == pytest.approx(np.sort(kurtosis)[11], rel=1e-4)
    # stored 8 x 8; used 4 x 4
    stored = RadioModel.from_pretrained(student).eval().embeddings
    noisy = position_noise(stored.position_embedding[0].detach().unflatten(0, (8, 8)))
    assert result.metrics["Position noise"] == pytest.approx(100 * noisy) and 0.05 < noisy < 0.4
    used = stored.positions(1, 4, 4, torch.float32)[0].detach().unflatten(0, (4, 4))
    assert result.metrics["Position noise, resized"] == pytest.approx(100 * position_noise(used))
    assert result.settings["position_table"] == [8, 8, 24] and result.resolution == 32

    out = tmp_path / "out" / "mine"
    assert Result.read(out / "features.pictures.json") == result
    picture = np.array(Image.open(out / "features.pictures.png").convert("RGB"))
    assert picture.shape[0] > 800 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 100
    assert (out / "features.pictures" / "statistics.json").is_file()


def test_bad_settings_are_refused_first(student, tmp_path):
    run = lambda **changes: run_task(  # noqa: E731
        "features", [str(student)], str(tmp_path), None, tmp_path / "out", [f"{k}={v}" for k, v in changes.items()]
    )
    with pytest.raises(ValueError, match="images is 0"):
        run(images=0)
    with pytest.raises(ValueError, match="outlier_factor is 0.5"):
        run(outlier_factor=0.5)
    with pytest.raises(FileNotFoundError):
        run(split="test")

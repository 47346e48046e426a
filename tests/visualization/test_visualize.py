"""PCA against scikit-learn; the figure by its pixels."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA

from transformers_radio.evaluation import pca_rgb
from transformers_radio.evaluation.pca import fit_pca
from transformers_radio.visualization import teacher_student_figure


def patch_features(count: int, seed: int = 0, channels: int = 10) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.tensor([5.0, 3.0, 2.0] + [0.2] * (channels - 3))
    mixing = torch.randn(channels, channels, generator=torch.Generator().manual_seed(7))
    return torch.randn(count, channels, generator=generator) * scales @ mixing + 4


def test_equals_scikit_learn_signs_included():
    grids = [(8, 10), (6, 20)]
    features = [patch_features(80, 0), patch_features(120, 1)]
    patches = torch.cat(features).double().numpy()
    distance = np.linalg.norm(patches - torch.cat(features).median(dim=0).values.numpy(), axis=1)
    pca = PCA(3, svd_solver="full").fit(patches[distance <= np.quantile(distance, 0.97)])
    components = pca.transform(patches)  # scikit-learn also makes the largest loading positive
    low, high = np.percentile(components, [1, 99], axis=0)
    expected = np.clip((components - low) / (high - low), 0, 1)
    first, second = pca_rgb(features, grids)
    assert first.shape == (8, 10, 3) and second.shape == (6, 20, 3) and first.dtype == torch.float32
    np.testing.assert_allclose(first.reshape(80, 3), expected[:80], atol=1e-5)
    np.testing.assert_allclose(second.reshape(120, 3), expected[80:], atol=1e-5)


def test_artifact_patches_do_not_take_over_the_colors():
    clean = patch_features(400)
    spiked = clean.clone()
    spiked[[3, 77, 200]] += 500 * torch.eye(10)[:3]
    change = (pca_rgb([clean], [(20, 20)])[0] - pca_rgb([spiked], [(20, 20)])[0]).abs().reshape(400, 3)
    change[[3, 77, 200]] = 0
    assert change.mean() < 0.05
    naive = [PCA(1).fit(x.numpy()).components_[0] for x in (clean, spiked)]
    assert abs(naive[0] @ naive[1]) < 0.9  # where plain PCA follows the artifacts


def test_constant_features_are_black_and_bad_ones_are_named():
    assert torch.equal(pca_rgb([torch.full((6, 4), 3.7)], [(2, 3)])[0], torch.zeros(2, 3, 3))
    with pytest.raises(ValueError, match=r"\(6, 4\); expected \(2 \* 2, C\)"):
        pca_rgb([torch.ones(6, 4)], [(2, 2)])
    with pytest.raises(ValueError, match="C >= 3"):
        pca_rgb([torch.ones(4, 2)], [(2, 2)])
    with pytest.raises(ValueError, match="NaN"):
        pca_rgb([torch.full((4, 3), torch.nan)], [(2, 2)])


@pytest.fixture
def figure_inputs():
    colors = torch.tensor([[250, 10, 20], [10, 200, 30]], dtype=torch.uint8)
    images = colors[:, :, None, None].expand(2, 3, 32, 32)
    halves = torch.zeros(2, 4, 4, 5)  # features that split each image into a left and a right half
    halves[:, :, 2:, 0] = 1
    return images, {
        "CLIP": (halves.reshape(2, 16, 5), (4, 4)),
        "student": (patch_features(72).reshape(2, 36, 10), (6, 6)),
    }


def test_figure_shows_inputs_and_components_in_their_places(figure_inputs, tmp_path):
    images, columns = figure_inputs
    path = teacher_student_figure(images, columns, tmp_path / "new" / "figure.png", panel_inches=1.0, dpi=100)
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    # 0.12 margins, 0.06 gaps, 0.42 header, 1.0 panels, in hundreds of pixels: 3 columns and 2 rows.
    assert pixels.shape == (24 + 42 + 200 + 6, 24 + 300 + 12, 3)
    top, left = [54, 160], [12, 118, 224]
    for row in range(2):
        panel = pixels[top[row] + 2 : top[row] + 98, left[0] + 2 : left[0] + 98]
        assert np.abs(panel - images[row, :, 0, 0].numpy()).max() <= 1
        halves = pixels[top[row] + 2 : top[row] + 98, left[1] + 2 : left[1] + 98, 0]
        assert (halves[:, :46] == 0).all() and (halves[:, 50:] == 255).all()
        assert (
            len(np.unique(pixels[top[row] + 2 : top[row] + 98, left[2] + 2 : left[2] + 98].reshape(-1, 3), axis=0))
            > 18
        )
    for column in left:  # a title above each column, white between the columns
        assert pixels[:50, column : column + 100].min() < 60
        assert (pixels[:, column - 5 : column - 1] == 255).all()
    assert [file.name for file in path.parent.iterdir()] == ["figure.png"]


def test_figure_is_the_same_bytes_again(figure_inputs, tmp_path):
    images, columns = figure_inputs
    first = teacher_student_figure(images, columns, tmp_path / "a.png").read_bytes()
    floats = teacher_student_figure(images.float() / 255, columns, tmp_path / "a.png").read_bytes()
    assert first == teacher_student_figure(images, columns, tmp_path / "b.png").read_bytes() == floats


def test_figure_refuses_features_of_other_images(figure_inputs, tmp_path):
    images, columns = figure_inputs
    with pytest.raises(ValueError, match="'CLIP' has features of 2 images; expected 1"):
        teacher_student_figure(images[:1], columns, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_another_basis_shows_features_as_scikit_learn_transforms_them():
    teacher, student = patch_features(90, 0), patch_features(24, 1) * 1.3
    distance = np.linalg.norm(teacher.double().numpy() - teacher.median(dim=0).values.numpy(), axis=1)
    pca = PCA(3, svd_solver="full").fit(teacher.double().numpy()[distance <= np.quantile(distance, 0.97)])
    low, high = np.percentile(pca.transform(teacher.double().numpy()), [1, 99], axis=0)
    expected = np.clip((pca.transform(student.double().numpy()) - low) / (high - low), 0, 1)
    (shown,) = pca_rgb([student], [(4, 6)], fit_pca([teacher]))
    np.testing.assert_allclose(shown.reshape(24, 3), expected, atol=1e-5)
    with pytest.raises(ValueError, match="10 wide, but their basis is 7 wide"):
        pca_rgb([student], [(4, 6)], fit_pca([patch_features(30, channels=7)]))


def panel(path, row, column):
    """A panel's pixels (96, 96, 3) of a figure with panels of 100 pixels, without its edges."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    top, left = 54 + 106 * row, 12 + 106 * column
    return pixels[top + 2 : top + 98, left + 2 : left + 98]


def test_columns_of_one_basis_have_equal_colors_for_equal_features(tmp_path):
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    first, second = patch_features(32, 0).reshape(2, 16, 10), patch_features(32, 1).reshape(2, 16, 10)
    columns = {"teacher": (first, (4, 4)), "as teacher": (torch.stack([second[0], first[1]]), (4, 4))}
    options = {"panel_inches": 1.0, "dpi": 100}
    own = teacher_student_figure(images, columns, tmp_path / "own.png", **options)
    assert not np.array_equal(panel(own, 1, 1), panel(own, 1, 2))  # the same features in two bases
    shared = {"as teacher": "teacher"}
    common = teacher_student_figure(images, columns, tmp_path / "common.png", **options, basis_of=shared)
    assert np.array_equal(panel(common, 1, 1), panel(common, 1, 2))
    assert not np.array_equal(panel(common, 0, 1), panel(common, 0, 2))
    wrong = columns | {"narrow": (torch.ones(2, 16, 5), (4, 4))}
    with pytest.raises(ValueError, match="'narrow' cannot take the basis of 'teacher'.*'narrow': 5"):
        teacher_student_figure(images, wrong, tmp_path / "wrong.png", basis_of={"narrow": "teacher"})
    assert not (tmp_path / "wrong.png").exists()


def test_a_basis_per_image_shows_each_image_as_if_alone(tmp_path):
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    features = patch_features(32).reshape(2, 16, 10) * torch.tensor([1.0, 0.1])[:, None, None]
    options = {"panel_inches": 1.0, "dpi": 100}
    both = teacher_student_figure(
        images, {"m": (features, (4, 4))}, tmp_path / "both.png", **options, basis_per_image=True
    )
    for row in range(2):
        alone = {"m": (features[row : row + 1], (4, 4))}
        single = teacher_student_figure(images[:1], alone, tmp_path / "alone.png", **options)
        assert np.array_equal(panel(both, row, 1), panel(single, 0, 1))

"""Layout by pixels, heat by the color map's ends and by Pillow's resize."""

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from transformers_radio.visualization.panels import Column, heat, photographs, write_panels

BLACK, WHITE = torch.zeros(8, 8, 3), torch.ones(8, 8, 3)


def read(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_rows_are_as_high_as_their_images_and_titles_stand_beside_them(tmp_path):
    gray = torch.full((3, 20, 40), 128, dtype=torch.uint8)
    tall = torch.full((3, 40, 40), 60, dtype=torch.uint8)
    columns = [photographs([gray, tall]), Column("m", "s", [WHITE * 0.2, WHITE * 0.6])]
    path = write_panels(columns, tmp_path / "a.png", row_titles=["wide", "tall"], panel_inches=1.0, dpi=100)
    pixels = read(path)
    # 0.12 margins, 0.26 row titles, 0.26 titles, 0.16 subtitles, 0.06 gaps; rows of 0.5 and 1 inch, columns of 1 inch
    assert pixels.shape == (24 + 42 + 50 + 6 + 100, 38 + 12 + 206, 3)
    for (top, bottom), values in (((56, 102), (128, 51)), ((112, 208), (60, 153))):
        assert np.abs(pixels[top:bottom, 40:136] - values[0]).max() <= 1
        assert np.abs(pixels[top:bottom, 146:242] - values[1]).max() <= 1
    for rows in (slice(54, 104), slice(110, 210)):  # ink of the titles at the left, white between them and the panels
        assert pixels[rows, 12:36].min() < 60 and (pixels[rows, 37] == 255).all()


def test_what_is_drawn_lands_on_the_panel_it_is_for(tmp_path):
    def draw(axes, row):
        if row == 1:
            axes.plot(5, 2, "s", color="red", markersize=4)  # at x = 5, y = 2 of 8 pixels

    path = write_panels([Column("a", "", [WHITE, WHITE], draw=draw)], tmp_path / "a.png", panel_inches=1.0, dpi=100)
    ys, xs = np.nonzero((read(path)[..., 0] > 200) & (read(path)[..., 1] < 80))
    # second row begins at 12 + 42 + 100 + 6; a pixel is 12.5 wide and its coordinate its middle
    assert abs(ys.mean() - (160 + 2.5 * 12.5)) < 1.5 and abs(xs.mean() - (12 + 5.5 * 12.5)) < 1.5


def test_titles_of_any_length_stay_over_their_own_panels(tmp_path):
    titles = ["w" * 9, "a very long name of a model " * 4, "$x$ & 100% $y$"]
    columns = [Column(title, title, [BLACK]) for title in titles]
    header = read(write_panels(columns, tmp_path / "a.png", panel_inches=1.5, dpi=100))[:54]
    for number in range(3):
        left = 12 + 156 * number
        assert header[:, left : left + 150].min() < 100
        assert (header[:, left - 6 : left] == 255).all()
    assert (header[:, -6:] == 255).all()


def test_heat_goes_from_the_darkest_to_the_brightest_color():
    values = torch.tensor([[1.0, 2.0], [3.0, 9.0]])
    dark, middle, bright = (torch.tensor(matplotlib.colormaps["inferno"](x)[:3]) for x in (0.0, 0.5, 1.0))
    colors = heat(values, 1.0, 3.0)
    assert colors.shape == (2, 2, 3) and colors.dtype == torch.float32
    for place, expected in (((0, 0), dark), ((0, 1), middle), ((1, 0), bright), ((1, 1), bright)):
        torch.testing.assert_close(colors[place], expected.float(), atol=1e-2, rtol=0)
    torch.testing.assert_close(heat(values, 4.0, 4.0)[0], dark.float().expand(2, 3), atol=1e-6, rtol=0)


def test_heat_over_an_image_fills_each_patch_and_keeps_the_image_visible():
    values = torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
    image = torch.zeros(3, 32, 32)
    image[:, :, 16:] = 1
    shown = heat(values, 0.0, 1.0, image)
    patches = np.asarray(Image.fromarray(values.numpy()).resize((32, 32), Image.Resampling.NEAREST))
    colors = matplotlib.colormaps["inferno"](patches)[..., :3]
    share = (shown[5, 20] - shown[5, 4]).mean() - (colors[5, 20] - colors[5, 4]).mean()  # of white against black
    assert 0.2 < share < 0.8
    expected = (1 - 0.35) * colors + 0.35 * image.permute(1, 2, 0).numpy()
    np.testing.assert_allclose(shown, expected, atol=1e-6)
    assert torch.equal(shown, heat(values, 0.0, 1.0, (image * 255).to(torch.uint8)))


def test_a_second_line_of_a_subtitle_makes_room_for_itself(tmp_path):
    one = [Column("a", "first", [BLACK]), Column("b", "", [BLACK])]
    two = [Column("a", "first\nsecond", [BLACK]), Column("b", "first", [BLACK])]
    short, tall = (
        read(write_panels(columns, tmp_path / f"{number}.png", panel_inches=1.0, dpi=100))
        for number, columns in enumerate((one, two))
    )
    assert len(tall) - len(short) == 16  # 0.16 inches
    ink = [(tall[:66, left : left + 100] < 200).any(axis=(1, 2)) for left in (12, 118)]
    assert ink[0][45:60].any() and not ink[1][45:60].any()  # the second line is of the first column only


def test_columns_of_different_lengths_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'b': 1"):
        write_panels([Column("a", "", [BLACK, BLACK]), Column("b", "", [BLACK])], tmp_path / "a.png")
    with pytest.raises(ValueError, match="2 titles for 1 rows"):
        write_panels([Column("a", "", [BLACK])], tmp_path / "a.png", row_titles=["x", "y"])
    assert not list(tmp_path.iterdir())

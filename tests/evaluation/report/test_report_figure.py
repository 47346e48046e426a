"""The plot by its pixels, its labels by their boxes, its colours by what the colour-blind see."""

import itertools

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Annotation
from PIL import Image

from transformers_radio.evaluation.report import figure as report_figure
from transformers_radio.evaluation.report.figure import STUDENT, TEACHER, quality_throughput_figure
from transformers_radio.evaluation.report.table import Row, Table

# Model, throughput, zero-shot, k-NN, ADE20K and VOC of the paper's Table 1
PAPER = [
    ("OpenCLIP-H/14", 503, 77.19, 81.10, 40.04, 68.03),
    ("MetaCLIP-H/14", 486, 80.51, 82.12, 35.39, 62.62),
    ("SigLIP-L/14", 241, 82.61, 85.16, 40.53, 70.31),
    ("InternViT-6B, 224 px", 63, 83.20, 78.43, 47.20, 76.85),
    ("InternViT-6B, 448 px", 14, None, 68.64, 42.78, 74.43),
    ("DFN-CLIP-H/14", 170, 83.90, 85.27, 39.00, 70.29),
    ("OpenAI-CLIP-L/14", 414, 75.54, 79.80, 36.51, 67.04),
    ("DINOv2-g/14-reg", 294, None, 83.41, 48.68, 82.78),
    ("SAM-H/16", 12, None, 22.12, 28.08, 34.34),
    ("E-RADIO-L", 468, 80.73, 83.89, 48.22, 81.64),
    ("RADIO-H/16", 158, 82.93, 86.06, 51.34, 84.71),
]


def paper_table():
    names = ("Zero-shot", "k-NN", "ADE20K", "VOC")
    return Table("Table 1", [Row(m, throughput=s, metrics=dict(zip(names, v, strict=True))) for m, s, *v in PAPER])


@pytest.fixture
def figures(monkeypatch):
    seen = []
    save = report_figure.save_figure

    def keep(figure, path):
        seen.extend([figure] if path.suffix == ".png" else [])
        return save(figure, path)

    monkeypatch.setattr(report_figure, "save_figure", keep)
    return seen


def labels(axes):
    return [text for text in axes.texts if isinstance(text, Annotation) and text.get_text()]


def test_every_model_of_table_1_is_named_once_and_no_name_hides_another_or_a_point(figures, tmp_path):
    students = ["E-RADIO-L", "RADIO-H/16"]
    path, vectors = quality_throughput_figure(paper_table(), students, tmp_path / "a.png")
    assert (
        vectors.name == "a.pdf" and vectors.read_bytes().startswith(b"%PDF") and b"/Type3" not in vectors.read_bytes()
    )
    (figure,) = figures
    figure.savefig(tmp_path / "again.png", dpi=figure.dpi)  # boxes below are of a figure that has been drawn
    assert Image.open(path).size == Image.open(tmp_path / "again.png").size
    assert [axes.get_ylabel() for axes in figure.axes] == ["Zero-shot (%)", "k-NN (%)", "ADE20K (%)", "VOC (%)"]
    assert {axes.get_xlabel() for axes in figure.axes} == {"Throughput (images/s)"}
    for number, axes in enumerate(figure.axes):
        values = {model: value[number] for model, _, *value in PAPER if value[number] is not None}
        named = labels(axes)
        assert sorted(label.get_text() for label in named) == sorted(values)
        assert {label.get_text() for label in named if label.get_weight() == "bold"} == set(students)
        boxes = [label.get_window_extent() for label in named]
        for one, other in itertools.combinations(boxes, 2):
            assert not one.overlaps(other)
        panel = axes.get_window_extent()
        assert all(panel.x0 <= box.x0 and box.x1 <= panel.x1 for box in boxes)
        assert all(panel.y0 <= box.y0 and box.y1 <= panel.y1 for box in boxes)
        for line in axes.get_lines():
            x, y = axes.transData.transform(line.get_xydata()[0])
            assert not any(box.contains(x, y) for box in boxes)
        for label in named:  # and each belongs to its point
            speed = next(s for model, s, *_ in PAPER if model == label.get_text())
            assert label.xy == (speed, values[label.get_text()])


def test_points_stand_where_their_values_are(tmp_path):
    rows = [Row("a", throughput=20, metrics={"k-NN": 50.0}), Row("b", throughput=30, metrics={"k-NN": 80.0})]
    rows += [Row("c", throughput=40, metrics={"k-NN": 60.0}), Row("slow", metrics={"k-NN": 99.0})]
    path, _ = quality_throughput_figure(Table("t", rows), ["b"], tmp_path / "a.png")
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)[80:]  # below the legend
    student = np.abs(pixels - np.round(np.multiply(to_rgb(STUDENT["color"]), 255))).sum(axis=2) < 30
    teacher = np.abs(pixels - np.round(np.multiply(to_rgb(TEACHER["color"]), 255))).sum(axis=2) < 30
    (b_y, b_x), columns = np.argwhere(student).mean(axis=0), np.argwhere(teacher)
    left, right = columns[columns[:, 1] < b_x], columns[columns[:, 1] > b_x]
    (a_y, a_x), (c_y, c_x) = ((part.min(axis=0) + part.max(axis=0)) / 2 for part in (left, right))
    assert b_x == pytest.approx((a_x + c_x) / 2, abs=1.5)  # 30 between 20 and 40
    assert (a_y - c_y) / (a_y - b_y) == pytest.approx((60 - 50) / (80 - 50), abs=0.03)
    assert student[round(b_y), round(b_x)] and (pixels[round(a_y), round(a_x)] > 250).all()  # filled, and open


def test_a_metric_where_less_is_better_points_upwards_too_and_a_wide_range_is_logarithmic(figures, tmp_path):
    speeds = (1, 10, 100)
    rows = [Row(f"m{s}", throughput=s, metrics={"loss": 1.0 / s, "k-NN": 50.0 + s}) for s in speeds]
    table = Table("t", rows, lower_is_better=["loss"], units={"loss": ""})
    quality_throughput_figure(table, [], tmp_path / "a.png")
    loss, knn = figures[0].axes
    assert loss.get_ylabel() == "loss (lower is better)" and knn.get_ylabel() == "k-NN (%)"
    for axes in (loss, knn):
        places = [axes.transData.transform(line.get_xydata()[0]) for line in axes.get_lines()]
        assert places[0][1] < places[1][1] < places[2][1]  # the fastest is the best in both
        assert places[1][0] - places[0][0] == pytest.approx(places[2][0] - places[1][0])


def test_small_differences_look_small(figures, tmp_path):
    """54.1 and 54.7 % are 6 % of the axis apart, and 200 and 240 images/s are 200 and 240 parts from its left end."""
    rows = [
        Row("a", throughput=200, metrics={"k-NN": 54.1, "high": 99.9, "RMSE": 0.50}),
        Row("b", throughput=240, metrics={"k-NN": 54.7, "high": 99.8, "RMSE": 0.51}),
    ]
    quality_throughput_figure(Table("t", rows, units={"RMSE": "m"}), ["a"], tmp_path / "a.png")
    knn, high, rmse = figures[0].axes
    assert knn.get_ylim() == pytest.approx((49.4, 59.4)) and knn.get_xlim()[0] == 0
    assert high.get_ylim() == pytest.approx((90, 100))  # nothing is above 100 percent
    low, top = rmse.get_ylim()
    assert rmse.get_ylabel() == "RMSE (m)" and top - low == pytest.approx(0.51 / 4) and low < 0.5 < 0.51 < top


def test_a_metric_stands_over_the_throughput_at_its_own_resolution_or_nowhere(figures, tmp_path):
    rows = [
        Row("a", throughput=200, metrics={"k-NN": 50.0, "masks": 60.0}, speeds={"masks": 30.0}),
        Row("b", throughput=100, metrics={"k-NN": 40.0, "masks": 70.0}, speeds={"masks": 25.0}),
        Row("c", throughput=150, metrics={"k-NN": 45.0, "masks": 65.0}, speeds={"masks": None}),
    ]
    quality_throughput_figure(Table("t", rows), [], tmp_path / "a.png")
    knn, masks = figures[0].axes
    assert [line.get_xdata()[0] for line in knn.get_lines()] == [200, 100, 150]
    assert [line.get_xdata()[0] for line in masks.get_lines()] == [30, 25]


def test_without_two_models_to_compare_there_is_no_file_and_unknown_students_are_named(tmp_path):
    table = Table("t", [Row("a", throughput=3.0, metrics={"k-NN": 4.0}), Row("b", metrics={"k-NN": 5.0})])
    assert quality_throughput_figure(table, [], tmp_path / "a.png") == []
    with pytest.raises(ValueError, match="no c; it has .'a', 'b'."):
        quality_throughput_figure(table, ["c"], tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


# Machado, Oliveira and Fernandes (2009), severity 1, for linear RGB
BLINDNESS = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("kind", BLINDNESS)
def test_students_and_teachers_stay_apart_for_the_colour_blind(kind):
    from skimage.color import deltaE_ciede2000, rgb2lab

    def seen(colour):
        rgb = np.array(to_rgb(colour))
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        linear = np.clip(np.array(BLINDNESS[kind]) @ linear, 0, 1)
        return rgb2lab(np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055))

    assert deltaE_ciede2000(seen(STUDENT["color"]), seen(TEACHER["color"])) > 25
    assert STUDENT["marker"] != TEACHER["marker"] and TEACHER["markerfacecolor"] == "white"

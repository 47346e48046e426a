"""Scenes: what is written about a picture agrees with the picture, and the splits are strangers to each other."""

import hashlib
import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import ndimage

from transformers_radio.quickstart import scenes
from transformers_radio.quickstart.scenes import (
    CLASS_NAMES,
    MATERIALS,
    PHOTOGRAPHS,
    SHAPES,
    SIDE,
    SPLITS,
    draw_scene,
    load_photograph,
    main_class_of,
)


@pytest.fixture(scope="module")
def drawn():
    return {split: [draw_scene(split, 7, index) for index in range(60)] for split in SPLITS}


def _fingerprint(scene):
    parts = [scene.image.tobytes(), scene.instances.tobytes(), scene.semantic.tobytes(), scene.caption.encode()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_boxes_areas_and_classes_agree_with_the_instance_map(drawn):
    for scene in [*drawn["train"], *drawn["validation"]]:
        found = ndimage.find_objects(scene.instances)  # scipy's own slices for each label
        assert len(found) == len(scene.objects) and all(found)
        for number, ((rows, columns), one) in enumerate(zip(found, scene.objects, strict=True), start=1):
            assert one.box == (columns.start, rows.start, columns.stop, rows.stop)
            assert one.area == int((scene.instances == number).sum()) > 0
            value = 1 + SHAPES.index(one.shape) * 8 + MATERIALS.index(one.material)
            assert set(np.unique(scene.semantic[scene.instances == number])) == {value}
        assert (scene.semantic[scene.instances == 0] == 0).all()


def test_the_main_object_is_first_largest_whole_and_names_the_class(drawn):
    counts = set()
    for scene in [*drawn["train"], *drawn["validation"]]:
        main, *others = scene.objects
        assert CLASS_NAMES[scene.main_class] == f"{main.material} {main.shape}"
        assert all(one.area < main.area for one in others)
        assert min(main.box) > 0 and max(main.box) < SIDE
        counts.add(len(scene.objects))
    assert counts == {1, 2, 3, 4}


def test_captions_name_the_main_object_first_and_nothing_that_is_not_there(drawn):
    endings = 0
    for scene in [*drawn["train"], *drawn["validation"]]:
        names = [f"{one.material} {one.shape}" for one in scene.objects]
        said = sorted((scene.caption.find(f"a {name}"), name) for name in CLASS_NAMES if f"a {name}" in scene.caption)
        assert said[0][1] == names[0]
        assert {name for _, name in said} in ({names[0]}, set(names))
        endings += len(said) > 1
    assert endings > 20  # many captions speak of the others too


def test_every_run_of_96_scenes_holds_each_class_once():
    for split in SPLITS:
        orders = [[main_class_of(split, 0, block * 96 + i) for i in range(96)] for block in range(3)]
        assert all(sorted(order) == list(range(96)) for order in orders)
        assert orders[0] != orders[1] != orders[2]


def test_scenes_depend_on_split_seed_and_index_alone(drawn):
    assert _fingerprint(draw_scene("train", 7, 31)) == _fingerprint(drawn["train"][31])
    others = [draw_scene("train", 8, 31), draw_scene("train", 7, 32), draw_scene("validation", 7, 31)]
    assert len({_fingerprint(scene) for scene in [drawn["train"][31], *others]}) == 4


def test_another_process_draws_the_same_scene(drawn):
    code = (
        "import hashlib; from transformers_radio.quickstart.scenes import draw_scene; s = draw_scene('train', 7, 5);"
        "print(hashlib.sha256(s.image.tobytes() + s.instances.tobytes() + s.semantic.tobytes()"
        " + s.caption.encode()).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == _fingerprint(drawn["train"][5])


def test_the_splits_share_no_photograph_by_name_or_by_content():
    assert not set(PHOTOGRAPHS["train"]) & set(PHOTOGRAPHS["validation"])
    pixels = {name: load_photograph(name) for names in PHOTOGRAPHS.values() for name in names}
    assert len({hashlib.sha256(p.tobytes()).hexdigest() for p in pixels.values()}) == len(pixels)
    # The stereo partner of a photograph is nearly the same photograph: it belongs to no split.
    assert not any("motorcycle_right" in name for name in pixels)


@pytest.mark.parametrize("split", SPLITS)
def test_a_scene_is_made_of_its_own_splits_photographs(split, monkeypatch):
    """Backgrounds and patterns alike: with all photographs of a split black, no background or pattern has any tint."""
    opened = []

    def black(name):
        opened.append(name)
        return np.zeros((300, 300, 3), np.uint8)

    caches = (scenes._photographs, scenes._tiles)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr(scenes, "load_photograph", black)
    try:
        drawn = [draw_scene(split, 0, i) for i in range(12)]
    finally:
        for cache in caches:
            cache.cache_clear()
    assert sorted(opened) == sorted(PHOTOGRAPHS[split])
    for scene in drawn:
        background = scene.image[ndimage.binary_erosion(scene.instances == 0, iterations=3)].astype(int)
        assert np.ptp(background, axis=1).max() == 0


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", math.pi * 0.92**2),
        ("square", (2 * 0.78) ** 2),
        ("triangle", 0.5 * 1.96 * 1.74),
        ("ring", math.pi * (0.97**2 - 0.5**2)),
        ("cross", 2 * 0.64 * 1.94 - 0.64**2),
        ("hourglass", (1.6 + 0.32) * 0.95),
    ],
)
def test_shapes_cover_their_area(shape, area):
    placed = scenes._Placed(shape, "red", np.array([64.0, 64.0]), 40.0, 0.3)
    assert placed.coverage().sum() == pytest.approx(area * 40**2, rel=0.02)


def test_edges_are_smooth(drawn):
    coverage = scenes._Placed("circle", "red", np.array([64.0, 64.0]), 40.0, 0.0).coverage()
    assert ((coverage > 0.1) & (coverage < 0.9)).sum() > 100


def test_a_missing_photograph_is_named_with_the_cure():
    with pytest.raises(FileNotFoundError, match=r"skimage/data/unicorn.png.*transformers_radio\[quickstart\]"):
        load_photograph("skimage/data/unicorn.png")


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="split is 'test'.*train.*validation"):
        draw_scene("test", 0, 0)

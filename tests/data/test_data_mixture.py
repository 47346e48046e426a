"""Several data sets mixed by weight: shares, order, counting, and exact resume by other numbers of processes."""

import json
from collections import Counter, defaultdict

import pytest
import torch
from omegaconf import OmegaConf
from scipy.stats import chisquare

from helpers.sample_images import encode, picture, write_tar
from transformers_radio.data import Batch, DataConfig, ImageStream, SourceConfig, merge_states

LANES = 4
STEPS = 32


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, str]:
    """name -> path: 40 images in 3 tars, two of them broken, and a folder of 12."""
    root = tmp_path_factory.mktemp("sets")
    for part in range(3):
        samples = {f"{n:03}": {"jpg": encode(picture(n, 24, 24))} for n in range(part * 14, part * 14 + 14)}
        if part < 2:
            samples[f"{part * 14 + 5:03}"]["jpg"] = b"broken"
        write_tar(root / "web" / f"{part:03}.tar", samples)
    (root / "photos").mkdir()
    for n in range(12):
        (root / "photos" / f"{n:03}.jpg").write_bytes(encode(picture(100 + n, 24, 24)))
    return {"web": str(root / "web"), "photos": str(root / "photos")}


def stream_of(
    sets, num_workers=0, rank=0, world_size=1, weights=(3, 1), batch_size=4, seed=7, **fields
) -> ImageStream:
    sources = {name: SourceConfig(path, weight=w) for (name, path), w in zip(sets.items(), weights, strict=True)}
    fields = {"lanes": LANES, "shuffle_window": 4, "max_skipped_share": 0.5, **fields}
    config = DataConfig(sources=sources, num_workers=num_workers, **fields)
    return ImageStream(config, [16], batch_size, seed=seed, rank=rank, world_size=world_size)


def take(stream: ImageStream, count: int) -> list[Batch]:
    batches = iter(stream)
    taken = [next(batches) for _ in range(count)]
    stream.close()
    return taken


def assert_same(found: list[Batch], expected: list[Batch], counters: bool = True) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys == theirs.keys and ours.epochs == theirs.epochs
        assert torch.equal(ours.images[16], theirs.images[16])
        if counters:
            assert ours.seen == theirs.seen and ours.skipped == theirs.skipped


@pytest.fixture(scope="module")
def uninterrupted(sets) -> list[Batch]:
    batches = take(stream_of(sets), STEPS)
    assert batches[-1].skipped.keys() == {"web/undecodable"}
    return batches


def test_every_image_of_every_set_once_an_epoch_and_batches_always_full(sets):
    batches = take(stream_of(sets), 80)
    assert all(len(batch.keys) == 4 and batch.images[16].shape == (4, 3, 16, 16) for batch in batches)
    counts = Counter((key, epoch) for b in batches for key, epoch in zip(b.keys, b.epochs, strict=True))
    assert max(counts.values()) == 1
    epoch_of: dict[tuple[str, int], int] = defaultdict(int)
    for key, epoch in counts:
        epoch_of[key.split("/")[0], epoch] += 1
    assert epoch_of["web", 0] == epoch_of["web", 1] == 40  # 320 images: 3 in 4 of them are 6 epochs of 40
    assert epoch_of["photos", 0] == epoch_of["photos", 1] == 12
    assert {key.split("/")[1] for key, _ in counts if key.startswith("web/")} == {"000.tar", "001.tar", "002.tar"}


def test_shares_are_those_of_the_weights_and_independent_of_each_other(sets):
    """The draws alone: 95 % and 5 %, as the usual mixture of two sets, over 200 000 images."""
    from transformers_radio.data.lanes import LaneBatches, Plan

    stream = stream_of(sets, weights=(19, 1))
    plan = Plan(stream.sources, stream.shares, stream.config, [16], 100, 7, LANES)
    drawn = LaneBatches(plan, {}, first=0, step=1)
    found = [Counter(drawn.mixture(batch))["photos"] for batch in range(2000)]
    assert chisquare([sum(found), 200_000 - sum(found)], [10_000, 190_000]).pvalue > 0.001
    variance = torch.tensor(found, dtype=torch.float64).var().item()
    assert 0.85 < variance / (100 * 0.05 * 0.95) < 1.15  # binomial
    assert drawn.mixture(3) == drawn.mixture(3) != drawn.mixture(4)


def test_real_batches_follow_the_draws(sets):
    batches = take(stream_of(sets, batch_size=16), 40)
    share = sum(key.startswith("photos/") for batch in batches for key in batch.keys) / 640
    assert abs(share - 0.25) < 3 * (0.25 * 0.75 / 640) ** 0.5


def test_neither_the_order_of_the_recipe_nor_the_scale_of_the_weights_matters(sets, uninterrupted):
    turned = dict(reversed(sets.items()))
    assert_same(take(stream_of(turned, weights=(0.25, 0.75)), 8), uninterrupted[:8])


def test_a_set_keeps_its_order_whatever_it_is_mixed_with(sets, uninterrupted):
    """The images that lane 0 takes from a set come in the same order when others stand beside it more often."""

    def of_lane_0(batches, name):
        return [key for batch in batches[::LANES] for key in batch.keys if key.startswith(name)]

    others = take(stream_of(sets, weights=(1, 2)), STEPS)
    for name in sets:
        ours, theirs = of_lane_0(uninterrupted, name), of_lane_0(others, name)
        shorter = min(len(ours), len(theirs))
        assert shorter >= 4 and ours[:shorter] == theirs[:shorter]


def test_two_views_of_one_set_do_not_move_in_step(sets):
    batches = take(stream_of({"a": sets["photos"], "b": sets["photos"]}, weights=(1, 1), lanes=1, batch_size=24), 4)
    keys = [key for batch in batches for key in batch.keys]
    first = {name: [key[2:] for key in keys if key.startswith(name)][:12] for name in "ab"}
    assert sorted(first["a"]) == sorted(first["b"]) and first["a"] != first["b"]


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 2), (2, 1), (4, 0)])
def test_ranks_and_workers_change_nothing(sets, uninterrupted, world_size, num_workers):
    ranks = [stream_of(sets, num_workers, rank, world_size) for rank in range(world_size)]
    sequences = [take(stream, 16 // world_size) for stream in ranks]
    assert_same([b for step in zip(*sequences, strict=True) for b in step], uninterrupted[:16], counters=False)


def test_resume_at_every_step(sets, uninterrupted):
    for stopped_at in range(0, STEPS - 4, 3):
        workers, other_workers = [(0, 0), (2, 0), (0, 0), (0, 2)][stopped_at // 3 % 4]
        first = stream_of(sets, workers)
        before = take(first, stopped_at)
        state = json.loads(json.dumps(first.state_dict()))
        resumed = stream_of(sets, other_workers)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        assert_same(before + take(resumed, 4), uninterrupted[: stopped_at + 4])


def test_resume_by_other_numbers_of_ranks(sets, uninterrupted):
    """2 ranks, then 4, then 1, with the number of steps no multiple of the lanes."""
    found, state = [], None
    for world_size, num_workers, steps in [(2, 1, 3), (4, 0, 2), (1, 2, 5), (2, 2, 2)]:
        streams = [stream_of(sets, num_workers, rank, world_size) for rank in range(world_size)]
        if state is not None:
            for stream in streams:
                stream.load_state_dict(state)
        sequences = [take(stream, steps) for stream in streams]
        found += [batch for step in zip(*sequences, strict=True) for batch in step]
        state = json.loads(json.dumps(merge_states([stream.state_dict() for stream in streams])))
    assert len(found) == 23
    assert_same(found, uninterrupted[:23], counters=False)
    stream = stream_of(sets)
    stream.load_state_dict(state)
    assert_same(take(stream, 3), uninterrupted[23:26])


def test_a_changed_mixture_is_refused(sets):
    state = stream_of(sets).state_dict()
    assert state["lanes"].keys() == {f"{name}/{lane}" for name in sets for lane in range(LANES)}
    with pytest.raises(ValueError, match=r"photos\.weight: 1 when saved, 2 now"):
        stream_of(sets, weights=(3, 2)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"photos\.files: '\w+' when saved, None now"):
        stream_of({"web": sets["web"]}, weights=(3,)).load_state_dict(state)
    single = DataConfig(sets["web"], num_workers=0, lanes=LANES, shuffle_window=4)
    with pytest.raises(ValueError, match="shards: None when saved, 3 now"):
        ImageStream(single, [16], 4, seed=7).load_state_dict(state)
    half = stream_of(sets, rank=1, world_size=2).state_dict()
    with pytest.raises(ValueError, match=r"this rank reads photos/0, .*merge_states"):
        stream_of(sets).load_state_dict(half)


def test_a_small_set_that_is_broken_stops_the_run(sets, tmp_path):
    """A quarter of its own images, but few of all."""
    for n in range(12):
        (tmp_path / f"{n}.jpg").write_bytes(encode(picture(n)) if n % 4 else b"broken")
    stream = stream_of({"web": sets["web"], "small": str(tmp_path)}, weights=(9, 1), max_skipped_share=0.1)
    with pytest.raises(RuntimeError, match=rf"of \d+ images of {tmp_path} .*small/undecodable.*small/\d+\.jpg"):
        take(stream, 200)
    assert sum(stream.skipped.values()) < 0.1 * stream.seen  # all together are not too many


def test_check_looks_at_every_set(sets, tmp_path):
    stream_of(sets).check()
    for n in range(3):
        (tmp_path / f"{n}.jpg").write_bytes(encode(picture(n)))
    with pytest.raises(ValueError, match=r"data\.sources\.few\.path=.* holds 3 images.*share of 0\.25.*needs 8"):
        stream_of({"web": sets["web"], "few": str(tmp_path)}, batch_size=32).check()
    (tmp_path / "0.jpg").write_bytes(b"broken")
    for n in (1, 2):
        (tmp_path / f"{n}.jpg").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"data\.sources\.few\.path=.*none of the first 3 images.*few/0\.jpg"):
        stream_of({"web": sets["web"], "few": str(tmp_path)}).check()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"data\.path=None and data\.sources=\[\]: expected one of the two"),
        ({"path": "x", "sources": {"a": SourceConfig("y")}}, r"data\.path='x' and data\.sources=\['a'\]"),
        ({"sources": {"a": SourceConfig("y", weight=0)}}, r"data\.sources\.a\.weight=0: expected a number > 0"),
        ({"sources": {"a": SourceConfig("y", weight=float("nan"))}}, r"data\.sources\.a\.weight=nan"),
        ({"sources": {"a": SourceConfig("y"), "b": SourceConfig("y", weight=-1)}}, r"data\.sources\.b\.weight=-1"),
        ({"sources": {"a": SourceConfig()}}, r"data\.sources\.a\.path="),
        ({"sources": {"a/b": SourceConfig("y")}}, r"'a/b' is not a name"),
        ({"split": "val", "sources": {"a": SourceConfig("y")}}, r"data\.split='val'.*set data\.sources\.a\.split"),
        ({"path": "x", "retry_seconds": -1}, r"data\.retry_seconds=-1"),
    ],
)
def test_settings_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields).validate()


def test_sources_can_be_written_and_overridden_in_a_recipe(sets):
    written = OmegaConf.create({"sources": {"web": {"path": sets["web"], "weight": 0.95}}, "num_workers": 0})
    overrides = [f"sources.photos.path={sets['photos']}", "sources.photos.weight=0.05", "sources.web.weight=0.9"]
    merged = OmegaConf.merge(OmegaConf.structured(DataConfig), written, OmegaConf.from_dotlist(overrides))
    config = OmegaConf.to_object(merged)
    assert config == DataConfig(
        num_workers=0,
        sources={"web": SourceConfig(sets["web"], weight=0.9), "photos": SourceConfig(sets["photos"], weight=0.05)},
    )
    stream = ImageStream(config, [16], 4, seed=0)
    assert stream.shares == pytest.approx({"web": 0.9 / 0.95, "photos": 0.05 / 0.95})

import pytest

from transformers_radio.training.groups import assign_ranks, passes_in_step, stage_groups
from transformers_radio.training.recipe import GroupRecipe, StageRecipe

# The paper's second stage (section 4): 64 GPUs, half of them at 32 images and 432 pixels, half at 2 and 1024.
PAPER = {
    "low": GroupRecipe(["clip", "dinov2"], resolution=432, batch_size=1024),
    "high": GroupRecipe(["clip", "dinov2", "sam"], resolution=1024, batch_size=64),
}


def groups_of(groups, rank, world_size, **fields):
    return stage_groups(
        "high", StageRecipe(steps=1, groups=groups, **fields), ["clip", "dinov2", "sam"], rank, world_size
    )


@pytest.mark.parametrize(
    ("shares", "world_size", "expected"),
    [
        ({"a": 1, "b": 1}, 64, {"a": tuple(range(32)), "b": tuple(range(32, 64))}),
        ({"a": 3, "b": 1}, 8, {"a": (0, 1, 2, 3, 4, 5), "b": (6, 7)}),
        ({"a": 3, "b": 1}, 2, {"a": (0,), "b": (1,)}),  # as many as groups
        ({"a": 100, "b": 1}, 4, {"a": (0, 1, 2), "b": (3,)}),  # nobody is left out
        ({"a": 1, "b": 2, "c": 1}, 1, {"a": (0,), "b": (0,), "c": (0,)}),  # one serves all in turn
        ({"a": 1, "b": 2, "c": 1}, 2, {"a": (1,), "b": (0,), "c": (1,)}),
        ({"a": 1, "b": 1, "c": 1}, 4, {"a": (0, 1), "b": (2,), "c": (3,)}),
    ],
)
def test_processes_are_dealt_out_by_share(shares, world_size, expected):
    assert assign_ranks(shares, world_size) == expected


@pytest.mark.parametrize("world_size", range(1, 20))
def test_every_process_has_a_group_and_every_group_a_process(world_size):
    served = assign_ranks({"a": 0.2, "b": 5, "c": 1, "d": 1}, world_size)
    assert all(served.values())
    assert {rank for ranks in served.values() for rank in ranks} == set(range(world_size))


def test_the_papers_layout():
    low, high = groups_of(PAPER, rank=40, world_size=64)
    assert (low.micro_batch_size, low.passes, low.index) == (32, 1, None)
    assert (high.micro_batch_size, high.passes, high.index) == (2, 1, 8)
    # 32 x 32 + 32 x 2: the paper's "effective 1,152" is 64 more than its layout gives.
    assert low.batch_size + high.batch_size == 1088
    assert passes_in_step([low, high], rank=40, step=0) == 1


@pytest.mark.parametrize("world_size", [1, 2, 8])
@pytest.mark.parametrize(("weighting", "share"), [("per_image", 1.0), ("per_rank", 3.0)])
def test_an_images_weight_is_the_recipes_whatever_the_world_size(world_size, weighting, share):
    groups = {**PAPER, "low": GroupRecipe(["clip"], resolution=432, batch_size=1536, micro_batch_size=8, share=share)}
    groups["high"] = GroupRecipe(["sam"], resolution=1024, batch_size=64, micro_batch_size=1)
    low, high = groups_of(groups, 0, world_size, weighting=weighting)
    assert low.image_weight * 1536 + high.image_weight * 64 == pytest.approx(1)
    if weighting == "per_image":
        assert low.image_weight == high.image_weight
    else:  # the mean of the ranks' means, with three ranks of four in the first group
        assert low.image_weight * 1536 == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("rate", "turns"), [(1.0, "111111111111"), (0.5, "101010101010"), (1 / 3, "100100100100"), (0.75, "111011101110")]
)
def test_a_group_takes_part_at_its_rate(rate, turns):
    group = groups_of({"a": GroupRecipe(resolution=16, batch_size=4, rate=rate)}, 0, 1)[0]
    assert "".join(str(int(group.takes_part(step))) for step in range(12)) == turns
    assert sum(group.takes_part(step) for step in range(9000)) == pytest.approx(9000 * rate, abs=1)


def test_a_batch_that_does_not_split_names_the_group_and_a_multiple():
    groups = {**PAPER, "high": GroupRecipe(["sam"], resolution=1024, batch_size=10)}
    with pytest.raises(ValueError, match=r"stages.high.groups.high.batch_size 10 .* make it a multiple of 8"):
        groups_of(groups, 0, world_size=8)

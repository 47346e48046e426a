"""forward_intermediates against the hidden states of the same model, and against timm's own method."""

import pytest
import torch

from helpers.conv_student import ConvStudent, ConvStudentConfig
from helpers.tiny_radio import build, scramble
from transformers_radio import ERadioConfig, ERadioModel, RadioTimmConfig, RadioTimmModel

CONVNEXT = ("convnext_tiny", {"dims": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}, {})
VIT = ("vit_tiny_patch16_224", {"embed_dim": 24, "depth": 4, "num_heads": 2}, {"image_size": 64})


def vision_transformer(**fields):
    return build(num_hidden_layers=4, final_norm=True, window_num_global=2, **fields)


def eradio(**fields):
    torch.manual_seed(0)
    config = ERadioConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[2, 4], stem_channels=6, **fields)
    return scramble(ERadioModel(config)).eval()


def timm_student(name, model_args, fields, **more):
    torch.manual_seed(0)
    return scramble(RadioTimmModel(RadioTimmConfig(timm_model=name, model_args=model_args, **fields, **more))).eval()


def as_map(tokens, height, width, stride=16):
    """`(B, h*w, D)` -> `(B, D, h, w)`, by loops."""
    rows, cols = height // stride, width // stride
    found = torch.empty(tokens.shape[0], tokens.shape[2], rows, cols)
    for row in range(rows):
        for col in range(cols):
            found[:, :, row, col] = tokens[:, row * cols + col]
    return found


def assert_all_equal(found, expected):
    assert len(found) == len(expected) > 0
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("indices", "blocks"), [(None, [0, 1, 2, 3]), (2, [2, 3]), ([-1, 0], [0, 3]), ((2,), [2]), ([1, -3], [1])]
)
@pytest.mark.parametrize("window_size", [None, 2])
@torch.no_grad()
def test_the_maps_are_the_hidden_states(indices, blocks, window_size):
    model, images = vision_transformer(window_size=window_size), torch.rand(2, 3, 32, 96)
    whole = model(images, output_hidden_states=True)
    states = [whole.hidden_states[block + 1] for block in blocks]  # the first is the embeddings
    last, maps = model.forward_intermediates(images, indices)
    assert torch.equal(last, whole.last_hidden_state)
    assert_all_equal(maps, [as_map(state[:, 5:], 32, 96) for state in states])
    tokens = model.forward_intermediates(images, indices, output_fmt="NLC", intermediates_only=True)
    assert_all_equal(tokens, [state[:, 5:] for state in states])
    normed = model.forward_intermediates(images, indices, norm=True, return_prefix_tokens=True, output_fmt="NLC")[1]
    assert_all_equal([maps for maps, _ in normed], [model.norm(state)[:, 5:] for state in states])
    assert_all_equal([prefix for _, prefix in normed], [model.norm(state)[:, :5] for state in states])


@torch.no_grad()
def test_dense_maps_are_means_of_the_blocks_since_the_previous_index():
    model, images = vision_transformer(), torch.rand(2, 3, 32, 48)
    every = model.forward_intermediates(images, return_prefix_tokens=True, norm=True, intermediates_only=True)
    for indices, groups in (
        ([1, 2], [[0, 1], [2]]),
        ([3], [[0, 1, 2, 3]]),
        (None, [[0], [1], [2], [3]]),
        (1, [[0, 1, 2, 3]]),
    ):
        for stop in (True, False):
            options = {"return_prefix_tokens": True, "norm": True, "aggregation": "dense", "stop_early": stop}
            last, found = model.forward_intermediates(images, indices, **options)
            for pair, group in zip(found, groups, strict=True):
                for position in (0, 1):  # map and prefix
                    mean = torch.stack([every[block][position] for block in group]).mean(0)
                    torch.testing.assert_close(pair[position], mean)


@pytest.mark.parametrize(
    ("make", "blocks"),
    [
        (vision_transformer, lambda model: model.encoder.layer),
        (eradio, lambda model: model.stages),
        (lambda: timm_student(*CONVNEXT), lambda model: model.network.stages),
        (lambda: timm_student(*VIT), lambda model: model.network.blocks),
    ],
)
@torch.no_grad()
def test_an_early_stop_computes_fewer_blocks(make, blocks):
    model, images, ran = make(), torch.rand(2, 3, 64, 64), []
    for index, block in enumerate(blocks(model)):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    whole = model.forward_intermediates(images, [0, 1])[1]
    assert ran == [0, 1, 2, 3]
    ran.clear()
    last, early = model.forward_intermediates(images, [0, 1], stop_early=True)
    assert ran == [0, 1]
    assert_all_equal(early, whole)
    assert last.shape[0] == 2 and last.shape[2] == early[-1].shape[1]
    if isinstance(model, ERadioModel):
        assert torch.equal(last, early[-1].flatten(2).mT)


@torch.no_grad()
def test_the_last_tokens_of_an_early_stop_are_those_of_a_shorter_model():
    model, images = vision_transformer(), torch.rand(2, 3, 32, 48)
    short = build(num_hidden_layers=2, final_norm=True)
    missing = short.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert not missing
    last = model.forward_intermediates(images, [1], stop_early=True)[0]
    assert torch.equal(last, short(images).last_hidden_state)


@pytest.mark.parametrize("neck", ["pixel_shuffle", None])
@torch.no_grad()
def test_e_radio_returns_its_stages(neck):
    model, images = eradio(neck=neck), torch.rand(2, 3, 64, 96)
    whole = model(images, output_hidden_states=True)
    last, maps = model.forward_intermediates(images)
    assert torch.equal(last, whole.last_hidden_state)
    assert_all_equal(maps, whole.hidden_states[1:])  # without the stem
    assert [found.shape[-2:] for found in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    normed = model.forward_intermediates(images, norm=True, output_fmt="NLC", return_prefix_tokens=True)[1]
    assert_all_equal(normed[:3], [found.flatten(2).mT for found in maps[:3]])
    assert torch.equal(normed[3], (maps[3] if neck else model.norm(maps[3])).flatten(2).mT)
    with pytest.raises(
        ValueError, match="'dense' averages maps, but those of ERadioModel differ in size .8x16x24, 16x8x12"
    ):
        model.forward_intermediates(images, aggregation="dense")


@pytest.mark.parametrize("network", [CONVNEXT, VIT])
@pytest.mark.parametrize("stride", [None, 16])
@torch.no_grad()
def test_a_timm_student_returns_what_timm_returns(network, stride):
    if network is VIT and stride:
        stride = None  # it has no other
    model, images = timm_student(*network, feature_stride=stride), torch.rand(2, 3, 64, 64)
    pixels = (images - model.input_conditioner.norm_mean) / model.input_conditioner.norm_std
    for options in ({"indices": 2}, {"indices": [0, -2], "norm": True}, {"indices": [1], "stop_early": True}):
        last, maps = model.forward_intermediates(images, **options)
        theirs, expected = model.network.forward_intermediates(pixels, **options)
        assert_all_equal(maps, expected)
        if not options.get("stop_early"):
            assert torch.equal(last, model(images).last_hidden_state)
        elif network is CONVNEXT:
            assert torch.equal(last, theirs.flatten(2).mT)
    if network is VIT:
        options = {"indices": [1, 3], "return_prefix_tokens": True, "output_fmt": "NLC", "intermediates_only": True}
        for mine, theirs in zip(
            model.forward_intermediates(images, **options),
            model.network.forward_intermediates(pixels, **options),
            strict=True,
        ):
            assert_all_equal(mine, theirs)


def test_gradients_reach_the_blocks_that_a_map_depends_on():
    model = vision_transformer()
    model.forward_intermediates(torch.rand(1, 3, 32, 32), [1], intermediates_only=True)[0].sum().backward()
    reached = [block.mlp.fc1.weight.grad is not None for block in model.encoder.layer]
    assert reached == [True, True, False, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"indices": [4]}, r"indices is \[4\].* blocks from -4 to 3"),
        ({"indices": 0}, "indices is 0, .*1 to 4"),
        ({"indices": []}, r"indices is \[\]"),
        ({"indices": [True]}, r"indices is \[True\]"),
        ({"output_fmt": "NHWC"}, "output_fmt is 'NHWC', expected 'NCHW' or 'NLC'"),
        ({"aggregation": "mean"}, "aggregation is 'mean', expected 'sparse' or 'dense'"),
    ],
)
def test_what_it_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        vision_transformer().forward_intermediates(torch.rand(1, 3, 32, 32), **options)
    with pytest.raises(ValueError, match="multiples of 16"):
        vision_transformer().forward_intermediates(torch.rand(1, 3, 30, 32))


def test_a_student_without_blocks_says_so():
    adaptors = {"clip": {"summary_dim": 8, "feature_dim": 12, "hidden_dim": 16, "summary_token": 0}}
    with pytest.raises(ValueError, match="ConvStudent has no intermediate maps"):
        ConvStudent(ConvStudentConfig(adaptors=adaptors)).forward_intermediates(torch.rand(1, 3, 32, 32))

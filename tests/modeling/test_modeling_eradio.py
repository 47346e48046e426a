"""E-RADIO against plain functions and loops that are written here, and against the published parameter counts."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter

from transformers_radio.modeling import ERadioConfig, ERadioModel
from transformers_radio.modeling.convolution_eradio import ERadioConv
from transformers_radio.modeling.modeling_eradio import ERadioC2f, ERadioConvNorm, ERadioNeck, ERadioWindowBlock

ADAPTORS = {
    "clip": {"summary_dim": 8, "feature_dim": 12, "hidden_dim": 16},
    "sam": {"summary_dim": None, "feature_dim": 6, "hidden_dim": 16, "upsample_factor": 2},
}


def build(seed=0, **fields):
    """A tiny network in float64, every weight and statistic random and large enough to matter."""
    torch.manual_seed(seed)
    defaults = {"embed_dim": 8, "depths": [1, 2, 1, 2], "num_heads": [2, 4], "stem_channels": 6, "adaptors": ADAPTORS}
    model = ERadioModel(ERadioConfig(**{**defaults, **fields}))
    return randomize(model).double().eval()


@torch.no_grad()
def randomize(module):
    for name, parameter in module.named_parameters():
        parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.5))
        if name.endswith("norm.weight") or ".norm" in name and name.endswith("weight"):
            parameter.uniform_(0.5, 1.5)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return module


def conv_norm(module: ERadioConvNorm, maps, stride=1):
    """Convolution and batch norm of evaluation by their formulas."""
    weight = module.conv.weight
    maps = F.conv2d(maps, weight, stride=stride, padding=weight.shape[-1] // 2)
    norm = module.norm
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return (maps - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]


def silu(maps):
    return maps / (1 + torch.exp(-maps))


def c2f(block: ERadioC2f, maps):
    hidden = silu(conv_norm(block.conv1, maps))
    half = hidden.shape[1] // 2
    kept = [hidden[:, :half], hidden[:, half:]]
    for bottleneck in block.bottlenecks:
        kept.append(kept[-1] + silu(conv_norm(bottleneck.conv2, silu(conv_norm(bottleneck.conv1, kept[-1])))))
    return silu(conv_norm(block.conv2, torch.cat(kept, 1)))


def position_bias(module, heads, size):
    """(heads, size^2, size^2) by loops over queries and keys."""
    bias = module.fc1.weight.new_zeros(heads, size**2, size**2)
    for query in range(size**2):
        for key in range(size**2):
            offset = []
            for difference in (query // size - key // size, query % size - key % size):
                scaled = 8 * difference / (size - 1) if size > 1 else 0.0
                offset.append(math.copysign(math.log2(1 + abs(scaled)) / math.log2(8), scaled))
            hidden = torch.relu(
                module.fc1.weight @ torch.tensor(offset, dtype=module.fc1.weight.dtype) + module.fc1.bias
            )
            bias[:, query, key] = 16 / (1 + torch.exp(-(module.fc2.weight @ hidden)))
    return bias


def attention(module, tokens):
    """One window's tokens (L, C), head by head."""
    heads, width = module.num_heads, tokens.shape[1]
    each = width // heads
    query, key, value = (tokens @ module.qkv.weight.T).split(width, dim=1)
    bias = position_bias(module.position_bias, heads, math.isqrt(len(tokens)))
    outputs = []
    for head in range(heads):
        part = slice(head * each, (head + 1) * each)
        logits = query[:, part] @ key[:, part].T / math.sqrt(each) + bias[head]
        outputs.append(torch.softmax(logits, dim=1) @ value[:, part])
    return torch.cat(outputs, 1) @ module.proj.weight.T


def layer_norm(norm, tokens):
    mean, variance = tokens.mean(1, keepdim=True), tokens.var(1, keepdim=True, unbiased=False)
    return (tokens - mean) / torch.sqrt(variance + 1e-5) * norm.weight + norm.bias


def window_block(block: ERadioWindowBlock, maps, window):
    shortcut = maps
    if block.reduce is not None:
        maps = F.conv2d(maps, block.reduce.weight, block.reduce.bias, stride=2)
    elif block.pre_conv is not None:
        maps = maps + conv_norm(block.pre_conv, maps)
    maps = maps.clone()
    for image in maps:
        for row in range(0, image.shape[1], window):
            for col in range(0, image.shape[2], window):
                place = image[:, row : row + window, col : col + window]
                tokens = torch.stack([place[:, r, c] for r in range(window) for c in range(window)])  # (w*w, C)
                tokens = tokens + attention(block.attention, layer_norm(block.norm1, tokens))
                hidden = layer_norm(block.norm2, tokens) @ block.mlp.fc1.weight.T
                hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
                tokens = tokens + hidden @ block.mlp.fc2.weight.T
                place.copy_(tokens.T.reshape(-1, window, window))  # (w*w, C) -> (C, w, w)
    if block.expand is not None:
        maps = F.conv_transpose2d(maps, block.expand.weight, block.expand.bias, stride=2)
    return maps / 2 + shortcut / 2


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def images(*size):
    return torch.rand(*size, dtype=torch.float64)


def run_conv(conv, maps):
    """The result, and the gradients of weights and input."""
    maps = maps.detach().requires_grad_()
    result = conv(maps)
    weights = [conv.weight, *([] if conv.bias is None else [conv.bias])]
    return result, *torch.autograd.grad((result.sin() * torch.arange(result.shape[-1])).sum(), [maps, *weights])


@pytest.mark.parametrize(("kernel", "stride", "bias"), [(3, 1, False), (3, 2, False), (2, 2, True), (1, 1, True)])
def test_a_convolution_of_few_places_is_a_product_with_equal_numbers(kernel, stride, bias, monkeypatch):
    torch.manual_seed(0)
    conv = ERadioConv(6, 10, kernel, stride, kernel // 2 if kernel == 3 else 0, bias=bias).double()
    conv = conv.to(memory_format=torch.channels_last)
    few, many = torch.randn(2, 6, 8, 6, dtype=torch.float64), torch.randn(3, 6, 32, 32, dtype=torch.float64)
    plain = nn.Conv2d(6, 10, kernel, stride, conv.padding, bias=bias).double()
    plain.load_state_dict(conv.state_dict())
    expected = run_conv(plain, few)
    with monkeypatch.context() as patch:
        patch.delattr(nn.Conv2d, "forward")
        for maps in (few, few.to(memory_format=torch.channels_last)):
            for mine, theirs in zip(run_conv(conv, maps), expected, strict=True):
                torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(conv(many), plain(many))


@torch.no_grad()
def test_a_c2f_block_is_its_formula():
    block = randomize(ERadioC2f(12, 3)).eval()
    maps = torch.randn(2, 12, 9, 7)
    close(block(maps), c2f(block, maps))


@torch.no_grad()
@pytest.mark.parametrize(("subsample", "pre_convolution"), [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_window_block_is_its_loops(subsample, pre_convolution, window):
    config = ERadioConfig(pre_convolution=pre_convolution)
    block = randomize(ERadioWindowBlock(12, 3, config, subsample)).eval()
    maps = torch.randn(2, 12, 2 * window * 2, 2 * window * 3)
    close(block(maps, window), window_block(block, maps, window))


@torch.no_grad()
def test_necks_are_their_formulas():
    def norm(module, maps):
        scale = module.weight / torch.sqrt(module.running_var + module.eps)
        return (maps - module.running_mean[:, None, None]) * scale[:, None, None] + module.bias[:, None, None]

    def places(conv, maps):
        """A 1x1 convolution as a product: (B, C, h, w) -> (B, out, h, w)."""
        return torch.einsum("oc,bchw->bohw", conv.weight[:, :, 0, 0], maps) + conv.bias[:, None, None]

    fine, coarse = torch.randn(2, 32, 4, 6), torch.randn(2, 64, 2, 3)
    shuffle = randomize(ERadioNeck(ERadioConfig(embed_dim=8, num_heads=[2, 4]))).eval()
    wide = places(shuffle.convs[1], norm(shuffle.norms[1], coarse))
    expected = places(shuffle.convs[0], norm(shuffle.norms[0], fine))
    for channel in range(64):  # channel k of the four behind each other goes to place (k // 2, k % 2)
        for part in range(4):
            expected[:, channel, part // 2 :: 2, part % 2 :: 2] += wide[:, 4 * channel + part]
    close(shuffle(fine, coarse), expected)

    depthwise = randomize(ERadioNeck(ERadioConfig(embed_dim=8, num_heads=[2, 4], neck="depthwise"))).eval()
    expected = 0
    for index, maps in enumerate((fine, coarse.repeat_interleave(2, 2).repeat_interleave(2, 3))):
        conv = depthwise.depthwise[index]
        padded = F.pad(maps, (1, 1, 1, 1))
        summed = conv.bias[:, None, None] + sum(
            padded[:, :, r : r + maps.shape[2], c : c + maps.shape[3]] * conv.weight[:, 0, r, c][:, None, None]
            for r in range(3)
            for c in range(3)
        )
        expected = expected + places(depthwise.convs[index], norm(depthwise.norms[index], summed))
    close(depthwise(fine, coarse), expected)


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"pre_convolution": True, "neck": "depthwise"}, {"neck": None}])
@pytest.mark.parametrize("size", [(64, 96), (224, 160)])
def test_the_whole_network_is_its_parts(fields, size):
    model = build(**fields)
    pixels = images(2, 3, *size)
    out = model(pixels, output_hidden_states=True)
    window = model.window_for(*size)

    mean, std = (torch.tensor(values)[:, None, None] for values in (model.config.norm_mean, model.config.norm_std))
    maps = ((pixels.float() - mean) / std).double()  # float32, whatever the model's
    maps = torch.relu(conv_norm(model.stem.conv1, maps, stride=2))
    maps = torch.relu(conv_norm(model.stem.conv2, maps, stride=2))
    stages = []
    for index, (stage, downsample) in enumerate(zip(model.stages, [*model.downsamples, None], strict=True)):
        if index < 2:
            maps = c2f(stage[0], maps)
        else:
            rows, cols = maps.shape[-2:]
            step = 2 * window if index == 2 else window
            target = [math.ceil(side / step) * step for side in (rows, cols)]
            source = [(torch.arange(new) * old / new).long() for new, old in zip(target, (rows, cols), strict=True)]
            maps = maps[:, :, source[0]][:, :, :, source[1]]
            for block in stage:
                maps = window_block(block, maps, window)
            back = [(torch.arange(old) * new / old).long() for new, old in zip(target, (rows, cols), strict=True)]
            maps = maps[:, :, back[0]][:, :, :, back[1]]
        stages.append(maps)
        if downsample is not None:
            maps = conv_norm(downsample, maps, stride=2)
    maps = model.norm(stages[3]) if model.neck is None else model.neck(*stages[2:])
    stride = 32 if model.neck is None else 16
    assert out.grid == (size[0] // stride, size[1] // stride) == maps.shape[-2:]
    features = torch.stack([maps[:, :, r, c] for r in range(out.grid[0]) for c in range(out.grid[1])], 1)
    torch.testing.assert_close(out.features, features, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(out.summary, features.mean(1), rtol=1e-3, atol=1e-3)
    for mine, theirs in zip(out.hidden_states[1:], stages, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    assert out.adaptors["clip"].summary.shape == (2, 8)
    assert out.adaptors["sam"].grid == (2 * out.grid[0], 2 * out.grid[1])
    assert out.adaptors["sam"].features.shape == (2, 4 * out.grid[0] * out.grid[1], 6)


@pytest.mark.parametrize(
    ("size", "without_head", "with_head"),
    [("b", 117.41, 118.43), ("b-no-upsample", 112.68, 113.70), ("l", 263.93, 265.46), ("released", 389.60, 391.14)],
)
def test_parameters_are_as_many_as_published(size, without_head, with_head):
    """Millions, of the paper's Table 6 with a head of 1000 classes, and of the released network (Table 1)."""
    with torch.device("meta"):
        model = ERadioModel(ERadioConfig.from_size(size))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e6 == pytest.approx(without_head, rel=1e-3)
    assert (count + 1000 * model.summary_dim + 1000) / 1e6 == pytest.approx(with_head, rel=1e-3)


@pytest.mark.parametrize(("size", "millions", "width"), [("phone", 5.27, 320), ("cpu", 15.29, 384)])
def test_our_own_sizes_are_as_large_as_the_documentation_says(size, millions, width):
    with torch.device("meta"):
        model = ERadioModel(ERadioConfig.from_size(size))
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)
    assert model.summary_dim == model.feature_dim == width


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"pre_convolution": True, "neck": "depthwise"}, {"neck": None}])
def test_fused_and_channels_last_it_is_the_same_network(fields):
    model = build(**fields)
    pixels = images(2, 3, 96, 64)
    expected = model(pixels)
    copied = copy.deepcopy(model).to(memory_format=torch.channels_last)
    close(copied(pixels).features, expected.features)
    fused = copy.deepcopy(model).fuse()
    left = [name for name, module in fused.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert left == (["norm"] if fields.get("neck", "") is None else [])
    close(fused(pixels).features, expected.features)
    close(fused.fuse()(pixels).adaptors["clip"].summary, expected.adaptors["clip"].summary)
    with pytest.raises(ValueError, match="training mode"):
        model.train().fuse()
    with pytest.raises(ValueError, match="save it before"):
        fused.save_pretrained("nowhere")


def test_windows_follow_the_resolution():
    model = build()
    # the resolutions of the paper and the released code, then sides without a divisor, and the shorter side
    for side, window in ((224, 7), (256, 8), (384, 12), (512, 16), (1024, 16), (768, 12), (32, 1), (160, 5)):
        assert model.window_for(side, side) == window
    assert [model.window_for(32 * n, 32 * n) for n in (17, 19, 34)] == [9, 10, 12]
    assert model.window_for(512, 384) == model.window_for(384, 512) == 12
    # a small map is one window, square or not
    assert model.window_for(96, 128) == model.window_for(128, 96) == 4 and model.window_for(32, 224) == 7
    assert model.window_for(32, 256) == 1
    assert build(window_size=16).window_for(224, 224) == 16


@torch.no_grad()
def test_a_stored_window_and_one_by_resolution_differ_but_where_they_agree():
    automatic, stored = build(), build(window_size=4)
    stored.load_state_dict(automatic.state_dict())
    for side, same in ((128, True), (96, False)):
        pixels = images(1, 3, side, side)
        assert torch.equal(automatic(pixels).features, stored(pixels).features) == same


def test_images_that_do_not_fit_are_refused_with_the_nearest_size():
    model = build()
    with pytest.raises(ValueError, match="240x100 pixels, but sides must be multiples of 32; resize to 256x96"):
        model(torch.rand(1, 3, 240, 100))
    assert model.get_nearest_supported_resolution(240, 100) == (256, 96)
    with pytest.raises(ValueError, match=r"adaptors is \['dino'\], expected a list out of"):
        model(torch.rand(1, 3, 64, 64), adaptors=["dino"])


def test_gradients_are_those_of_finite_differences():
    model = build(embed_dim=4, num_heads=[1, 2], depths=[1, 1, 1, 1])
    model.input_conditioner = nn.Identity()
    pixels = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    names = ["stem.conv1.conv.weight", "stages.2.0.reduce.bias", "stages.3.0.attention.position_bias.fc1.weight"]

    def summary(*weights):
        out = torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (pixels,), {"adaptors": []})
        return out.summary

    weights = [model.get_parameter(name).detach().clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(summary, weights, fast_mode=True)


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = build().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()  # a second forward would count the batch twice
        out = model(torch.full((2, 3, 64, 64), 0.4, dtype=torch.float64).cumsum(2) / 64)
        (out.summary.sum() + out.adaptors["sam"].features.square().sum()).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None for name, gradient in gradients[0].items() if "clip" not in name)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6)


def test_the_position_bias_is_computed_once_and_follows_the_weights():
    model, like = build(), torch.empty(0, dtype=torch.float64)
    bias = model.stages[3][0].attention.position_bias
    with torch.no_grad():
        first = bias(2, like)
        assert bias(2, like) is first and bias(3, like) is not first
        bias.fc2.weight.mul_(2)
        assert not torch.equal(bias(2, like), first)
    assert bias(2, like).requires_grad  # with gradients it is computed anew
    assert model.train().stages[3][0].attention.position_bias(2, like).requires_grad


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_quantized_or_offloaded_it_is_the_same_network():
    accelerate = pytest.importorskip("accelerate")
    model = build().float()
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    expected = model(images).features
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not any(isinstance(part, nn.Linear) for part in quantized.stages[3][0].attention.position_bias.children())
    assert torch.cosine_similarity(quantized(images).features.flatten(), expected.flatten(), dim=0) > 0.95
    offloaded = accelerate.cpu_offload(model, execution_device="cpu")
    assert offloaded.stages[3][0].attention.position_bias.fc1.weight.is_meta
    assert torch.equal(offloaded(images).features, expected)


@torch.no_grad()
def test_compiled_it_is_the_same_network_without_graph_breaks():
    model = build()
    pixels = images(2, 3, 64, 96)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(compiled(pixels).features, model(pixels).features)


@torch.no_grad()
@pytest.mark.parametrize("window_size", [None, 2])
def test_compiled_for_all_sizes_it_has_a_program_for_each(window_size):
    """One for all would be one of formulas, which torch simplifies without an end."""
    torch._dynamo.reset()
    model = build(window_size=window_size, adaptors={})
    counter = CompileCounter()
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend=counter)
    for size in ((2, 3, 256, 256), (3, 3, 512, 256), (2, 3, 288, 320), (4, 3, 288, 320)):
        pixels = images(*size)
        close(compiled(pixels).features, model(pixels).features)
    assert counter.frame_count == 3


@torch.no_grad()
def test_exported_with_free_sides_it_is_the_same_network():
    """The window cannot follow a side that is a symbol, so the configuration has to state it.

    torch.export takes a side of one window for another program than one of several, so it starts at two.
    """
    model = build(window_size=2, adaptors={})
    height, width = (32 * torch.export.Dim(name, min=3, max=8) for name in ("rows", "columns"))
    shapes = {"pixel_values": {0: torch.export.Dim("batch", max=8), 2: height, 3: width}}
    exported = torch.export.export(model, (images(2, 3, 128, 192),), dynamic_shapes=shapes).module()
    for size in ((2, 3, 128, 192), (3, 3, 192, 96), (1, 3, 96, 224)):
        pixels = images(*size)
        close(exported(pixels).features, model(pixels).features)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"embed_dim": 9}, "embed_dim is 9, expected an even number"),
        ({"depths": [1, 2, 3]}, r"depths is \[1, 2, 3\], expected four numbers"),
        ({"num_heads": [3, 4]}, r"num_heads is \[3, 4\], expected two divisors"),
        ({"neck": "deconvolution"}, "neck is 'deconvolution', expected one of pixel_shuffle, depthwise, or None"),
        ({"preferred_resolution": 100}, "preferred_resolution is 100, expected a multiple of 32"),
        ({"window_size": 0}, "window_size is 0, expected an integer from 1 to 256, or None"),
        ({"window_size": 65536}, "window_size is 65536, expected an integer from 1 to 256"),
        ({"mlp_ratio": 0.001}, "mlp_ratio is 0.001, expected at least 1 / "),
        ({"adaptors": {"clip": {"summary_dim": 8}}}, "missing keys"),
    ],
)
def test_a_configuration_that_makes_no_network_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ERadioConfig(**{"embed_dim": 8, "num_heads": [2, 4], **fields})


def test_sizes_are_chosen_by_name():
    assert ERadioConfig.from_size("l", neck=None).channels == [192, 384, 768, 1536]
    with pytest.raises(
        ValueError, match="there is no size 'xl'; choose one of xt, t, s, b, b-no-upsample, l, released, phone, cpu"
    ):
        ERadioConfig.from_size("xl")
    with pytest.raises(ValueError, match="has no field embed_dims"):
        ERadioConfig.from_size("b", embed_dims=3)
    with pytest.raises(ValueError, match="no CLS tokens"):
        ERadioConfig.for_training("b", {}, "cls")


def test_another_neck_than_the_saved_one_is_named(tmp_path):
    ERadioConfig(neck="depthwise").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the other fields .neck, .* pass no field to from_pretrained that decides"):
        ERadioConfig.from_pretrained(tmp_path, neck=None)

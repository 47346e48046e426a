"""The attention that is computed chunk by chunk, against torch's own in float64, and when it is chosen."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from transformers_radio import RadioConfig, RadioModel
from transformers_radio.modeling import attention_radio as attention

MODULE = torch.nn.Identity()
HEADS, WIDTH = 3, 4


def heads(batch, length, dtype=torch.float64):
    """(B, heads, L, D/heads), with the strides that a projection leaves."""
    return torch.randn(batch, length, HEADS, WIDTH, dtype=dtype).transpose(1, 2).requires_grad_()


@pytest.mark.parametrize("most", [1, 24, 100, 144, 300, 2**21], ids="{} weights at a time".format)
def test_chunks_compute_what_torch_does(monkeypatch, most):
    """From one weight of one head at a time to all; 12 queries do not divide into chunks of 2 and 8 in the middle."""
    monkeypatch.setattr(attention, "_MOST_WEIGHTS", most)
    inputs = [heads(2, 12) for _ in range(3)]
    found, weights = attention.chunked_attention_forward(MODULE, *inputs, scaling=0.3)
    expected = scaled_dot_product_attention(*inputs, scale=0.3).transpose(1, 2)
    assert weights is None and found.is_contiguous()
    torch.testing.assert_close(found, expected)
    gradient = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(found, inputs, gradient), torch.autograd.grad(expected, inputs, gradient), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_no_more_weights_at_a_time_than_said(monkeypatch):
    monkeypatch.setattr(attention, "_MOST_WEIGHTS", 100)
    sizes, softmax = [], torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda self, dim: sizes.append(self.numel()) or softmax(self, dim))
    for length in (3, 12, 70):
        sizes.clear()
        attention.chunked_attention_forward(MODULE, *(heads(2, length) for _ in range(3)))
        assert max(sizes) <= 100 and sum(sizes) == 2 * HEADS * length**2


def test_an_offset_of_all_scores_loses_no_accuracy():
    """As biases of query and key with a common direction give; the softmax takes it out again."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 200, 64).bfloat16()
    errors = []
    for offset in (0, 5):
        inputs = [query + offset, key + offset, value]  # products that are 64 * 25 / 8 larger
        expected = scaled_dot_product_attention(*(tensor.double() for tensor in inputs)).transpose(1, 2)
        found, _ = attention.chunked_attention_forward(MODULE, *inputs, scaling=0.125)
        errors.append((found.double() - expected).norm() / expected.norm())
    assert errors[0] < 0.01 and errors[1] < 0.03


def test_dropout_keeps_its_share():
    ones = torch.ones(1, 1, 200, 1)
    found, _ = attention.chunked_attention_forward(MODULE, ones, ones, ones, dropout=0.25)
    # means of 200 weights that are 0 or 4/3
    assert abs(found.mean() - 1) < 0.02 and abs(found.std() - (0.25 / 0.75 / 200) ** 0.5) < 0.01


@pytest.fixture
def chosen(monkeypatch):
    """Lengths for which the chunks are chosen, on a processor that gains from them."""
    lengths, forward = [], attention.chunked_attention_forward

    def watched(module, query, *inputs, **options):
        lengths.append(query.shape[2])
        return forward(module, query, *inputs, **options)

    monkeypatch.setattr("transformers_radio.modeling.modeling_radio.chunked_attention_forward", watched)
    monkeypatch.setattr(attention, "_fused_kernel_is_slow", lambda: True)
    monkeypatch.setattr(attention, "_FEWEST_QUERIES", 120)  # not thousands, which take a second
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    return lengths


def student(**fields):
    torch.manual_seed(0)
    size = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 1, "max_img_size": 640}
    return RadioModel(RadioConfig(**size, patch_size=16, num_cls_tokens=1, num_registers=1, **fields)).eval()


@pytest.mark.parametrize(
    ("change", "side", "taken"),
    [
        (lambda model: model.bfloat16().fuse(), 128, True),
        (lambda model: model.fuse(), 128, False),  # float32
        (lambda model: model.half().fuse(), 128, False),
        (lambda model: model.bfloat16().fuse(), 112, False),  # 51 tokens in two heads are less than 120
        (lambda model: model.bfloat16().train(), 112, True),
        (lambda model: model.bfloat16().train(), 96, False),  # 38 tokens
        (lambda model: model.bfloat16().fuse(), 544, True),  # 1158 tokens, without gradients
        (lambda model: model.bfloat16().train(), 128, True),
        (lambda model: model.bfloat16().train(), 544, False),
        (lambda model: model.bfloat16(), 128, False),  # has the bits of transformers' RADIO
    ],
)
def test_chosen_by_dtype_length_and_mode(chosen, change, side, taken):
    model = change(student())
    with torch.no_grad():
        model(torch.rand(1, 3, side, side, dtype=model.dtype))
    assert chosen == ([(side // 16) ** 2 + 2] if taken else [])


@pytest.mark.parametrize("change", [RadioModel.train, RadioModel.fuse])
def test_with_gradients_long_images_keep_torch_s_kernel(chosen, change):
    model = change(student().bfloat16())
    for side, lengths in ((544, []), (128, [66])):
        model(torch.rand(1, 3, side, side, dtype=torch.bfloat16)).features.float().sum().backward()
        assert chosen == lengths


def test_transformers_can_set_the_implementation():
    """It looks for its interface in the source of the module."""
    model = student()
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_only_sdpa_is_replaced(chosen, implementation):
    model = student(attn_implementation=implementation).bfloat16().fuse()
    images = torch.rand(1, 3, 128, 128, dtype=torch.bfloat16)
    with torch.no_grad():
        assert model(images, output_attentions=True).attentions[0].shape == (1, 2, 66, 66) and not chosen
        model(images)
    assert bool(chosen) == (implementation == "sdpa")


@pytest.mark.parametrize("change", [RadioModel.train, RadioModel.fuse])
def test_compiled_models_stay_one_graph(chosen, change):
    compiled = torch.compile(change(student().bfloat16()), fullgraph=True, backend="eager")
    compiled(torch.rand(1, 3, 128, 128, dtype=torch.bfloat16))
    assert not chosen


def test_exported_for_every_size(chosen):
    side = [16 * torch.export.Dim(name, min=2, max=40) for name in ("rows", "cols")]
    example = torch.rand(1, 3, 256, 256, dtype=torch.bfloat16)
    shapes = {"pixel_values": {2: side[0], 3: side[1]}}
    program = torch.export.export(student().bfloat16().fuse(), (example,), dynamic_shapes=shapes)
    for height, width in ((64, 64), (640, 608)):
        program.module()(torch.rand(1, 3, height, width, dtype=torch.bfloat16))


def test_projections_of_other_dtypes_are_left_to_torch(chosen):
    """As some of PEFT's adapters give under autocast."""
    model = student().train()
    model.encoder.layer[0].attention.k_proj.register_forward_hook(lambda module, args, output: output.float())
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.rand(1, 3, 128, 128))
    assert not chosen


def test_threads_need_more_tokens(chosen, monkeypatch):
    model, images = student().bfloat16().fuse(), torch.rand(1, 3, 128, 128, dtype=torch.bfloat16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with torch.no_grad():
        model(images)
    assert not chosen


def test_exported_graphs_keep_torch_s_operator(chosen):
    program = torch.export.export(student().bfloat16().fuse(), (torch.rand(1, 3, 128, 128, dtype=torch.bfloat16),))
    assert not chosen and "scaled_dot_product_attention" in str(program.graph)


@torch.no_grad()
def test_the_longest_image_of_a_packed_sequence_decides(chosen):
    model = student().bfloat16().fuse()
    images = [torch.rand(3, side, side, dtype=torch.bfloat16) for side in (128, 64)]
    # (C, h*p, w*p) -> (h*w, C*p*p)
    patches = [
        image.unfold(1, 16, 16).unfold(2, 16, 16).permute(1, 2, 0, 3, 4).flatten(0, 1).flatten(1) for image in images
    ]
    packed = model(torch.cat(patches), image_grid_hw=torch.tensor([[8, 8], [4, 4]])).features
    assert chosen == [66, 18]
    alone = torch.cat([model(image[None]).features[0] for image in images])
    torch.testing.assert_close(packed.reshape(alone.shape).float(), alone.float(), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("under_autocast", [False, True])
@torch.no_grad()
def test_no_less_exact_than_bfloat16_is(chosen, monkeypatch, under_autocast):
    """The error of a model in bfloat16, against itself in float32, hardly grows."""
    model = student()
    for weight in model.parameters():
        weight.normal_(std=0.2)
    images = torch.rand(2, 3, 256, 256)
    expected = model.fuse()(images).features

    def error():
        with torch.autocast("cpu", torch.bfloat16, enabled=under_autocast):
            found = model(images if under_autocast else images.bfloat16()).features
        return (found.float() - expected).norm()

    if not under_autocast:
        model.bfloat16()
    with_chunks = error()
    assert chosen == [258]
    monkeypatch.setattr(attention, "_fused_kernel_is_slow", lambda: False)
    assert with_chunks < 1.2 * error() and len(chosen) == 1


@pytest.mark.parametrize(
    ("able", "gains"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, True),
        ({"avx512_bf16": True, "amx_bf16": True}, False),
        ({"avx512_f": True}, False),
        (None, False),
    ],
    ids=["AMD's with AVX-512", "AMX", "no units", "older PyTorch"],
)
def test_processors_that_gain(monkeypatch, able, gains):
    if able is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert attention._fused_kernel_is_slow.__wrapped__() is gains

"""A fused student computes the same with fewer operations, and is for inference alone."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from helpers.small_students import small_student
from transformers_radio import RadioConfig, RadioForImageClassification, RadioModel, RadioTimmConfig, RadioTimmModel
from transformers_radio.evaluation.speed.cost import count_flops, peak_memory
from transformers_radio.modeling import linear_radio

ADAPTORS = {"clip": {"summary_dim": 12, "feature_dim": 12, "hidden_dim": 16, "summary_token": 0}}


def vit(**fields):
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "mlp_ratio": 2.0, "max_img_size": 96}
    config = RadioConfig(**{**shape, "num_cls_tokens": 1, "num_registers": 2, "adaptors": ADAPTORS, **fields})
    return randomize(RadioModel(config))


def timm_student(size, scale=0.1):
    return randomize(RadioTimmModel(RadioTimmConfig.from_size(size, adaptors=ADAPTORS)), scale)


def randomize(model, scale=0.1):
    """Away from zeros and ones, with which much would be equal by chance; statistics stay positive."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            if weight.is_floating_point() and not name.startswith("input_conditioner"):
                weight += scale * torch.rand(weight.shape, generator=generator)
    return model.eval()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "fields", [{}, {"qkv_bias": False}, {"attn_implementation": "eager"}, {"window_size": 2}, {"use_swiglu_ffn": True}]
)
def test_a_fused_vit_gives_the_same(fields):
    model = vit(**fields)
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    fused = copy.deepcopy(model).fuse()
    ours, expected = fused(images), model(images)
    close(ours.features, expected.features)
    close(ours.summary, expected.summary)
    close(ours.adaptors["clip"].features, expected.adaptors["clip"].features)
    weights = [layer.attention.qkv_proj.weight.shape for layer in fused.encoder.layer]
    assert weights == [(96, 32)] * 3  # one product in place of three, and none of the three is kept
    assert not [name for name, _ in fused.named_parameters() if "q_proj" in name or "lambda1" in name]
    close(fused.fuse()(images).features, expected.features)


@torch.no_grad()
def test_a_fused_vit_takes_packed_images():
    model, grids = vit(), torch.tensor([[2, 3], [4, 1]])
    patches = torch.rand(10, 768, generator=torch.Generator().manual_seed(1))
    expected = model(patches, image_grid_hw=grids)
    close(model.fuse()(patches, image_grid_hw=grids).features, expected.features)


@torch.no_grad()
@pytest.mark.parametrize("size", ["fastvit-2m", "repvit-2m", "convnext-2m"])
def test_a_fused_network_of_timm_gives_the_same(size):
    model = timm_student(size)
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    fused = copy.deepcopy(model).fuse()
    assert not any(part.training for part in fused.modules())
    ours, expected = fused(images), model(images)
    scale = expected.features.abs().max()
    close(ours.features / scale, expected.features / scale)
    close(ours.summary / scale, expected.summary / scale)
    norms = [sum(isinstance(part, nn.BatchNorm2d) for part in one.modules()) for one in (fused, model)]
    assert norms[0] < norms[1] or norms == [0, 0]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("size", "scale"), [("fastvit-2m", 0.05), ("repvit-2m", 0.02)])  # no overflow in float16
def test_a_network_of_timm_is_fused_in_its_dtype(size, scale, dtype):
    torch.manual_seed(0)
    model = timm_student(size, scale)
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    expected = model(images).features
    cast = model.to(dtype)
    plain = cast(images.to(dtype)).features
    fused = cast.fuse()
    ours = fused(images.to(dtype)).features
    assert ours.dtype == dtype and {weight.dtype for weight in fused.network.parameters()} == {dtype}
    error, rounding = ((one - expected).abs().max() / expected.abs().max() for one in (ours, plain))
    # fusing rounds each weight once more; FastViT's kernels, added up in half precision, are three times as far off
    assert error < 2 * rounding + 1e-5


@torch.no_grad()
@pytest.mark.parametrize(
    "make", [vit, lambda: vit(use_swiglu_ffn=True), lambda: small_student("eradio"), lambda: timm_student("repvit-2m")]
)
def test_fuse_leaves_models_alone_that_share_the_weights(make):
    model = make()
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    before = model(images)
    part = model.with_adaptors(["clip"])
    shared = [weight.data_ptr() for weight in part.parameters()]
    assert not {*shared} - {weight.data_ptr() for weight in model.parameters()}
    scale = before.features.abs().max()
    close(part.fuse()(images).features / scale, before.features / scale)
    after = model(images)
    assert torch.equal(after.features, before.features) and torch.equal(after.summary, before.summary)


def test_a_student_that_was_fused_in_inference_mode_passes_gradients_to_images():
    model, images = vit(), torch.rand(1, 3, 64, 64, requires_grad=True)
    with torch.inference_mode():
        model.fuse()
    model(images).features.sum().backward()
    assert images.grad.abs().sum() > 0


def test_a_head_above_a_fused_student_stays_in_evaluation_mode():
    config = RadioConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, max_img_size=96, num_labels=3)
    head = RadioForImageClassification(config).eval()
    head.model.fuse()
    with pytest.raises(ValueError, match="load it again to train it"):
        head.train()
    assert not [name for name, part in head.named_modules() if part.training]


def test_adapters_are_merged_before_fusing():
    peft = pytest.importorskip("peft")
    model, images = vit(), torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    targets = r".*encoder\.layer\.\d+\.(attention\.[qkvo]_proj|mlp\.fc[12])"
    lora = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, init_lora_weights=False)).eval()
    with torch.no_grad():
        expected = lora(images).features
        with lora.disable_adapter():
            assert (lora(images).features - expected).abs().max() > 0.1
    names = list(lora.state_dict())
    with pytest.raises(ValueError, match=r"layer.0.attention.q_proj has adapters .* merge_and_unload"):
        lora.base_model.model.fuse()
    assert list(lora.state_dict()) == names
    with torch.no_grad():
        close(lora.merge_and_unload().fuse()(images).features, expected)


def test_parametrized_weights_are_refused():
    model = vit()
    nn.utils.parametrizations.orthogonal(model.encoder.layer[1].mlp.fc1)
    with pytest.raises(ValueError, match=r"layer.1.mlp.fc1 has adapters or parametrizations"):
        model.fuse()
    assert not model.is_fused


@torch.no_grad()
@pytest.mark.parametrize(
    ("make", "name", "dtype"),
    [
        (vit, "embeddings.position_embedding", torch.float32),
        (lambda: small_student("eradio"), "stages.2.0.attention.position_bias.fc2.weight", torch.float32),
        (lambda: packed_model()[1], "encoder.layer.0.mlp.fc1.weight", torch.bfloat16),
    ],
)
def test_after_edits_through_data_eval_computes_anew(make, name, dtype):
    model, images = make(), torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = model(images).features
    model.get_parameter(name).data.mul_(-3)  # as PEFT merges, which raises no version
    changed = model.eval()(images).features
    assert not torch.equal(changed, before)
    assert torch.equal(copy.deepcopy(model)(images).features, changed)  # copies start without what was computed


@pytest.mark.parametrize("make", [vit, lambda: timm_student("repvit-2m")])
def test_a_fused_model_is_for_inference(make, tmp_path):
    model = make()
    with pytest.raises(ValueError, match=r"call model.eval\(\) before"):
        model.train().fuse()
    model.eval().fuse()
    with pytest.raises(ValueError, match="load it again to train it"):
        model.train()
    with pytest.raises(ValueError, match=r"save it before model.fuse\(\)"):
        model.save_pretrained(tmp_path / "fused")
    with pytest.raises(ValueError, match=r"choose its heads before model.fuse\(\)"):
        model.with_adaptors([])
    assert not list(tmp_path.iterdir())


@pytest.fixture(autouse=True)
def pack_small_linears(monkeypatch):
    monkeypatch.setattr(linear_radio, "_LEAST_ELEMENTS", 1)


def packed_model(dtype=torch.bfloat16):
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor gains nothing from packed weights")
    model = vit().to(dtype)
    return model, copy.deepcopy(model).fuse()


def calls(run):
    """What `run` returns, and how many products with packed weights it made."""
    with torch.profiler.profile() as profile:
        result = run()
    return result, sum(event.count for event in profile.key_averages() if "linear_pointwise" in event.key)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float32, 1e-5)])
def test_a_fused_student_packs_its_weights_for_the_cpu(dtype, tolerance):
    model, fused = packed_model(dtype)
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.inference_mode():
        ours, count = calls(lambda: fused(images))
        expected = model.float()(images.float())
    linears = sum(isinstance(part, nn.Linear) for part in fused.modules())
    assert count == linears > 3 * 4  # four in each block, the patches' and the heads'
    for name in ("features", "summary"):
        error = (ours[name].float() - expected[name]).abs().max() / expected[name].abs().max()
        assert error < tolerance  # the weights are rounded in both
    # what a product gives does not depend on the order of the weight in memory
    linear = fused.encoder.layer[0].mlp.fc1
    rows = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(2)).to(dtype)
    with torch.no_grad():
        close(
            linear(rows).float(),
            nn.functional.linear(rows.float(), linear.weight.float(), linear.bias.float()).to(dtype).float(),
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_weights_follow_the_weights(dtype):
    _, fused = packed_model(dtype)
    images = torch.rand(1, 3, 64, 64).to(dtype)
    linear = fused.encoder.layer[0].mlp.fc1
    with torch.no_grad():
        before = fused(images).features
        linear.weight.zero_()
        linear.bias.zero_()
        changed = fused(images).features
        assert not torch.equal(changed, before)
        assert torch.equal(copy.deepcopy(fused).fuse()(images).features, changed)  # a copy after a forward pass
        assert torch.equal(pickle.loads(pickle.dumps(fused))(images).features, changed)
        (_, count), double = calls(lambda: fused.double()(images.double())), fused(images.double()).features
    assert count == 0 and double.dtype == torch.float64


def test_packed_weights_stay_out_of_gradients_exports_functions_and_counts():
    _, fused = packed_model()
    images = torch.rand(1, 3, 64, 64).bfloat16()
    with torch.no_grad():
        expected = fused(images).features
    images.requires_grad_()
    output, count = calls(lambda: fused(images).features)
    output.float().sum().backward()
    assert count == 0 and images.grad.abs().sum() > 0
    images = images.detach()
    with torch.no_grad():
        program = torch.export.export(fused, (images,), strict=False)
        assert "mkldnn" not in str(program.graph)
        mapped = torch.func.vmap(lambda image: fused(image, adaptors=[]).to_tuple()[1])(images[None])[0]
        flops = [count_flops(one, images) for one in (fused, vit().bfloat16())]
    assert flops[0] == flops[1] and peak_memory(fused, images) > 0
    for other in (output, program.module()(images).features, mapped):
        torch.testing.assert_close(other, expected, rtol=0.05, atol=0.05)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_packed_linear_takes_what_an_ordinary_one_takes(dtype):
    _, fused = packed_model(dtype)
    linear = fused.encoder.layer[0].mlp.fc1
    rows = torch.randn(5, 32, generator=torch.Generator().manual_seed(2)).to(dtype)
    linear.bias = nn.Parameter(torch.arange(128.0).to(dtype)[::2])  # every other number in memory
    close(linear(rows).float(), nn.functional.linear(rows, linear.weight, linear.bias).float())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(rows[:, :31])


@pytest.mark.parametrize("trainable", ["weight", "bias"])
def test_a_packed_linear_gives_its_weights_gradients(trainable):
    _, fused = packed_model()
    linear = fused.requires_grad_(False).encoder.layer[0].mlp.fc1
    getattr(linear, trainable).requires_grad_()
    rows = torch.randn(5, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    linear(rows).sum().backward()
    # the gradient of a sum: of the bias 1 per row, of the weight the sum of the rows
    expected = torch.full((64,), 5.0) if trainable == "bias" else rows.float().sum(0).expand(64, -1)
    torch.testing.assert_close(getattr(linear, trainable).grad.float(), expected, rtol=0.02, atol=0.02)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert calls(lambda: linear(rows))[1] == 1


def test_forward_mode_derivatives_pass_through_packed_linears():
    _, fused = packed_model()
    linear = fused.requires_grad_(False).encoder.layer[0].mlp.fc1
    rows = torch.randn(5, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(linear(forward_ad.make_dual(rows, 2 * rows))).tangent
        assert calls(lambda: linear(rows))[1] == 1
    expected = nn.functional.linear(2 * rows.float(), linear.weight.float())  # the product is linear
    torch.testing.assert_close(tangent.float(), expected, rtol=0.02, atol=0.02)


def test_a_cast_makes_ordinary_linears_of_packed_ones_and_fuse_packs_again():
    _, fused = packed_model()
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = fused(images.bfloat16()).features
    fused.double()
    linears = [part for part in fused.modules() if isinstance(part, nn.Linear)]
    assert {type(part) for part in linears} == {nn.Linear}
    with torch.no_grad():
        ours, count = calls(lambda: fused.bfloat16().fuse()(images.bfloat16()).features)
        assert count == len(linears) and torch.equal(ours, expected)
        # between dtypes that are packed, the order follows
        single, count = calls(lambda: fused.float()(images).features)
    assert count == len(linears)
    torch.testing.assert_close(single, expected.float(), rtol=0.05, atol=0.05)


def test_a_packed_model_is_quantized_whole():
    """torch.ao takes layers whose class is nn.Linear, and says nothing of those that it leaves out."""
    model, fused = packed_model(torch.float32)
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    quantized = torch.ao.quantization.quantize_dynamic(fused, {nn.Linear}, dtype=torch.qint8)
    linears = sum(isinstance(part, nn.Linear) for part in fused.modules())
    assert sum("quantized" in type(part).__module__ for part in quantized.modules()) >= linears
    with torch.no_grad():
        torch.testing.assert_close(quantized(images).features, model(images).features, rtol=0.1, atol=0.1)
        assert calls(lambda: fused(images))[1] == linears  # the model itself stays packed
    with pytest.raises(ValueError, match=r"copy.deepcopy\(model\)"):
        torch.ao.quantization.quantize_dynamic(fused, {nn.Linear}, dtype=torch.qint8, inplace=True)


def test_packed_linears_can_be_cast_below_the_hooks_of_accelerate():
    accelerate = pytest.importorskip("accelerate")
    _, fused = packed_model()
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    for part in fused.modules():
        accelerate.hooks.add_hook_to_module(part, accelerate.hooks.ModelHook())
    with torch.no_grad():
        expected = fused(images.bfloat16()).features
        ours = fused.float()(images).features
    torch.testing.assert_close(ours, expected.float(), rtol=0.05, atol=0.05)


def test_with_avx2_alone_float32_is_packed_on_amd(monkeypatch):
    packed_model()  # skips where oneDNN's operators are missing
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "AMD EPYC"}, raising=False)
    model = vit()
    fused = copy.deepcopy(model).fuse()
    assert any(type(part) is linear_radio.RadioPackedLinear for part in fused.modules())
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours, products = calls(lambda: fused(images).features)
        torch.testing.assert_close(ours, model(images).features, rtol=1e-4, atol=1e-5)
    assert products


def test_fuse_leaves_linears_alone_that_gain_nothing(monkeypatch):
    plain = {nn.Linear}
    assert {type(part) for part in vit().double().fuse().modules() if isinstance(part, nn.Linear)} == plain
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
        patch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "Intel Xeon"}, raising=False)
        assert {type(part) for part in vit().fuse().modules() if isinstance(part, nn.Linear)} == plain
        patch.delattr(torch.cpu, "get_capabilities")  # as before PyTorch had it
        assert {type(part) for part in vit().fuse().modules() if isinstance(part, nn.Linear)} == plain
    monkeypatch.setattr(linear_radio, "_LEAST_ELEMENTS", 32 * 64)
    _, fused = packed_model(torch.float32)
    assert type(fused.encoder.layer[0].mlp.fc1) is linear_radio.RadioPackedLinear  # 32 x 64
    assert type(fused.encoder.layer[0].attention.o_proj) is nn.Linear  # 32 x 32

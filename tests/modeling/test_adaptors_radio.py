import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from transformers_radio import RadioConfig, RadioModel

TINY = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_img_size=64, num_cls_tokens=2, num_registers=1
)


def build(cls_fields=None, **adaptor):
    torch.manual_seed(0)
    adaptor = {"summary_dim": 12, "feature_dim": 10, "hidden_dim": 20, **adaptor}
    model = RadioModel(RadioConfig(**{**TINY, **(cls_fields or {})}, adaptors={"t": adaptor})).eval()
    for parameter in model.adaptors.parameters():  # zero biases and unit norms would hide mistakes
        nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def run(model, height=48, width=32):
    return model(torch.rand(2, 3, height, width))


def weights_of(head):
    return {key: value for key, value in head.state_dict().items()}


def test_paper_head_is_linear_norm_gelu_linear():
    model = build()
    out = run(model)
    for head, x, y in (
        ("summary_head", out.last_hidden_state[:, 0], out.adaptors["t"].summary),
        ("feature_head", out.features, out.adaptors["t"].features),
    ):
        w = weights_of(getattr(model.adaptors["t"], head))
        assert set(w) == {f"{name}.{kind}" for name in ("fc1", "final.0", "final.2") for kind in ("weight", "bias")}
        hidden = x @ w["fc1.weight"].T + w["fc1.bias"]
        hidden = (hidden - hidden.mean(-1, keepdim=True)) / (hidden.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        hidden = hidden * w["final.0.weight"] + w["final.0.bias"]
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
        torch.testing.assert_close(y, hidden @ w["final.2.weight"].T + w["final.2.bias"], rtol=1e-4, atol=1e-5)
        assert y.dtype == torch.float32


def test_version_2_adds_residual_blocks():
    model = build(mlp_num_inner=2)
    out = run(model)
    w = weights_of(model.adaptors["t"].summary_head)
    assert {key.rsplit(".", 1)[0] for key in w} >= {"blocks.0.0", "blocks.0.2", "blocks.1.0", "blocks.1.2"}
    x = F.linear(out.last_hidden_state[:, 0], w["fc1.weight"], w["fc1.bias"])

    def norm_gelu_linear(x, prefix):
        x = F.gelu(F.layer_norm(x, x.shape[-1:], w[f"{prefix}.0.weight"], w[f"{prefix}.0.bias"]))
        return F.linear(x, w[f"{prefix}.2.weight"], w[f"{prefix}.2.bias"])

    for index in range(2):
        x = x + norm_gelu_linear(x, f"blocks.{index}")
    torch.testing.assert_close(out.adaptors["t"].summary, norm_gelu_linear(x, "final"))


def test_version_1_is_linear_norm_relu_linear():
    model = build(mlp_version="v1")
    out = run(model)
    w = weights_of(model.adaptors["t"].feature_head)
    assert set(w) == {f"{name}.{kind}" for name in ("fc1", "norm", "fc2") for kind in ("weight", "bias")}
    x = F.linear(out.features, w["fc1.weight"], w["fc1.bias"])
    x = F.layer_norm(x, x.shape[-1:], w["norm.weight"], w["norm.bias"]).clamp(min=0)
    torch.testing.assert_close(out.adaptors["t"].features, F.linear(x, w["fc2.weight"], w["fc2.bias"]))


def test_attention_feature_head_equals_timm_blocks():
    model = build(spatial_mlp_version="attn")
    out = run(model)
    head = model.adaptors["t"].feature_head
    blocks = nn.ModuleList(
        timm.models.vision_transformer.Block(32, num_heads=16, qkv_bias=False, init_values=1e-5) for _ in range(2)
    )
    # the keys are the released ones, ls1.gamma among them
    blocks.load_state_dict(
        {k.removeprefix("blocks."): v for k, v in head.state_dict().items() if k.startswith("blocks.")}
    )
    x = out.features
    with torch.no_grad():
        for block in blocks:
            x = block(x)
        expected = head.mlp(x)
    torch.testing.assert_close(out.adaptors["t"].features, expected, rtol=1e-4, atol=1e-4)
    assert {key.split(".")[0] for key in head.state_dict()} == {"blocks", "mlp"}
    # the summary head stays an MLP
    assert "final.2.weight" in model.adaptors["t"].summary_head.state_dict()


def test_attention_head_needs_16_heads():
    with pytest.raises(ValueError, match="16"):
        RadioModel(
            RadioConfig(
                **{**TINY, "hidden_size": 24},
                adaptors={
                    "t": {"summary_dim": None, "feature_dim": 4, "hidden_dim": 4, "spatial_mlp_version": "attn"}
                },
            )
        )


def test_upsampling_puts_each_token_s_square_where_the_token_was():
    model = build(upsample_factor=2)
    out = run(model, height=48, width=32)
    flat = model.adaptors["t"].feature_head(out.features).detach()  # (2, 3*2, 2*2*10)
    grid = model.features_to_grid(out.adaptors["t"].features, 48, 32)
    assert grid.shape == (2, 10, 6, 4)
    for row in range(6):
        for col in range(4):
            token = flat[:, (row // 2) * 2 + col // 2]
            offset = ((row % 2) * 2 + col % 2) * 10
            assert torch.equal(grid[:, :, row, col], token[:, offset : offset + 10])


def test_summary_head_reads_its_own_token_or_the_average():
    model = build(summary_token=1)
    out = run(model)
    head = model.adaptors["t"].summary_head
    assert torch.equal(out.adaptors["t"].summary, head(out.last_hidden_state[:, 1]))
    model = build({"summary_type": "mean", "num_cls_tokens": 0})
    out = run(model)
    torch.testing.assert_close(out.summary, out.last_hidden_state[:, 1:].mean(1))  # one register in front
    assert torch.equal(out.adaptors["t"].summary, model.adaptors["t"].summary_head(out.summary))


def test_either_head_may_be_absent():
    out = run(build(summary_dim=None))
    assert out.adaptors["t"].summary is None and out.adaptors["t"].features.shape == (2, 6, 10)
    out = run(build(feature_dim=None))
    assert out.adaptors["t"].features is None and out.adaptors["t"].summary.shape == (2, 12)


def test_half_precision_students_answer_in_float32():
    model = build().to(torch.bfloat16)
    out = run(model)
    assert out.summary.dtype == torch.bfloat16
    assert out.adaptors["t"].summary.dtype == out.adaptors["t"].features.dtype == torch.float32


def test_choice_of_adaptors():
    adaptors = {name: {"summary_dim": 4, "feature_dim": 4, "hidden_dim": 4} for name in ("clip", "siglip2-g")}
    model = RadioModel(RadioConfig(**TINY, adaptors=adaptors)).eval()
    images = torch.rand(1, 3, 32, 32)
    everything = model(images)
    assert list(everything.adaptors) == ["clip", "siglip2-g"]
    assert model(images, adaptors=[]).adaptors == {}
    only = model(images, adaptors=["siglip2-g"])
    assert list(only.adaptors) == ["siglip2-g"]
    assert torch.equal(only.adaptors["siglip2-g"].summary, everything.adaptors["siglip2-g"].summary)
    for wrong in (["dino"], "clip"):
        with pytest.raises(ValueError, match="siglip2-g"):
            model(images, adaptors=wrong)


@pytest.mark.parametrize("version", ["v2", "attn"])
def test_packed_features_equal_one_by_one(version):
    model = build(spatial_mlp_version=version, upsample_factor=2)
    images = [torch.rand(1, 3, 32, 48), torch.rand(1, 3, 64, 16)]
    patches = [F.unfold(x, 16, stride=16)[0].T for x in images]
    packed = model(torch.cat(patches), image_grid_hw=torch.tensor([[2, 3], [4, 1]]))
    single = [model(x) for x in images]
    torch.testing.assert_close(
        packed.adaptors["t"].features, torch.cat([out.adaptors["t"].features[0] for out in single])
    )
    torch.testing.assert_close(packed.adaptors["t"].summary, torch.cat([out.adaptors["t"].summary for out in single]))

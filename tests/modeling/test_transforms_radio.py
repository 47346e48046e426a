"""What torch does with whole models: export, tracing, compiling, torch.func and int8, against the model itself."""

import copy
import io
import warnings

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap
from torch.utils._pytree import tree_leaves

from helpers.tiny_radio import build, native
from transformers_radio import (
    RadioBackbone,
    RadioBackboneConfig,
    RadioConfig,
    RadioForImageClassification,
    RadioForSemanticSegmentation,
    RadioModel,
)

ADAPTORS = {
    "clip": {"summary_dim": 8, "feature_dim": 12, "hidden_dim": 16},
    "sam": {"summary_dim": None, "feature_dim": 9, "hidden_dim": 8, "upsample_factor": 2},
}
AUTO = torch.export.Dim.AUTO


def tensors(output):
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def assert_same(found, expected):
    assert len(tensors(found)) == len(tensors(expected)) > 0
    for a, b in zip(tensors(found), tensors(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def tiny(model_class, config_class=RadioConfig, **fields):
    torch.manual_seed(0)
    options = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, max_img_size=128)
    return model_class(config_class(**options, **fields)).eval()


# ---------------------------------------------------------------- export, tracing, compiling


@torch.no_grad()
def assert_exports_to_any_size(model, sizes, strict=False, **options):
    images = torch.rand(2, 3, 64, 96)
    shapes = {"pixel_values": {0: AUTO, 2: AUTO, 3: AUTO}, **dict.fromkeys(options)}
    program = torch.export.export(model, (images,), options, dynamic_shapes=shapes, strict=strict).module()
    for batch, height, width in sizes:
        images = torch.rand(batch, 3, height, width)
        assert_same(program(images, **options), model(images, **options))


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_takes_any_batch_and_aspect(strict):
    assert_exports_to_any_size(tiny(RadioModel, adaptors=ADAPTORS), [(1, 96, 32), (3, 64, 64), (1, 32, 80)], strict)


@pytest.mark.parametrize("prefix", ["bypass", "average"])
def test_an_export_with_windows_takes_any_aspect(prefix):
    model = build(window_prefix=prefix, window_num_global=1, num_hidden_layers=2)
    sizes = [(1, 96, 32), (3, 64, 64), (1, 32, 64)]
    assert_exports_to_any_size(model, sizes, window_size=2, output_hidden_states=True, output_attentions=True)


@pytest.mark.parametrize("name", ["mean", "classifier", "segmenter", "backbone"])
def test_exports_of_the_other_models_take_any_aspect(name):
    model = {
        "mean": lambda: tiny(RadioModel, summary_type="mean", final_norm=True),
        "classifier": lambda: tiny(RadioForImageClassification),
        "segmenter": lambda: tiny(RadioForSemanticSegmentation),
        "backbone": lambda: tiny(RadioBackbone, RadioBackboneConfig, out_indices=[0, 1]),
    }[name]()
    assert_exports_to_any_size(model, [(1, 96, 32), (3, 32, 64)], strict=name == "backbone")


@torch.no_grad()
def test_a_saved_export_gives_the_same():
    model, images = tiny(RadioModel, adaptors=ADAPTORS), torch.rand(2, 3, 64, 48)
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(model, (images,)), buffer)
    buffer.seek(0)
    assert_same(torch.export.load(buffer).module()(images), model(images))


@torch.no_grad()
def test_tracing_looks_at_no_values():
    class Tensors(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = build(adaptors=ADAPTORS)

        def forward(self, images):
            return tuple(tensors(self.model(images)))

    model, images = Tensors().eval(), torch.rand(2, 3, 64, 48)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        program = torch.jit.trace(model, torch.rand(2, 3, 64, 48))
    assert not [w for w in caught if "converting a tensor to a Python number" in str(w.message).lower()]
    assert_same(program(images), model(images))


@torch.no_grad()
def test_one_compiled_program_serves_all_shapes():
    model = tiny(RadioForSemanticSegmentation)
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend="eager")
    for shape in ((2, 3, 64, 48), (1, 3, 32, 80), (3, 3, 128, 16)):
        images = torch.rand(shape)
        assert_same(compiled(images), model(images))


# ---------------------------------------------------------------- torch.func


def sum_of_squares(model, parameters, images, **options):
    outputs = functional_call(model, (parameters,), (images,), options)
    return sum(tensor.square().sum() for tensor in tensors(outputs))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("window_size", [0, 2])
def test_per_sample_gradients_equal_those_of_one_image(attention, window_size):
    model = build(adaptors=ADAPTORS, num_hidden_layers=2, attn_implementation=attention, window_num_global=1)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    images = torch.rand(3, 3, 64, 32)

    def loss(parameters, image):
        return sum_of_squares(model, parameters, image[None], window_size=window_size)

    many = vmap(grad(loss), in_dims=(None, 0))(parameters, images)
    loss(dict(model.named_parameters()), images[1]).backward()
    largest = max(parameter.grad.abs().max().item() for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(many[name][1], parameter.grad, rtol=1e-3, atol=1e-5 * largest, msg=name)


def test_vmap_and_jacobians_equal_the_model():
    model, images = build(), torch.rand(3, 3, 32, 48)
    with torch.no_grad():
        expected = model(images).summary
        assert_same(vmap(lambda image: model(image[None]).summary[0])(images), expected)
    jacobian = jacrev(lambda image: model(image[None]).summary[0, :2])(images[0])
    leaf = images[:1].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf).summary[0, 1], leaf)
    torch.testing.assert_close(jacobian[1], gradient[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_stacked_students_answer_each_with_its_own_positions():
    models, images = [build(), build()], torch.rand(2, 3, 64, 96)
    models[1].embeddings.position_embedding.mul_(3)
    for model in models:
        model(images)  # each has its positions cached
    weights, buffers = stack_module_state(models)
    many = vmap(lambda *state: functional_call(models[0], state, (images,)).features)(weights, buffers)
    for index, model in enumerate(models):
        torch.testing.assert_close(many[index], model(images).features, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_tangents_go_through_the_position_table_and_leave_nothing_behind():
    model, images = build(attn_implementation="eager"), torch.rand(1, 3, 64, 48)
    model(images)  # the table of this size is cached
    table = model.embeddings.position_embedding.detach()
    direction = torch.randn_like(table)

    def summary(table):
        return functional_call(model, {"embeddings.position_embedding": table}, (images,)).summary

    step = 1e-2
    expected = (summary(table + step * direction) - summary(table - step * direction)) / (2 * step)
    _, tangent = jvp(summary, (table,), (direction,))
    torch.testing.assert_close(tangent, expected, rtol=0.1, atol=0.02 * expected.abs().max().item())
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(summary(forward_ad.make_dual(table, direction)))
        torch.testing.assert_close(dual.tangent, tangent)
    fresh = build(attn_implementation="eager")
    jvp(lambda images: fresh(images).summary, (images,), (images,))
    torch.save(copy.deepcopy(fresh), io.BytesIO())  # no stand-in of the transform was kept
    assert torch.equal(fresh(images).summary, model(images).summary)


def test_second_derivatives_equal_native():
    model, images = build(attn_implementation="eager"), torch.rand(1, 3, 32, 48)
    twin, direction = native(model), torch.randn(1, 3, 32, 48)
    products = [
        jvp(grad(lambda images, m=m: m(images).summary.square().sum()), (images,), (direction,))[1]
        for m in (model, twin)
    ]
    assert products[0].abs().sum() > 0
    torch.testing.assert_close(products[0], products[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", [RadioForImageClassification, RadioForSemanticSegmentation])
def test_per_sample_losses_of_the_heads(head):
    model, images = tiny(head, num_labels=3), torch.rand(2, 3, 32, 32)
    labels = torch.tensor([0, 2]) if head is RadioForImageClassification else torch.randint(0, 3, (2, 32, 32))
    losses = vmap(lambda image, label: model(image[None], labels=label[None]).loss)(images, labels)
    for index in range(2):
        expected = model(images[index : index + 1], labels=labels[index : index + 1]).loss
        torch.testing.assert_close(losses[index], expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- int8


@torch.no_grad()
@pytest.mark.parametrize("head", [RadioModel, RadioForImageClassification])
def test_linears_in_int8_give_nearly_the_same(head):
    model = tiny(head, adaptors=ADAPTORS)
    images = torch.rand(2, 3, 64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the successor of this function
        small = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    assert not isinstance(dict(small.named_modules())[next(iter(_linears(model)))], torch.nn.Linear)
    for found, expected in zip(tensors(small(images)), tensors(model(images)), strict=True):
        assert torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.95


def _linears(model):
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]

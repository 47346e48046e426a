"""Students in transformers' detectors and segmenters and torchvision's Mask R-CNN: weights, shapes, and learning."""

import pytest
import torch
import transformers

from helpers.tiny_students import one_size_student, tiny_student
from transformers_radio import RadioConfig, RadioModel
from transformers_radio.integrations import build_with_backbone, mask_rcnn

SMALL = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 8, "decoder_layers": 2, "num_denoising": 4}
WIDE = {"encoder_hidden_dim": 32, "d_model": 32, "decoder_in_channels": [32] * 3, "num_labels": 3}


def detector_config(kind):
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    if kind == "rt_detr":
        return transformers.RTDetrForObjectDetection, transformers.RTDetrConfig(**SMALL, **WIDE, **heads)
    if kind == "d_fine":
        config = transformers.DFineConfig(**SMALL, **WIDE, **heads)
        return transformers.DFineForObjectDetection, config
    if kind == "mask2former":
        small = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 32}
        layers = {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "dim_feedforward": 32}
        config = transformers.Mask2FormerConfig(**small, **layers, num_queries=6, num_labels=3)
        return transformers.Mask2FormerForUniversalSegmentation, config
    config = transformers.UperNetConfig(hidden_size=16, num_labels=3, auxiliary_channels=8)
    return transformers.UperNetForSemanticSegmentation, config


def student_inside(model):
    from transformers_radio.modeling.student_radio import RadioStudentMixin

    (found,) = [module for module in model.modules() if isinstance(module, RadioStudentMixin)]
    return found


@pytest.mark.parametrize("student_kind", ["radio", "eradio"])
@pytest.mark.parametrize("kind", ["rt_detr", "d_fine", "mask2former", "upernet"])
def test_a_model_is_built_with_the_students_weights_and_reopens(tmp_path, kind, student_kind):
    model_class, config = detector_config(kind)
    student = tiny_student(student_kind)
    model = build_with_backbone(model_class, config, student).eval()
    own = student.state_dict()
    for name, weight in student_inside(model).state_dict().items():
        assert torch.equal(weight, own[name]), name
    pixels = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        output = model(pixels)
    logits = output.class_queries_logits if kind == "mask2former" else output.logits
    assert logits.isfinite().all()
    model.save_pretrained(tmp_path)
    again, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        output = again.eval()(pixels)
    found = output.class_queries_logits if kind == "mask2former" else output.logits
    torch.testing.assert_close(found, logits)


def test_a_detector_trains_through_the_pyramid_into_the_student(tmp_path):
    model_class, config = detector_config("rt_detr")
    tiny_student("radio").save_pretrained(tmp_path)
    model = build_with_backbone(model_class, config, str(tmp_path), window_size=2).train()
    assert student_inside(model).config.window_size == 2
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.3]])}]
    model(torch.rand(1, 3, 64, 64), labels=labels).loss.backward()
    assert student_inside(model).embeddings.patch_projection.weight.grad.any()
    untouched = [name for name, one in model.named_parameters() if one.grad is None and "backbone" in name]
    assert untouched == []


@pytest.mark.parametrize("student_kind", ["radio", "eradio"])
def test_images_with_too_few_places_for_the_queries_are_refused(student_kind):
    model_class, config = detector_config("rt_detr")
    config.num_queries = 30
    model = build_with_backbone(model_class, config, tiny_student(student_kind)).eval()
    # 4 x 4 + 2 x 2 + 1 places, and 8 x 8 + 4 x 4 + 2 x 2
    with pytest.raises(
        ValueError, match="32x32 pixels, whose maps have 21 places, but num_queries is 30: .* 64x64 .*=21"
    ):
        model(torch.rand(1, 3, 32, 32))
    with pytest.raises(ValueError, match="have 21 places"):
        model(pixel_values=torch.rand(1, 3, 32, 32))
    with torch.no_grad():
        assert model(torch.rand(1, 3, 32, 64)).logits.shape[1] == 30  # 42 places


def test_windows_of_an_eradio_are_those_asked_for():
    model_class, config = detector_config("rt_detr")
    student, images = tiny_student("eradio").eval(), torch.rand(1, 3, 128, 128)
    maps = {}
    for window_size in (None, 2, 0):
        inside = student_inside(build_with_backbone(model_class, config, student, window_size=window_size).eval())
        maps[window_size] = inside(images).features
    assert student.config.window_size is None
    assert torch.equal(maps[0], maps[None]) and (maps[2] - maps[0]).norm() > 0.1 * maps[0].norm()
    student.config.window_size = 2
    inside = student_inside(build_with_backbone(model_class, config, student).eval())
    assert torch.equal(inside(images).features, maps[2])


def test_windows_asked_for_hold_in_training_too():
    """A student that was trained with random windows would go on drawing them."""
    config = RadioConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, max_img_size=128, train_window_sizes=[2]
    )
    student = RadioModel(config).eval()
    model_class, config = detector_config("rt_detr")
    for window_size in (4, 0):
        built = build_with_backbone(model_class, config, student, window_size=window_size)
        rcnn = mask_rcnn(student, 3, image_size=256, window_size=window_size, out_channels=16)
        for inside in (student_inside(built.train()), rcnn.train().backbone.student):
            drawn = [inside._windows(None, 256, 256) for _ in range(8)]
            assert [windows.size if windows else 0 for windows in drawn] == [window_size] * 8
    assert student.config.train_window_sizes == [2]


@pytest.mark.parametrize("kind", ["radio", "eradio"])
def test_a_frozen_student_stays_as_it_is_while_mask_rcnn_trains(kind):
    model = mask_rcnn(tiny_student(kind), 3, image_size=64, out_channels=16)
    images = torch.rand(2, 3, 64, 64)
    model.backbone.student.requires_grad_(False)
    expected = model.eval().backbone.student(images).features
    assert torch.equal(model.train().backbone.student(images).features, expected)
    assert model.backbone.training and torch.equal(model.eval().backbone.student(images).features, expected)


def test_what_has_no_backbone_is_named():
    model_class, config = detector_config("rt_detr")
    with pytest.raises(ValueError, match="type radio_timm, which has no backbone class for transformers"):
        build_with_backbone(model_class, config, tiny_student("radio_timm"))
    with pytest.raises(ValueError, match="E-RADIO has no map at 64"):
        build_with_backbone(model_class, config, tiny_student("eradio"), strides=[16, 32, 64])
    with pytest.raises(ValueError, match="strides is \\[6, 12, 24\\]"):
        build_with_backbone(model_class, config, tiny_student("radio"), strides=[6, 12, 24])
    with pytest.raises(ValueError, match="window_size is 2, but the student has no attention windows"):
        mask_rcnn(tiny_student("radio_timm"), 3, window_size=2)
    with pytest.raises(ValueError, match="image_size is 32, which is padded to 64, .* images of 32 pixels alone"):
        mask_rcnn(one_size_student(), 3, image_size=32)
    for wrong in ({"num_classes": "three"}, {"num_classes": 1}, {"num_classes": 3, "image_size": -5}):
        with pytest.raises(ValueError, match="is .*, expected a whole number from [12] on"):
            mask_rcnn(tiny_student("radio"), **wrong)
    with pytest.raises(ValueError, match="model_class is 'RTDetr', expected a class"):
        build_with_backbone("RTDetr", config, tiny_student("radio"))
    with pytest.raises(ValueError, match="config is None, which has no backbone_config"):
        build_with_backbone(model_class, None, tiny_student("radio"))


@pytest.mark.parametrize("kind", ["radio", "eradio", "radio_timm"])
def test_mask_rcnn_on_every_kind_of_student(kind):
    torch.manual_seed(0)
    student = tiny_student(kind).to(torch.bfloat16)  # the copy is float32, like pyramid and heads
    model = mask_rcnn(student, num_classes=3, image_size=128, box_detections_per_img=5)
    images = [torch.rand(3, 100, 120), torch.rand(3, 90, 60)]
    maps = model.backbone(torch.rand(1, 3, 128, 192))
    assert [tuple(one.shape[2:]) for one in maps.values()] == [(32, 48), (16, 24), (8, 12), (4, 6), (2, 3)]
    masks = torch.zeros(1, 100, 120, dtype=torch.uint8)
    masks[0, 20:60, 30:90] = 1
    target = {"boxes": torch.tensor([[30.0, 20.0, 90.0, 60.0]]), "labels": torch.tensor([1]), "masks": masks}
    second = {**target, "boxes": torch.tensor([[5.0, 5.0, 50.0, 40.0]]), "masks": torch.ones(1, 90, 60).byte()}
    losses = model.train()(images, [target, second])
    sum(losses.values()).backward()
    assert any(one.grad is not None and one.grad.any() for one in model.backbone.student.parameters())
    assert all(one.grad is None for one in student.parameters())  # a copy
    found = model.eval()(images)
    assert len(found) == 2 and found[0]["masks"].shape[2:] == (100, 120)


def test_mask_rcnn_sees_windows():
    model = mask_rcnn(tiny_student("radio"), 3, image_size=128, window_size=4, out_channels=64).eval()
    assert model.backbone.out_channels == 64 and model.rpn.head.conv[0][0].in_channels == 64
    assert model.backbone.step == 64 and model.backbone.student.config.window_size == 4
    seen = []
    model.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model([torch.rand(3, 100, 130)])
    assert seen[0].shape == (1, 3, 128, 128)
    assert 0 <= seen[0].min() and seen[0].max() <= 1  # not normalized twice

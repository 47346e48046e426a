"""Students swapped into SAMs: one that gives SAM's own features gives SAM's own masks, through SAM's own tools."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from segment_anything import SamAutomaticMaskGenerator, SamPredictor

import transformers_radio
from helpers.echo_student import EchoStudent, echo_of_sam
from helpers.tiny_sam import NECK, PATCH, SIDE, SIZES, WIDTH, as_batch, make_student, picture, some_boxes, write_sam
from helpers.tiny_students import one_size_student, tiny_student
from transformers_radio.evaluation.sam_coco.prompting import StudentEncoder, predict_masks
from transformers_radio.integrations import swap_sam_encoder
from transformers_radio.teachers import load_sam

QUICKSTART_SAM = Path(transformers_radio.__file__).parent / "quickstart" / "teachers" / "sam" / "sam.pth"


@pytest.fixture
def sam(tmp_path):
    return load_sam(str(write_sam(tmp_path / "sam.pth")))


def all_masks(sam, image, size):
    """Logits, IoU predictions, and low-resolution logits of a box, a point, and a mask from before."""
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    box, point = some_boxes(size, 1)[0], np.array([[size[1] / 2, size[0] / 3]])
    first = predictor.predict(box=box, return_logits=True)
    second = predictor.predict(point, np.array([1]), mask_input=first[2][:1], return_logits=True)
    return [torch.from_numpy(one) for one in (*first, *second)]


@pytest.mark.parametrize("features", ["trunk", "neck"])
@pytest.mark.parametrize("size", SIZES)
def test_the_teachers_own_features_give_the_teachers_own_masks(sam, size, features):
    image = picture(size)
    expected = all_masks(sam, image, size)
    swapped = copy.deepcopy(sam)
    assert swap_sam_encoder(swapped, echo_of_sam(sam, features)) is swapped
    for found, wanted in zip(all_masks(swapped, image, size), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_the_quickstarts_sam_segments_everything_through_its_echo():
    from transformers_radio.quickstart.scenes import draw_scene

    sam = load_sam(str(QUICKSTART_SAM))
    image = draw_scene("validation", 5, 0).image
    settings = {"points_per_side": 4, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}
    expected = SamAutomaticMaskGenerator(sam, **settings).generate(image)
    swapped = swap_sam_encoder(copy.deepcopy(sam), echo_of_sam(sam))
    found = SamAutomaticMaskGenerator(swapped, **settings).generate(image)
    assert len(found) == len(expected) > 1
    for one, other in zip(found, expected, strict=True):
        assert (one["segmentation"] == other["segmentation"]).mean() > 0.999


@pytest.mark.parametrize("window_size", [None, 2])
@pytest.mark.parametrize("image_size", [None, SIDE // 2, 2 * SIDE])
def test_a_student_at_any_size_gives_the_masks_of_the_evaluation(sam, image_size, window_size):
    student, size = make_student(), (40, 56)
    boxes = some_boxes(size)
    embedding = StudentEncoder(student, sam, "sam", image_size, window_size)(as_batch(picture(size)))
    swapped = swap_sam_encoder(copy.deepcopy(sam), student, "sam", image_size, window_size)
    predictor = SamPredictor(swapped)
    predictor.set_image(picture(size))
    torch.testing.assert_close(predictor.get_image_embedding(), embedding, atol=1e-4, rtol=1e-4)
    found = np.stack([predictor.predict(box=box, multimask_output=False)[0][0] for box in boxes])
    # in another frame SAM's shift by half a pixel and its resizing of masks are others, which moves edges
    for frame, agreement in ((swapped, 0.9999), (sam, 0.9999 if image_size is None else 0.9)):
        expected, _ = predict_masks(frame, embedding, boxes, size)
        assert (torch.from_numpy(found) == expected).float().mean() > agreement


def test_every_kind_of_student_and_a_folder(sam, tmp_path):
    entry = {"sam": {"summary_dim": None, "feature_dim": WIDTH, "hidden_dim": 16}}
    for kind in ("radio", "eradio", "radio_timm"):
        student = tiny_student(kind, entry)
        student.save_pretrained(tmp_path / kind)
        swapped = swap_sam_encoder(copy.deepcopy(sam), str(tmp_path / kind))
        predictor = SamPredictor(swapped)
        predictor.set_image(picture((40, 56)))
        direct = StudentEncoder(student, sam)(as_batch(picture((40, 56))))
        torch.testing.assert_close(predictor.get_image_embedding(), direct, atol=1e-4, rtol=1e-4)
        assert predictor.predict(box=some_boxes((40, 56), 1)[0])[0].shape == (3, 40, 56)


def test_gradients_reach_a_swapped_student(sam):
    swapped = swap_sam_encoder(sam, make_student())
    swapped.image_encoder(torch.randn(1, 3, SIDE, SIDE)).sum().backward()
    assert swapped.image_encoder.encoder.student.embeddings.patch_projection.weight.grad.any()


@pytest.mark.parametrize("kind", ["radio", "eradio"])
def test_a_frozen_student_stays_as_it_is_while_the_decoder_trains(sam, kind):
    entry = {"sam": {"summary_dim": None, "feature_dim": WIDTH, "hidden_dim": 16}}
    swapped = swap_sam_encoder(sam, tiny_student(kind, entry))
    images = torch.rand(2, 3, SIDE, SIDE)
    swapped.image_encoder.requires_grad_(False)
    expected = swapped.eval().image_encoder(images)
    assert torch.equal(swapped.train().image_encoder(images), expected)
    assert torch.equal(swapped.eval().image_encoder(images), expected)  # no statistics have moved
    swapped.image_encoder.requires_grad_(True)
    assert swapped.train().image_encoder.encoder.student.training


def test_windows_of_an_eradio_are_those_asked_for(sam):
    entry = {"sam": {"summary_dim": None, "feature_dim": WIDTH, "hidden_dim": 16}}
    student, images = tiny_student("eradio", entry), torch.rand(1, 3, 4 * SIDE, 4 * SIDE)
    maps = {}
    for window_size in (None, 0, 2):
        swapped = swap_sam_encoder(copy.deepcopy(sam), student, image_size=4 * SIDE, window_size=window_size)
        maps[window_size] = swapped.image_encoder.encoder.maps(images)
    assert student.config.window_size is None
    assert torch.equal(maps[0], maps[None])
    student.config.window_size = 2
    features = student(images).adaptors["sam"].features.transpose(1, 2).unflatten(2, (16, 16))
    expected = torch.nn.functional.interpolate(features, (SIDE // PATCH,) * 2, mode="bilinear")
    torch.testing.assert_close(maps[2], expected)
    assert (maps[2] - maps[0]).norm() > 1e-4 * maps[0].norm()
    with pytest.raises(ValueError, match="window_size is 300"):
        swap_sam_encoder(sam, student, window_size=300)


# --- transformers ----------------------------------------------------------------------------------------------------


def transformers_sam(**vision):
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "output_channels": NECK, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape = {"image_size": SIDE, "patch_size": PATCH, "mlp_dim": 64, "global_attn_indexes": [1], "window_size": 3}
    prompts = {"hidden_size": NECK, "image_size": SIDE, "patch_size": PATCH, "mask_input_channels": 16}
    decoder = {"hidden_size": NECK, "mlp_dim": 40, "num_attention_heads": 4, "iou_head_hidden_dim": 24}
    config = transformers.SamConfig(
        vision_config={**sizes, **shape, "num_pos_feats": NECK // 2, **vision},
        prompt_encoder_config=prompts,
        mask_decoder_config=decoder,
    )
    model = transformers.SamModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model


def sam_inputs(size, side=SIDE):
    square = {"height": side, "width": side}
    small = {"height": side // 2, "width": side // 2}
    images = transformers.SamImageProcessor(
        size={"longest_edge": side}, pad_size=square, mask_size={"longest_edge": side // 2}, mask_pad_size=small
    )
    boxes = [some_boxes(size, 2).tolist()]
    return transformers.SamProcessor(images)(picture(size), input_boxes=boxes, return_tensors="pt")


@pytest.mark.parametrize("features", ["trunk", "neck"])
def test_transformers_sam_with_its_own_features(features):
    model = transformers_sam()
    encoder = copy.deepcopy(model.vision_encoder)

    def encode(images):
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        seen = []
        hook = encoder.neck.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        embedding = encoder((images - mean) / std).last_hidden_state
        hook.remove()
        maps = seen[0].permute(0, 3, 1, 2) if features == "trunk" else embedding
        return None, maps.flatten(2).transpose(1, 2), tuple(maps.shape[2:])

    inputs = sam_inputs((40, 56))
    with torch.no_grad():
        expected = model(**inputs)
        echo = EchoStudent("sam", PATCH, encode, WIDTH if features == "trunk" else NECK)
        found = swap_sam_encoder(model, echo)(**inputs)
        embeddings = model.get_image_embeddings(inputs["pixel_values"])
    torch.testing.assert_close(found.pred_masks, expected.pred_masks, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.iou_scores, expected.iou_scores, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        model(**{**inputs, "pixel_values": None, "image_embeddings": embeddings}).pred_masks, found.pred_masks
    )
    with pytest.raises(ValueError, match="which from_pretrained would not find"):
        model.save_pretrained("anywhere")


def test_transformers_sam_at_another_size():
    student = make_student()
    model = swap_sam_encoder(transformers_sam(), student, image_size=2 * SIDE, window_size=2)
    inputs = sam_inputs((40, 56), 2 * SIDE)
    output = model(**inputs)
    assert output.pred_masks.shape == (1, 2, 3, 4 * SIDE // PATCH, 4 * SIDE // PATCH)
    with pytest.raises(ValueError, match=f"images are {SIDE}x{SIDE}, but this SAM takes {2 * SIDE}x{2 * SIDE}"):
        model(**sam_inputs((40, 56)))


def sam3_vision():
    sizes = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape = {"image_size": 56, "patch_size": 14, "window_size": 2, "global_attn_indexes": [1]}
    shape["pretrain_image_size"] = 28
    backbone = transformers.Sam3ViTConfig(**sizes, **shape)
    grids = [[16, 16], [8, 8], [4, 4]]
    return transformers.Sam3VisionConfig(backbone_config=backbone, fpn_hidden_size=NECK, backbone_feature_sizes=grids)


def tiny_sam3_tracker():
    torch.manual_seed(0)
    prompts = {"hidden_size": NECK, "image_size": 56, "patch_size": 14, "mask_input_channels": 16}
    decoder = {"hidden_size": NECK, "mlp_dim": 40, "num_attention_heads": 4, "iou_head_hidden_dim": 24}
    config = transformers.Sam3TrackerConfig(
        vision_config=sam3_vision(), prompt_encoder_config=prompts, mask_decoder_config=decoder
    )
    return transformers.Sam3TrackerModel(config).eval()


def test_sam3_with_its_own_features():
    model = tiny_sam3_tracker()
    backbone = copy.deepcopy(model.vision_encoder.backbone)
    pixels = (torch.rand(1, 3, 56, 56) - 0.5) / 0.5
    points = torch.tensor([[[[20.0, 30.0]]]])
    with torch.no_grad():
        expected = model(pixel_values=pixels, input_points=points)

        def encode(images):
            assert images.shape[2:] == (56, 56)
            return None, backbone((images - 0.5) / 0.5).last_hidden_state, (4, 4)

        swap_sam_encoder(model, EchoStudent("sam3", 14, encode, WIDTH))
        found = model(pixel_values=pixels, input_points=points)
        torch.testing.assert_close(found.pred_masks, expected.pred_masks, atol=1e-4, rtol=1e-4)
        # a student with patches of 16 sees a larger image, so that its grid is SAM3's
        entry = {"sam3": {"summary_dim": None, "feature_dim": WIDTH, "hidden_dim": 16}}
        student = tiny_student("radio", entry)
        model = swap_sam_encoder(tiny_sam3_tracker(), student)
        assert model.vision_encoder.backbone.image_size == 64
        assert model(pixel_values=pixels, input_points=points).pred_masks.isfinite().all()
        flat = torch.full((1, 3, 56, 56), 0.5)
        tokens = model.vision_encoder.backbone((flat - 0.5) / 0.5).last_hidden_state
        whole = student(torch.full((1, 3, 64, 64), 0.5)).adaptors["sam3"].features
        torch.testing.assert_close(tokens, whole, atol=1e-5, rtol=1e-4)


def test_the_whole_sam3_with_its_own_features():
    torch.manual_seed(0)
    small = {"hidden_size": NECK, "num_attention_heads": 4}
    layer = {**small, "num_layers": 1, "intermediate_size": 32}
    text = {**small, "vocab_size": 99, "intermediate_size": 32, "projection_dim": NECK, "num_hidden_layers": 1}
    config = transformers.Sam3Config(
        vision_config=sam3_vision(),
        text_config={**text, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2},
        geometry_encoder_config=layer,
        detr_encoder_config=layer,
        detr_decoder_config={**layer, "num_queries": 5},
        mask_decoder_config={**small, "num_upsampling_stages": 2},
    )
    model = transformers.Sam3Model(config).eval()
    backbone = copy.deepcopy(model.vision_encoder.backbone)
    inputs = {"pixel_values": (torch.rand(2, 3, 56, 56) - 0.5) / 0.5, "input_ids": torch.randint(3, 99, (2, 8))}

    def encode(images):
        return None, backbone((images - 0.5) / 0.5).last_hidden_state, (4, 4)

    with torch.no_grad():
        expected = model(**inputs)
        other = model(**{**inputs, "pixel_values": inputs["pixel_values"].flip(0)})
        found = swap_sam_encoder(model, EchoStudent("sam3", 14, encode, WIDTH))(**inputs)
    scale = (other.pred_masks - expected.pred_masks).abs().max()
    assert scale > 0 and (found.pred_masks - expected.pred_masks).abs().max() < 1e-3 * scale
    torch.testing.assert_close(found.pred_boxes, expected.pred_boxes, atol=1e-5, rtol=1e-4)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_what_cannot_be_swapped_is_named(sam):
    student = make_student()
    with pytest.raises(ValueError, match="A Sam2Model reads four maps of its own backbone"):
        swap_sam_encoder(object.__new__(transformers.Sam2Model), student)
    with pytest.raises(ValueError, match="A SamHQModel reads maps from inside its own encoder"):
        swap_sam_encoder(object.__new__(transformers.SamHQModel), student)
    with pytest.raises(ValueError, match="expected a segment_anything Sam"):
        swap_sam_encoder(torch.nn.Linear(2, 2), student)
    for one in (copy.deepcopy(sam), transformers_sam()):
        with pytest.raises(ValueError, match="This SAM has a student as encoder: load it again"):
            swap_sam_encoder(swap_sam_encoder(one, student), student)
    with pytest.raises(ValueError, match="no adaptor 'clip', it has \\['sam'\\]"):
        swap_sam_encoder(sam, student, "clip")
    with pytest.raises(ValueError, match="features of width 20"):
        swap_sam_encoder(sam, make_student(feature_dim=20))
    with pytest.raises(ValueError, match="image_size is 60, but the student takes multiples of 8"):
        swap_sam_encoder(sam, student, image_size=60)
    with pytest.raises(ValueError, match="image_size is 64, which the student does not take: use 32"):
        swap_sam_encoder(sam, one_size_student({"sam": {"summary_dim": None, "feature_dim": WIDTH, "hidden_dim": 16}}))
    with pytest.raises(ValueError, match="width 48, but this SAM3's backbone has 40"):
        model = tiny_sam3_tracker()
        model.vision_encoder.config.backbone_config.hidden_size = 40
        swap_sam_encoder(model, student, "sam")
    assert type(sam.image_encoder).__name__ == "ImageEncoderViT"  # a refusal changes nothing

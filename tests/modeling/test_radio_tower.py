"""RadioVisionTower against transformers' own RADIO, and end to end inside transformers' LLaVA with a tiny Llama."""

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from transformers_radio.modeling.configuration_radio import RadioConfig
from transformers_radio.modeling.configuration_radio_tower import RadioVisionTowerConfig
from transformers_radio.modeling.image_processing_radio import RadioImageProcessor
from transformers_radio.modeling.modeling_radio import RadioModel
from transformers_radio.modeling.modeling_radio_tower import RadioVisionTower
from transformers_radio.modeling.processing_radio_llava import RadioLlavaProcessor

IMAGE_TOKEN = 9


def tiny_config(**overrides) -> RadioConfig:
    adaptor = {"summary_dim": 8, "feature_dim": 12, "hidden_dim": 16, "summary_token": 0, "teacher": "clip"}
    options = {
        **{"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "max_img_size": 128},
        **{"num_cls_tokens": 3, "num_registers": 2, "summary_idxs": [1, 2], "adaptors": {"clip": adaptor}},
        **overrides,
    }
    return RadioConfig(**options)


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("student")
    RadioModel(tiny_config()).save_pretrained(folder)
    return folder


def tiny_llava(vision_config, strategy="default", layer=-2) -> LlavaForConditionalGeneration:
    torch.manual_seed(1)
    text_config = LlamaConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=10,
        pad_token_id=0,
    )
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=IMAGE_TOKEN,
        vision_feature_select_strategy=strategy,
        vision_feature_layer=layer,
    )
    return LlavaForConditionalGeneration(config)


def prompt(num_image_tokens: int) -> torch.Tensor:
    return torch.tensor([[1, *[IMAGE_TOKEN] * num_image_tokens, 2, 3]])


def test_each_layer_is_one_summary_token_and_the_patches(student_folder):
    native = transformers.RadioModel.from_pretrained(student_folder).eval()
    tower = RadioVisionTower.from_pretrained(student_folder).eval()
    pixel_values = torch.rand(2, 3, 32, 64)
    expected = native(pixel_values, output_hidden_states=True)
    output = tower(pixel_values, output_hidden_states=True)
    assert len(output.hidden_states) == len(expected.hidden_states) == 5
    for ours, theirs in zip(output.hidden_states, expected.hidden_states, strict=True):
        assert ours.shape == (2, 1 + 2 * 4, 32)
        torch.testing.assert_close(ours[:, 1:], theirs[:, 5:])  # without 3 CLS tokens and 2 registers
        torch.testing.assert_close(ours[:, 0], theirs[:, 1])  # the first of summary_idxs
    torch.testing.assert_close(output.last_hidden_state, output.hidden_states[-1])
    torch.testing.assert_close(output.last_hidden_state[:, 1:], expected.features)
    torch.testing.assert_close(output.pooler_output, expected.summary)
    assert tower(pixel_values).hidden_states is None
    for layers, expected_layers in ((0, {0}), ([1, -1], {1, 4})):  # 0 is a layer, not False
        chosen = tower(pixel_values, output_hidden_states=layers).hidden_states
        assert {layer for layer, tokens in enumerate(chosen) if tokens is not None} == expected_layers
        assert all(torch.equal(chosen[layer], output.hidden_states[layer]) for layer in expected_layers)


def test_average_pooled_and_normed_students():
    config = tiny_config(summary_type="mean", num_cls_tokens=0, num_registers=1, adaptors={}, summary_idxs=[])
    tower = RadioVisionTower(RadioVisionTowerConfig(radio_config=config)).eval()
    output = tower(torch.rand(1, 3, 32, 32), output_hidden_states=True)
    for tokens in output.hidden_states:
        torch.testing.assert_close(tokens[:, 0], tokens[:, 1:].mean(1))
    torch.testing.assert_close(output.last_hidden_state[:, 0], output.pooler_output)

    student = RadioModel(tiny_config(final_norm=True)).eval()
    torch.nn.init.uniform_(student.norm.weight)
    pixel_values = torch.rand(1, 3, 32, 32)
    tower = RadioVisionTower.from_radio(student)
    last = tower(pixel_values, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(last[:, 1:], student(pixel_values).features)  # what LLaVA's layer -1 reads


def test_from_radio_copies_the_student(student_folder):
    student = RadioModel.from_pretrained(student_folder).eval()
    tower = RadioVisionTower.from_radio(student, image_size=64)
    assert tower.config.image_size == 64 and not tower.training
    assert tower.config.radio_config.adaptors == {} and list(student.config.adaptors) == ["clip"]
    pixel_values = torch.rand(1, 3, 32, 48)
    features = student(pixel_values).features
    assert torch.equal(tower(pixel_values).last_hidden_state[:, 1:], features)
    torch.nn.init.zeros_(tower.model.embeddings.patch_projection.weight)
    assert torch.equal(student(pixel_values).features, features)


def test_config_has_what_llava_reads(tmp_path, student_folder):
    config = RadioVisionTowerConfig.from_pretrained(student_folder)
    assert (config.hidden_size, config.patch_size, config.num_hidden_layers) == (32, 16, 4)
    assert config.image_size == 128  # the student's preferred resolution
    RadioVisionTowerConfig(radio_config=tiny_config(), image_size=96).save_pretrained(tmp_path)
    again = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(again) is RadioVisionTowerConfig and again.image_size == 96
    assert type(again.radio_config) is RadioConfig and again.radio_config.summary_idxs == [1, 2]
    # transformers' own configuration of the same student does as well
    native = RadioVisionTowerConfig(radio_config=transformers.AutoConfig.from_pretrained(student_folder))
    assert type(native.radio_config) is RadioConfig and native.hidden_size == 32


@pytest.mark.parametrize("strategy, extra", [("default", 0), ("full", 1)])
def test_llava_counts_image_tokens_as_with_any_tower(student_folder, strategy, extra):
    tower = RadioVisionTower.from_pretrained(student_folder)
    model = tiny_llava(tower.config, strategy).eval()
    assert type(model.model.vision_tower) is RadioVisionTower
    model.model.vision_tower = tower.eval()
    pixel_values = torch.rand(1, 3, 48, 64)
    num_image_tokens = 3 * 4 + extra
    assert model(input_ids=prompt(num_image_tokens), pixel_values=pixel_values).logits.shape[1] == num_image_tokens + 3
    for wrong in (num_image_tokens - 1, num_image_tokens + 1):
        with pytest.raises(ValueError, match="tokens"):
            model(input_ids=prompt(wrong), pixel_values=pixel_values)
    # the features that reach the projector are the native ones of that layer
    native = transformers.RadioModel.from_pretrained(student_folder).eval()
    hidden_state = native(pixel_values, output_hidden_states=True).hidden_states[-2]
    tokens = (
        hidden_state[:, 5:] if strategy == "default" else torch.cat([hidden_state[:, 1:2], hidden_state[:, 5:]], 1)
    )
    features = model.get_image_features(pixel_values=pixel_values).pooler_output
    torch.testing.assert_close(torch.stack(list(features)), model.model.multi_modal_projector(tokens))


def test_llava_with_several_layers(student_folder):
    tower = RadioVisionTower.from_pretrained(student_folder)
    model = tiny_llava(tower.config, layer=[0, 2, -1]).eval()
    logits = model(input_ids=prompt(4), pixel_values=torch.rand(1, 3, 32, 32)).logits
    assert torch.isfinite(logits).all()


def test_gradients_reach_the_projector_and_a_frozen_tower_keeps_its_features(student_folder):
    tower = RadioVisionTower.from_pretrained(student_folder)
    model = tiny_llava(tower.config)
    model.model.vision_tower = tower.requires_grad_(False)
    model.train()
    assert not tower.model.training
    input_ids, pixel_values = prompt(4), torch.rand(1, 3, 32, 32)
    model(input_ids=input_ids, pixel_values=pixel_values, labels=input_ids).loss.backward()
    assert all(parameter.grad is None for parameter in tower.parameters())
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
    first = model.get_image_features(pixel_values=pixel_values).pooler_output[0]
    assert torch.equal(first, model.get_image_features(pixel_values=pixel_values).pooler_output[0])

    tower.requires_grad_(True)
    model.train()
    assert tower.model.training
    model(input_ids=input_ids, pixel_values=pixel_values, labels=input_ids).loss.backward()
    assert tower.model.embeddings.patch_projection.weight.grad.abs().sum() > 0


def test_the_whole_llava_is_the_same_after_saving(tmp_path, student_folder):
    model = tiny_llava(RadioVisionTowerConfig.from_pretrained(student_folder)).eval()
    model.model.vision_tower = RadioVisionTower.from_pretrained(student_folder).eval()
    model.save_pretrained(tmp_path / "llava")
    again, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    input_ids, pixel_values = prompt(6), torch.rand(1, 3, 32, 48)
    logits = model(input_ids=input_ids, pixel_values=pixel_values).logits
    assert torch.equal(again.eval()(input_ids=input_ids, pixel_values=pixel_values).logits, logits)
    changed = model(input_ids=input_ids, pixel_values=1 - pixel_values).logits
    assert not torch.allclose(changed, logits)  # the text does look at the image


def tiny_processor(strategy="default") -> RadioLlavaProcessor:
    vocabulary = {"<pad>": 0, "<s>": 1, "what": 2, "is": 3, "this": 4, "<unk>": 5, "<image>": IMAGE_TOKEN}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return RadioLlavaProcessor(
        RadioImageProcessor(size={"longest_edge": 96}),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1,
    )


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_the_processor_counts_the_tokens_of_any_resolution(student_folder, strategy):
    tower = RadioVisionTower.from_pretrained(student_folder)
    model = tiny_llava(tower.config, strategy).eval()
    inputs = tiny_processor(strategy)(images=torch.rand(3, 70, 140), text="<image> what is this", return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 48, 96)
    assert (inputs["input_ids"] == IMAGE_TOKEN).sum() == 3 * 6 + (strategy == "full")
    generated = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert generated.shape[1] == inputs["input_ids"].shape[1] + 2


@pytest.mark.parametrize(
    "field, value",
    [("patch_size", None), ("patch_size", "16"), ("num_additional_image_tokens", None)]
    + [("vision_feature_select_strategy", value) for value in (None, "cls")],
)
def test_settings_of_the_processor_of_wrong_types_are_named(field, value):
    processor = tiny_processor()
    setattr(processor, field, value)
    with pytest.raises(ValueError, match=f"{field}={value!r}: expected"):
        processor(images=torch.rand(3, 70, 140), text="<image> what is this")


@pytest.mark.parametrize("window_size", [None, 2])
def test_an_image_has_the_same_answer_in_any_batch(tmp_path, student_folder, window_size):
    student = RadioModel.from_pretrained(student_folder, window_size=window_size).eval()
    model = tiny_llava(RadioVisionTowerConfig.from_pretrained(student_folder, radio_config=student.config)).eval()
    model.model.vision_tower = RadioVisionTower.from_radio(student)
    processor = tiny_processor()
    processor.image_processor.size_divisor = student.min_resolution_step
    processor.save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(processor) is RadioLlavaProcessor
    sizes = [(40, 100), (100, 50), (96, 96)]  # (height, width): 96 pixels at the longest side
    expected_sizes = [(48, 96), (96, 48), (96, 96)] if window_size is None else [(64, 96), (96, 64), (96, 96)]
    images = [torch.rand(3, *size) for size in sizes]
    texts = ["<image> what", "<image> what is this", "what is <image>"]
    batch = processor(images=images, text=texts, padding=True, padding_side="right", return_tensors="pt")
    assert sorted(batch) == ["attention_mask", "image_sizes", "input_ids", "pixel_values"]
    assert batch["image_sizes"].tolist() == [list(size) for size in expected_sizes]
    together = model(**batch).logits
    for index, (height, width) in enumerate(expected_sizes):
        alone = processor(images=images[index], text=texts[index], return_tensors="pt")
        assert (alone["input_ids"] == IMAGE_TOKEN).sum() == height * width // 256
        logits = model(**alone).logits[0]
        torch.testing.assert_close(together[index, : len(logits)], logits, atol=1e-5, rtol=1e-5)
        # and as through the student, without any of this
        features = student(batch["pixel_values"][index : index + 1, :, :height, :width]).features
        tokens = model.get_image_features(
            pixel_values=batch["pixel_values"], image_sizes=batch["image_sizes"], vision_feature_layer=-1
        ).pooler_output[index]
        torch.testing.assert_close(tokens, model.model.multi_modal_projector(features)[0], atol=1e-5, rtol=1e-5)


def test_average_pooled_towers_pack_images_too():
    config = tiny_config(summary_type="mean", num_cls_tokens=0, num_registers=1, adaptors={}, summary_idxs=[])
    tower = RadioVisionTower(RadioVisionTowerConfig(radio_config=config)).eval()
    pixel_values = torch.rand(2, 3, 32, 48)
    packed = tower(pixel_values, image_sizes=[(16, 48), (32, 32)]).last_hidden_state
    alone = [tower(pixel_values[:1, :, :16]).last_hidden_state, tower(pixel_values[1:, :, :, :32]).last_hidden_state]
    torch.testing.assert_close(packed, torch.cat([alone[0], alone[1][:, 1:]], dim=1))


def test_full_takes_one_size_in_a_batch():
    images, texts = [torch.rand(3, 40, 100), torch.rand(3, 100, 40)], ["<image> what"] * 2
    with pytest.raises(ValueError, match=r"one size in a batch, got \[\(48, 96\), \(96, 48\)\]"):
        tiny_processor("full")(images=images, text=texts, padding=True)
    inputs = tiny_processor("full")(images=images[:1] * 2, text=texts, padding=True, return_tensors="pt")
    assert "image_sizes" not in inputs and (inputs["input_ids"] == IMAGE_TOKEN).sum() == 2 * (3 * 6 + 1)


def test_wrong_input_is_named(student_folder):
    with pytest.raises(ValueError, match="image_size is 100"):
        RadioVisionTowerConfig(radio_config=tiny_config(), image_size=100)
    tower = RadioVisionTower.from_pretrained(student_folder)
    for wrong in ([[32, 24]], [[64, 32]], [[32, 32], [32, 32]]):
        with pytest.raises(ValueError, match="image_sizes are .* multiples of 16 up to 32x32"):
            tower(torch.rand(1, 3, 32, 32), image_sizes=torch.tensor(wrong))
    with pytest.raises(ValueError, match="40"):
        tower(torch.rand(1, 3, 32, 40))

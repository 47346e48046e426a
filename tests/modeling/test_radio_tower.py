"""RadioVisionTower against transformers' own RADIO, and end to end inside transformers' LLaVA with a tiny Llama."""

import subprocess
import sys

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from transformers_radio.modeling.configuration_radio import RadioConfig
from transformers_radio.modeling.configuration_radio_tower import RadioVisionTowerConfig
from transformers_radio.modeling.image_processing_radio import RadioImageProcessor
from transformers_radio.modeling.modeling_radio import RadioModel
from transformers_radio.modeling.modeling_radio_tower import RadioVisionTower

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

    torch.save((input_ids, pixel_values), tmp_path / "in.pt")
    code = (
        "import torch\n"
        "from transformers_radio.modeling import RadioVisionTower\n"
        "from transformers import LlavaForConditionalGeneration\n"
        "input_ids, pixel_values = torch.load('in.pt')\n"
        "model = LlavaForConditionalGeneration.from_pretrained('llava').eval()\n"
        "torch.save(model(input_ids=input_ids, pixel_values=pixel_values).logits, 'out.pt')\n"
    )
    environment = {
        "PATH": "",
        "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), logits)


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_llava_processor_counts_the_tokens_of_any_resolution(student_folder, strategy):
    tower = RadioVisionTower.from_pretrained(student_folder)
    model = tiny_llava(tower.config, strategy).eval()
    vocabulary = {"<pad>": 0, "<s>": 1, "what": 2, "is": 3, "this": 4, "<unk>": 5, "<image>": IMAGE_TOKEN}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    processor = LlavaProcessor(
        RadioImageProcessor(size={"longest_edge": 96}, return_pixel_mask=False),
        tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1,
    )
    inputs = processor(images=torch.rand(3, 70, 140), text="<image> what is this", return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 48, 96)
    assert (inputs["input_ids"] == IMAGE_TOKEN).sum() == 3 * 6 + (strategy == "full")
    generated = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert generated.shape[1] == inputs["input_ids"].shape[1] + 2


def test_loads_as_remote_code_in_a_process_without_our_package(tmp_path, student_folder):
    tower = RadioVisionTower.from_pretrained(student_folder).eval()
    tower.save_pretrained(tmp_path / "tower")
    pixel_values = torch.rand(1, 3, 32, 48)
    torch.save(pixel_values, tmp_path / "in.pt")
    code = (
        "import sys, torch; sys.modules['transformers_radio'] = None\n"
        "from transformers import AutoModel\n"
        "tower = AutoModel.from_pretrained('tower', trust_remote_code=True).eval()\n"
        "torch.save(tower(torch.load('in.pt')).last_hidden_state, 'out.pt')\n"
    )
    environment = {
        "PATH": "",
        "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), tower(pixel_values).last_hidden_state)


def test_wrong_input_is_named(student_folder):
    with pytest.raises(ValueError, match="image_size is 100"):
        RadioVisionTowerConfig(radio_config=tiny_config(), image_size=100)
    tower = RadioVisionTower.from_pretrained(student_folder)
    with pytest.raises(ValueError, match="image_sizes"):
        tower(torch.rand(1, 3, 32, 32), image_sizes=torch.tensor([[32, 32]]))
    with pytest.raises(ValueError, match="40"):
        tower(torch.rand(1, 3, 32, 40))

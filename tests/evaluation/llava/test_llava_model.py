"""The tower with images of mixed sizes, the processor, and the parts of a built and a saved LLaVA."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from helpers.paths import ROOT
from helpers.tiny_llava import save_language_model, save_student, tiny_tokenizer
from transformers_radio import RadioConfig, RadioImageProcessor, RadioLlavaProcessor, RadioModel
from transformers_radio.evaluation.llava.answers import generate
from transformers_radio.evaluation.llava.data import LlavaCollator, encode_image, expand_image_token, render
from transformers_radio.evaluation.llava.model import IMAGE_TOKEN, build_llava, load_llava

SIZES = [(64, 48), (32, 64), (64, 48), (16, 16)]  # (height, width) in pixels


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("llava")
    return save_student(root / "student"), save_language_model(root / "language_model")


@pytest.fixture(scope="module")
def built(folders):
    torch.manual_seed(2)
    llava, processor = build_llava(RadioModel.from_pretrained(folders[0]), str(folders[1]), 64)
    return llava.eval(), processor


def features(processor, sizes, question="Where is the shape?"):
    generator = torch.Generator().manual_seed(0)
    for height, width in sizes:
        pixels = torch.rand(3, height, width, generator=generator)
        prompt = render(processor.tokenizer, [{"role": "user", "content": f"{IMAGE_TOKEN}\n{question}"}])
        ids = torch.tensor(processor.tokenizer(expand_image_token(processor, prompt, pixels))["input_ids"])
        yield {"input_ids": ids, "labels": ids, "pixel_values": pixels}


def test_mixed_sizes_in_a_batch_are_what_each_image_gives_alone(built, folders):
    llava, processor = built
    batch = LlavaCollator(processor)(list(features(processor, SIZES)))
    assert batch["pixel_values"].shape == (4, 3, 64, 64)
    native = transformers.RadioModel.from_pretrained(folders[0]).eval()
    got = llava.get_image_features(pixel_values=batch["pixel_values"], image_sizes=batch["image_sizes"]).pooler_output
    assert [len(tokens) for tokens in got] == [12, 8, 12, 1]  # patches of 16 x 16, no class or register tokens
    for tokens, image in zip(got, features(processor, SIZES), strict=True):
        expected = native(image["pixel_values"][None]).features
        torch.testing.assert_close(tokens, llava.model.multi_modal_projector(expected)[0], atol=1e-5, rtol=1e-4)

    logits = llava(**batch).logits
    for row, image in enumerate(features(processor, SIZES)):
        alone = llava(input_ids=image["input_ids"][None], pixel_values=image["pixel_values"][None]).logits[0]
        torch.testing.assert_close(logits[row, : len(alone)], alone, atol=1e-4, rtol=1e-3)


def test_answers_do_not_depend_on_the_batch(built):
    llava, processor = built
    images = [one["pixel_values"] for one in features(processor, SIZES)] + [None]
    questions = ["Where is the shape?", "What color is the shape?", "Where?", "What color?", "Where is the shape?"]
    together = generate(llava, processor, images, questions, max_new_tokens=6)
    alone = [
        generate(llava, processor, [image], [question], max_new_tokens=6)[0]
        for image, question in zip(images, questions, strict=True)
    ]
    assert together == alone


def test_the_paper_s_resolution():
    # long edge 432, the aspect kept, the short edge padded only to a patch: section 5.4
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    image_processor = RadioImageProcessor(size={"longest_edge": 432}, size_divisor=16)
    processor = RadioLlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    for (width, height), (rows, columns) in {
        (640, 480): (21, 27),  # 324 pixels high: 20.25 patches
        (480, 640): (27, 21),
        (500, 375): (21, 27),
        (300, 300): (27, 27),
        (1000, 100): (3, 27),
    }.items():
        image = Image.new("RGB", (width, height), (255, 255, 255))
        pixels = encode_image(processor, image)
        assert pixels.shape == (3, rows * 16, columns * 16)
        inside = round(height * 432 / max(width, height)), round(width * 432 / max(width, height))
        assert pixels[:, : inside[0], : inside[1]].min() > 0.99
        assert pixels[:, inside[0] :].sum() == pixels[:, :, inside[1] :].sum() == 0
        expanded = expand_image_token(processor, f"{IMAGE_TOKEN}\nWhat?", pixels)
        expected = processor(images=image, text=f"{IMAGE_TOKEN}\nWhat?", return_tensors="pt")
        assert processor.tokenizer(expanded)["input_ids"] == expected["input_ids"][0].tolist()
        assert expanded.count(IMAGE_TOKEN) == rows * columns
        torch.testing.assert_close(expected["pixel_values"][0], pixels)


def test_parts_are_the_student_s_and_the_language_model_s(built, folders):
    llava, processor = built
    assert not any(parameter.is_meta for parameter in (*llava.parameters(), *llava.buffers()))
    language = AutoModelForCausalLM.from_pretrained(folders[1])
    old = language.config.vocab_size
    assert processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) == old == llava.config.image_token_id
    assert llava.config.text_config.vocab_size == old + 1
    for key, value in language.state_dict().items():
        mine = llava.model.language_model if key.startswith("model.") else llava
        got = mine.state_dict()[key.removeprefix("model.")]
        assert torch.equal(got[:old] if len(got) == old + 1 else got, value), key
    student = RadioModel.from_pretrained(folders[0])
    for key, value in llava.model.vision_tower.model.state_dict().items():
        assert torch.equal(value, student.state_dict()[key]), key
    assert not any(parameter.requires_grad for parameter in llava.model.vision_tower.parameters())
    assert processor.tokenizer.pad_token == "<unk>"


def test_the_prompt_is_vicuna_s(built):
    tokenizer = built[1].tokenizer
    messages = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Where?"},
    ]
    assert render(tokenizer, messages) == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: What is it? ASSISTANT: A cat.</s>USER: Where? "
        "ASSISTANT:"
    )
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    assert built[1].apply_chat_template(parts).endswith("questions. USER: <image>\nWhat? ASSISTANT:")


def test_a_saved_llava_is_the_same(built, tmp_path):
    llava, processor = built
    llava.save_pretrained(tmp_path / "llava")
    processor.save_pretrained(tmp_path / "llava")
    again, again_processor = load_llava(str(tmp_path / "llava"))
    batch = LlavaCollator(processor)(list(features(processor, SIZES)))
    assert torch.equal(again(**batch).logits, llava(**batch).logits)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8))
    assert torch.equal(encode_image(again_processor, image), encode_image(processor, image))

    # through transformers' own classes, with paths
    image.save(tmp_path / "image.png")
    by_name = AutoProcessor.from_pretrained(tmp_path / "llava")
    question = [{"type": "image"}, {"type": "text", "text": "Where is the shape?"}]
    text = by_name.apply_chat_template([{"role": "user", "content": question}])
    inputs = by_name(images=str(tmp_path / "image.png"), text=text, return_tensors="pt")
    tokens = again.generate(**inputs, do_sample=False, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
    answer = generate(llava, processor, [encode_image(processor, image)], ["Where is the shape?"], 5)[0]
    assert by_name.tokenizer.decode(tokens, skip_special_tokens=True).strip() == answer


def test_a_llava_that_was_saved_with_transformers_processor_still_loads(built, tmp_path):
    llava, processor = built
    llava.save_pretrained(tmp_path)
    images = RadioImageProcessor(size={"longest_edge": 64}, return_pixel_mask=False)
    options = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    LlavaProcessor(images, processor.tokenizer, patch_size=16, **options).save_pretrained(tmp_path)
    batch = {"images": [Image.new("RGB", (64, 32)), Image.new("RGB", (32, 64))], "text": [f"{IMAGE_TOKEN}\nWhat?"] * 2}
    got, expected = (one(**batch, return_tensors="pt") for one in (load_llava(str(tmp_path))[1], processor))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_the_snippets_of_the_documentation_start_from_the_student(folders, tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 12, "num_attention_heads": 2, "max_img_size": 64}
    student = RadioModel(RadioConfig(**shape)).eval()
    student.save_pretrained(tmp_path)
    RadioImageProcessor().save_pretrained(tmp_path)
    text = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    snippets = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    names = {}
    for snippet in (one for one in snippets if "load_student(" in one and "ERadio" not in one):
        here = snippet.replace("runs/mine/student", str(tmp_path)).replace("lmsys/vicuna-7b-v1.5", str(folders[1]))
        exec(here, names)
    assert len([name for name in ("model", "llava") if name in names]) == 2
    pixel_values = torch.rand(1, 3, 32, 48)
    features = student(pixel_values).features
    last = names["model"].backbone.eval()(pixel_values).feature_maps[-1]
    torch.testing.assert_close(last.flatten(2).transpose(1, 2), features)
    llava, processor = names["llava"].eval(), names["processor"]
    torch.testing.assert_close(llava.model.vision_tower(pixel_values).last_hidden_state[:, 1:], features)
    inputs = processor(images=torch.rand(3, 90, 200), text="<image> What?", return_tensors="pt")
    assert inputs["image_sizes"].tolist() == [[208, 432]]  # 194 rows are 12.2 patches
    assert llava.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] > 13 * 27
    language = AutoModelForCausalLM.from_pretrained(folders[1])
    assert torch.equal(llava.lm_head.weight[: language.config.vocab_size], language.lm_head.weight)


def test_another_tower_is_refused(tmp_path, folders):
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32
        ),
        text_config=transformers.AutoConfig.from_pretrained(folders[1]),
    )
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="CLIPVisionModel"):
        load_llava(str(tmp_path))


def test_wrong_sizes_are_named(folders):
    student = RadioModel.from_pretrained(folders[0])
    with pytest.raises(ValueError, match="image_size is 60.* such as 64"):
        build_llava(student, str(folders[1]), 60)
    windowed = RadioModel(RadioConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, window_size=2))
    with pytest.raises(ValueError, match="multiples of 32"):
        build_llava(windowed, str(folders[1]), 48)

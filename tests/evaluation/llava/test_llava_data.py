"""Conversations in LLaVA's format: what is learned from them, what is left out, and what is refused."""

import json
import logging

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from helpers.tiny_llava import make_world, save_language_model, save_student
from transformers_radio import RadioModel
from transformers_radio.evaluation.llava.data import IGNORED, LlavaCollator, LlavaDataset, read_conversations
from transformers_radio.evaluation.llava.model import IMAGE_TOKEN, build_llava


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_world(root / "world", images=8, questions=1)
    return root


@pytest.fixture(scope="module")
def built(root):
    student = RadioModel.from_pretrained(save_student(root / "student"))
    return build_llava(student, str(save_language_model(root / "language_model")), 64)


def conversations(folder, items, max_skipped_share=0.0):
    file = folder / "conversations.json"
    file.write_text(json.dumps(items))
    return read_conversations(file, folder, max_skipped_share)


def dataset(folder, processor, examples, plain=False, **options):
    options = {"max_length": 2048, "max_skipped_share": 0.0, **options}
    return LlavaDataset(examples, processor, plain=plain, unreadable=folder / "unreadable.txt", **options)


def turns(*texts):
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


def learned(processor, item):
    """The runs of tokens that have labels, as text."""
    runs, before = [], False
    for token, label in zip(item["input_ids"].tolist(), item["labels"].tolist(), strict=True):
        assert label in (IGNORED, token)
        if label != IGNORED:
            runs = runs if before else [*runs, []]
            runs[-1].append(token)
        before = label != IGNORED
    return [processor.tokenizer.decode(run) for run in runs]


def test_only_answers_are_learned(tmp_path, built):
    processor = built[1]
    Image.new("RGB", (64, 40)).save(tmp_path / "a.png")
    items = [
        {"image": "a.png", "conversations": turns("What color?\n<image>", "red", "Where is it?", "at the left, red")},
        {"conversations": [{"from": "gpt", "value": "early"}, *turns("Who are you?", "ASSISTANT: nobody")]},
    ]
    examples = conversations(tmp_path, items).examples
    data = dataset(tmp_path, processor, examples)
    first, second = data[0], data[1]
    assert learned(processor, first) == [" red</s>", " at the left, red</s>"]
    assert learned(processor, second) == [" ASSISTANT: nobody</s>"]
    assert first["pixel_values"].shape == (3, 48, 64) and second["pixel_values"] is None
    text = processor.tokenizer.decode(first["input_ids"])
    assert text.endswith(
        f"USER: {IMAGE_TOKEN * 12}\nWhat color? ASSISTANT: red</s>USER: Where is it? ASSISTANT: at the left, red</s>"
    )
    assert "early" not in processor.tokenizer.decode(second["input_ids"])

    plain = dataset(tmp_path, processor, examples[:1], plain=True)[0]
    assert learned(processor, plain) == ["red\n"]
    assert processor.tokenizer.decode(plain["input_ids"]) == f"<s>{IMAGE_TOKEN * 12}red\n"


def test_the_prompt_of_training_is_the_prompt_of_generation(tmp_path, built):
    from transformers_radio.evaluation.llava.data import render

    processor = built[1]
    example = conversations(tmp_path, [{"conversations": turns("Where is the shape?", "left")}]).examples[0]
    item = dataset(tmp_path, processor, [example])[0]
    prompt = processor.tokenizer(render(processor.tokenizer, example.messages[:1]))["input_ids"]
    first_label = (item["labels"] != IGNORED).nonzero()[0].item()
    assert item["input_ids"][:first_label].tolist() == prompt


def test_missing_images_are_counted_and_too_many_stop(root, caplog):
    world = root / "world"
    items = json.loads((world / "finetune.json").read_text())
    items[1]["image"], items[4]["image"] = "gone.png", "away.png"
    file = root / "missing.json"
    file.write_text(json.dumps(items))
    with caplog.at_level(logging.WARNING):
        data = read_conversations(file, world / "images", max_skipped_share=0.3)
    assert data.missing == 2 and len(data.examples) == 6
    assert "gone.png" in caplog.text and "2 of 8 items are left out" in caplog.text
    with pytest.raises(ValueError, match="2 of 8 images .* share of 0.2"):
        read_conversations(file, world / "images", max_skipped_share=0.2)
    items = json.loads(file.read_text())
    file.write_text(json.dumps([*items, *(item for item in items if not (world / "images" / item["image"]).exists())]))
    assert read_conversations(file, world / "images", max_skipped_share=0.5).missing == 2  # files, not items


def test_unreadable_images_are_replaced_and_too_many_stop(tmp_path, built):
    processor = built[1]
    for number in range(4):
        Image.new("RGB", (64, 64), (60 * number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:60])
    (tmp_path / "3.png").write_bytes(b"no image")
    items = [{"image": f"{n}.png", "conversations": turns("<image>What?", f"answer {n}")} for n in range(4)]
    data = dataset(tmp_path, processor, conversations(tmp_path, items).examples, max_skipped_share=0.5)
    assert [learned(processor, data[n]) for n in range(4)] == [[f" answer {n}</s>"] for n in (0, 2, 2, 0)]
    unreadable = (tmp_path / "unreadable.txt").read_text().splitlines()
    assert [line.rsplit("/")[-1] for line in unreadable] == ["1.png", "3.png"]

    strict = dataset(tmp_path, processor, data.examples, max_skipped_share=0.1)
    with pytest.raises(ValueError, match="of 10. images cannot be read.*share of 0.1"):
        for number in range(200):
            strict[number % 4]
    with pytest.raises(ValueError, match="No image"):
        dataset(tmp_path, processor, data.examples[3:], max_skipped_share=1.0)[0]


def test_batches_hold_each_example_unchanged(root, built):
    processor = built[1]
    data = read_conversations(root / "world" / "finetune.json", root / "world" / "images", 0.0)
    items = dataset(root, processor, data.examples)
    loader = DataLoader(items, batch_size=8, collate_fn=LlavaCollator(processor), num_workers=1)
    (batch,) = loader
    for row in range(8):
        item = items[row]
        length = len(item["input_ids"])
        height, width = batch["image_sizes"][row].tolist()
        assert torch.equal(batch["input_ids"][row, :length], item["input_ids"])
        assert torch.equal(batch["labels"][row, :length], item["labels"])
        assert batch["attention_mask"][row].sum() == length and batch["attention_mask"][row, :length].all()
        assert (batch["labels"][row, length:] == IGNORED).all()
        assert torch.equal(batch["pixel_values"][row, :, :height, :width], item["pixel_values"])
        assert (height, width) == item["pixel_values"].shape[1:]


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_text_alone_reaches_the_projector_without_changing_anything(tmp_path, built, padding_side):
    llava, processor = built
    examples = conversations(tmp_path, [{"conversations": turns("Where is the shape?", "left")}]).examples
    item = dataset(tmp_path, processor, examples)[0]
    batch = LlavaCollator(processor, padding_side)([item])
    llava.zero_grad()
    loss = llava(**batch).loss
    loss.backward()
    gradient = llava.model.multi_modal_projector.linear_1.weight.grad
    assert gradient is not None and gradient.abs().max() == 0  # DDP and FSDP need one, learning must not see it
    alone = llava(input_ids=item["input_ids"][None], labels=item["labels"][None]).loss
    torch.testing.assert_close(loss, alone)


def test_an_image_that_does_not_fit_in_max_length_is_refused(root, built):
    data = read_conversations(root / "world" / "finetune.json", root / "world" / "images", 0.0)
    with pytest.raises(ValueError, match="max_length 20 cuts into"):
        dataset(root, built[1], data.examples, max_length=20)[0]
    assert len(dataset(root, built[1], data.examples, max_length=90)[0]["input_ids"]) == 90


@pytest.mark.parametrize(
    "item, message",
    [
        ({"conversations": turns("What?")}, "item 0 .* does not alternate"),
        ({"conversations": [*turns("What?", "red"), *turns("Why?")]}, "does not alternate"),
        ({"conversations": [*turns("What?"), *turns("Why?", "red")]}, "does not alternate"),
        ({"conversations": []}, "does not alternate"),
        ({"image": "a.png", "conversations": turns("What?", "red")}, "0 <image> for one image"),
        ({"conversations": turns("<image>What?", "red")}, "1 <image> for no image"),
        ({"image": "a.png", "conversations": turns("<image><image>?", "red")}, "2 <image> for one image"),
        ({"messages": []}, "is not a conversation"),
        ({"conversations": [{"from": "robot", "value": "?"}]}, "is not a conversation"),
        ("text", "is not a conversation"),
    ],
)
def test_wrong_items_are_named(tmp_path, item, message):
    with pytest.raises(ValueError, match=message):
        conversations(tmp_path, [item])


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.json"):
        read_conversations(tmp_path / "none.json", tmp_path, 0.0)
    (tmp_path / "a.json").write_text("[{")
    with pytest.raises(ValueError, match="a.json is not JSON"):
        read_conversations(tmp_path / "a.json", tmp_path, 0.0)
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match="no list of conversations"):
        read_conversations(tmp_path / "a.json", tmp_path, 0.0)
    with pytest.raises(FileNotFoundError, match="folder of images"):
        read_conversations(tmp_path / "a.json", tmp_path / "images", 0.0)

"""Questions about images, and a LLaVA's greedy answers to them, kept on disk as they come."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from transformers_radio.data.images import SkippedImage
from transformers_radio.data.source import read_rgb
from transformers_radio.disk import digest

from .config import LlavaQuestions
from .data import IMAGE_TOKEN, LlavaCollator, encode_image, expand_image_token, render
from .scorers import SCORERS


@dataclass
class Question:
    """A question about an image, or about none."""

    id: str
    image: Path | None
    text: str  # without an image token and without `LlavaQuestions.prompt`
    answers: list[str]  # at least one


def read_questions(path: str | Path, images: str | Path, scorer: str) -> tuple[list[Question], str]:
    """The questions of a file (see `LlavaQuestions.questions`), and the digest of its bytes.

    Raises:
        FileNotFoundError: no such file, or images that are missing: a score over a part is not a score.
        ValueError: an unknown scorer, another format, or an id twice; the message names the line.
    """
    path, images = Path(path), Path(images)
    if scorer not in SCORERS:
        raise ValueError(f"scorer is {scorer!r}; use one of {', '.join(SCORERS)}.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of questions {path}.")
    data = path.read_bytes()
    questions: dict[str, Question] = {}
    for number, line in enumerate(data.decode("utf-8").splitlines(), start=1):
        try:
            item = json.loads(line)
            answers = item["answers"] if "answers" in item else [item["answer"]]
            image = images / item["image"] if item.get("image") else None
            text = item["text"].replace(IMAGE_TOKEN, "").strip()
            question = Question(str(item["question_id"]), image, text, answers)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"Line {number} of {path} is not a question ({error!r}); expected 'question_id', 'image', 'text' and "
                "'answer' or 'answers'."
            ) from error
        if question.id in questions:
            raise ValueError(f"Line {number} of {path} has question_id {question.id!r} again; make them unique.")
        if not answers or not all(isinstance(answer, str) for answer in answers):
            raise ValueError(f"Line {number} of {path} has answers {answers!r}; expected one or more texts.")
        if scorer == "yes_no" and answers[0].strip().lower() not in ("yes", "no"):
            raise ValueError(f"Line {number} of {path} has answer {answers[0]!r}; the scorer yes_no wants yes or no.")
        questions[question.id] = question
    if not questions:
        raise ValueError(f"{path} holds no questions.")
    missing = [question.image for question in questions.values() if question.image and not question.image.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} images of {path} are missing, the first is {missing[0]}: complete {images}."
        )
    return list(questions.values()), digest([data])


class AnswerLog:
    """Answers by question id in FOLDER/<rank>.jsonl, one file per process, which grows with each batch.

    `answers` has those of all files, also of earlier processes that were killed.
    """

    def __init__(self, folder: Path, rank: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.path = folder / f"{rank}.jsonl"
        if self.path.exists():
            whole = self.path.read_bytes().rpartition(b"\n")
            self.path.write_bytes(whole[0] + whole[1])  # without the line that a killed process did not finish
        self.answers = self.read()

    def read(self) -> dict[str, str]:
        """The answers that all processes have written so far."""
        answers = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines():
                item = json.loads(line)
                answers[item["question_id"]] = item["text"]
        return answers

    def add(self, answers: dict[str, str]) -> None:
        self.answers |= answers
        with self.path.open("a", encoding="utf-8") as file:
            for name, text in answers.items():
                file.write(json.dumps({"question_id": name, "text": text}) + "\n")


def answer_questions(
    llava: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    questions: list[Question],
    settings: LlavaQuestions,
    folder: Path,
    batch_size: int,
) -> list[str]:
    """Answers in the order of the questions; a question that has an answer in `folder` is not asked again.

    Call it on all processes: each answers a share, and all return everything.

    Raises:
        ValueError: an image that cannot be read.
    """
    state = PartialState()
    log = AnswerLog(folder, state.process_index)
    state.wait_for_everyone()  # all agree on what is left before one adds to it
    left = [question for question in questions if question.id not in log.answers]
    share = left[state.process_index :: state.num_processes]
    for batch in batches(share, batch_size, folder.name, not state.is_main_process):
        images = [None if question.image is None else _read_image(processor, question.image) for question in batch]
        texts = [question.text + settings.prompt for question in batch]
        replies = generate(llava, processor, images, texts, settings.max_new_tokens)
        log.add({question.id: reply for question, reply in zip(batch, replies, strict=True)})
    state.wait_for_everyone()
    answers = log.read()
    return [answers[question.id] for question in questions]


def _read_image(processor: LlavaProcessor, path: Path) -> torch.Tensor:
    try:
        return encode_image(processor, read_rgb(path))
    except SkippedImage as error:
        raise ValueError(f"{path} cannot be read ({error.reason}); replace it and start again.") from error


def batches(items: list[Any], batch_size: int, name: str, quiet: bool) -> Iterable[list[Any]]:
    """Slices of `items`, with a progress bar that counts them."""
    with tqdm(total=len(items), desc=name, unit=" questions", disable=quiet) as progress:
        for start in range(0, len(items), batch_size):
            batch = items[start : start + batch_size]
            yield batch
            progress.update(len(batch))


@torch.inference_mode()
def generate(
    llava: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    images: list[torch.Tensor | None],
    questions: list[str],
    max_new_tokens: int,
) -> list[str]:
    """Greedy answers to a batch of questions.

    Args:
        images: pixels in [0, 1], (3, height, width) each, whose sizes may differ; None for a question without one.
    """
    features = []
    for pixel_values, question in zip(images, questions, strict=True):
        content = question if pixel_values is None else f"{IMAGE_TOKEN}\n{question}"
        prompt = render(processor.tokenizer, [{"role": "user", "content": content}])
        input_ids = torch.tensor(processor.tokenizer(expand_image_token(processor, prompt, pixel_values))["input_ids"])
        features.append({"input_ids": input_ids, "labels": input_ids, "pixel_values": pixel_values})
    inputs = LlavaCollator(processor, padding_side="left")(features)
    del inputs["labels"]
    inputs = {key: tensor.to(llava.device) for key, tensor in inputs.items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(llava.dtype)
    tokens = llava.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    new = tokens[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.tokenizer.batch_decode(new, skip_special_tokens=True)]

"""A trained LLaVA scored by lmms-eval: its data sets, questions and scorers; our batched answers.

lmms-eval is an optional extra: `pip install transformers_radio[lmms]`.
"""

import argparse
import hashlib
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from .answers import AnswerLog, batches, generate
from .data import encode_image

TEXTVQA = "textvqa_val"
# lmms-eval's task -> its metric -> our column: those of the paper's Table 1, and ScienceQA. TextVQA's column names its
# prompt as well, see `lmms_columns`.
LMMS_TASKS = {
    "gqa": {"exact_match": "GQA"},
    TEXTVQA: {"exact_match": "TextVQA"},
    "pope_pop": {"pope_accuracy": "POPE accuracy", "pope_f1_score": "POPE F1"},
    "vqav2_val": {"exact_match": "VQAv2"},
    "scienceqa_img": {"exact_match": "ScienceQA"},
}
# TextVQA as LLaVA-1.5 asks it: the words that an OCR system read in the image stand below the question. lmms-eval
# leaves them out by default, which makes the task harder.
TEXTVQA_WITH_OCR = {
    "task": TEXTVQA,
    "lmms_eval_specific_kwargs": {
        "default": {
            "pre_prompt": "",
            "post_prompt": "\nAnswer the question using a single word or phrase.",
            "ocr": True,
        }
    },
}


@dataclass(frozen=True)
class LmmsTasks:
    """What lmms-eval asks and scores."""

    tasks: list[str]  # of `LMMS_TASKS`
    limit: int | None = None  # only so many questions of each task, for a first try
    # whether TextVQA's prompt holds the OCR tokens, as in LLaVA-1.5 and the paper; False is lmms-eval's own default
    textvqa_ocr: bool = True


def lmms_columns(task: str, textvqa_ocr: bool = True) -> dict[str, str]:
    """lmms-eval's metric -> our column, such as "GQA", "TextVQA (OCR tokens)" or "TextVQA (no OCR tokens)"."""
    prompt = "" if task != TEXTVQA else " (OCR tokens)" if textvqa_ocr else " (no OCR tokens)"
    return {metric: column + prompt for metric, column in LMMS_TASKS[task].items()}


def check_lmms_eval(tasks: list[str]) -> None:
    """Checks that lmms-eval can score these tasks.

    Raises:
        ValueError: a task that is not in `LMMS_TASKS`.
        ImportError: lmms-eval is not installed, or lacks something that it needs.
    """
    unknown = [task for task in tasks if task not in LMMS_TASKS]
    if unknown:
        raise ValueError(f"lmms_eval_tasks has {', '.join(unknown)}; choose from {', '.join(LMMS_TASKS)}.")
    if not tasks:
        return
    try:
        importlib.import_module("lmms_eval.evaluator")
        importlib.import_module("filelock._api")  # lmms-eval itself imports it only when it starts, after the training
    except ImportError as error:
        raise ImportError(
            f"{', '.join(tasks)} are scored by lmms-eval, which is not installed or not whole ({error}): pip install "
            '"transformers_radio[lmms]", or leave them out with lmms_eval_tasks=[].'
        ) from error


def evaluate_lmms(
    llava: LlavaForConditionalGeneration, processor: LlavaProcessor, asked: LmmsTasks, folder: Path, batch_size: int
) -> dict[str, float]:
    """Percentages by column, see `lmms_columns`; an empty dict on all processes but the first.

    Args:
        folder: keeps the answers, so that a killed evaluation resumes where it was, and lmms-eval's own files.

    Raises:
        RuntimeError: lmms-eval gave no value for a metric.
    """
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    results = simple_evaluate(
        model=_lmms_model(llava, processor, folder, batch_size),
        tasks=[dict(TEXTVQA_WITH_OCR) if task == TEXTVQA and asked.textvqa_ocr else task for task in asked.tasks],
        task_manager=TaskManager(model_name="llava_hf"),  # its questions are worded as for LLaVA-1.5
        limit=asked.limit,
        batch_size=batch_size,
        log_samples=False,
        # some scorers write files for their own servers; without a path, into the current folder
        cli_args=argparse.Namespace(output_path=str(folder), process_with_media=True),
    )
    if results is None:
        return {}
    metrics = {}
    for task in asked.tasks:
        for metric, column in lmms_columns(task, asked.textvqa_ocr).items():
            found = [value for key, value in results["results"][task].items() if key.split(",")[0] == metric]
            if len(found) != 1 or not isinstance(found[0], int | float):
                raise RuntimeError(f"lmms-eval gave {found} as {metric} of {task}; expected one number in [0, 1].")
            metrics[column] = 100 * float(found[0])
    return metrics


def _lmms_model(llava: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path, batch_size: int) -> Any:
    """What lmms-eval asks: the LLaVA, with the answers that are in the folder already."""
    from lmms_eval.api.model import lmms

    class RadioLlava(lmms):
        """lmms-eval sets `task_dict`, the data by task and split."""

        device = llava.device

        def generate_until(self, requests: list[Any]) -> list[str]:
            """A request's args: question, settings of generation, document -> images, its index, task, split."""
            quiet = not PartialState().is_main_process
            log = AnswerLog(folder, PartialState().process_index)
            names = [_name(request.args) for request in requests]
            left = {name: request.args for name, request in zip(names, requests, strict=True)}
            left = {name: args for name, args in left.items() if name not in log.answers}
            lengths = {name: args[1].get("max_new_tokens", 64) for name, args in left.items()}
            order = sorted(left, key=lambda name: lengths[name])
            for batch in batches(order, batch_size, "lmms-eval", quiet):
                images = [self.read_image(left[name]) for name in batch]
                questions = [left[name][0] for name in batch]
                replies = generate(llava, processor, images, questions, max(lengths[name] for name in batch))
                log.add(dict(zip(batch, replies, strict=True)))
            return [log.answers[name] for name in names]

        def read_image(self, args: tuple) -> torch.Tensor | None:
            """The pixels of the question's image; None where it has none."""
            _, _, to_images, index, task, split = args
            pictures = to_images(self.task_dict[task][split][index])
            if len(pictures) > 1:
                raise ValueError(f"{task} asks about {len(pictures)} images at once; LLaVA-1.5 reads one.")
            return encode_image(processor, pictures[0].convert("RGB")) if pictures else None

        def loglikelihood(self, requests):
            raise NotImplementedError("These tasks are answered in words; none is scored by likelihood.")

        def generate_until_multi_round(self, requests):
            raise NotImplementedError("These tasks ask one question each.")

    return RadioLlava()


def _name(args: tuple) -> str:
    """A question's id. The number of a document is not enough: versions of lmms-eval word and number differently."""
    question, _, _, index, task, split = args
    return f"{task}/{split}/{index}/{hashlib.blake2b(question.encode(), digest_size=8).hexdigest()}"

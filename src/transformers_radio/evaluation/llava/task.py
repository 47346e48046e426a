"""`eval llava`: LLaVA-1.5 with a student as its vision tower, trained in its two phases and asked about images."""

import gc
import os
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from omegaconf import MISSING
from transformers import AutoConfig, AutoTokenizer, LlavaForConditionalGeneration, LlavaProcessor, set_seed

from transformers_radio.evaluation.models.encoder import count_parameters, load_student
from transformers_radio.evaluation.models.specs import ModelSpec
from transformers_radio.evaluation.paths import fingerprint_checkpoint, path_name
from transformers_radio.evaluation.result import Result, done, result_path, slug, work_folder
from transformers_radio.modeling import RadioModel
from transformers_radio.teachers import digest_weights

from .answers import LlavaQuestions, Question, answer_questions, read_questions
from .data import Conversations, read_conversations
from .lmms import TEXTVQA, check_lmms_eval, evaluate_lmms
from .model import build_llava, check_image_size, check_tokenizer, load_llava
from .scorers import score
from .train import (
    LlavaHardware,
    LlavaPhase,
    check_batch_size,
    claim_folder,
    count_unreadable,
    load_projector,
    train_phase,
)

PHASE_COUNTED = ("learning_rate", "batch_size", "epochs", "warmup", "max_length", "digest")
QUESTIONS_COUNTED = ("scorer", "prompt", "max_new_tokens", "digest")
# What the first phase is known by, the second, and a result.
PRETRAIN_COUNTED = (
    *("weights", "language_model_files", "image_size", "bf16", "seed"),
    *(f"pretrain.{name}" for name in PHASE_COUNTED),
)
FINETUNE_COUNTED = (*PRETRAIN_COUNTED, *(f"finetune.{name}" for name in PHASE_COUNTED))
RESULT_COUNTED = (*FINETUNE_COUNTED, "questions", "lmms_eval", "limit", "lmms_eval_tasks")


@dataclass
class LlavaConfig:
    """Settings of the task; recipes/evaluation/llava.yaml has those of LLaVA-1.5 and the paper."""

    data: str = MISSING  # folder that the paths below start from
    name: str = "LLaVA-1.5"  # of the data, in results
    language_model: str = MISSING  # folder or Hub id of a causal language model
    image_size: int = 432  # longest side in pixels; the aspect ratio stays (paper, section 5.4)
    pretrain: LlavaPhase = field(default_factory=LlavaPhase)  # the projector alone
    finetune: LlavaPhase = field(default_factory=LlavaPhase)  # the projector and the language model
    questions: dict[str, LlavaQuestions] = field(default_factory=dict)  # scored here; name -> file
    lmms_eval_tasks: list[str] = field(default_factory=list)  # scored by lmms-eval; see llava_lmms.LMMS_TASKS
    # TextVQA's prompt holds the words that OCR found, as in LLaVA-1.5 and the paper; false is lmms-eval's default
    textvqa_ocr: bool = True
    lmms_eval_limit: int | None = None  # only so many questions of each, for a first try
    answer_batch_size: int = 16
    max_skipped_share: float = 0.01  # of images that are missing or cannot be read
    seed: int = 0
    hardware: LlavaHardware = field(default_factory=LlavaHardware)
    overwrite: bool = False  # replace the result, and the work that other settings left


@dataclass
class _Data:
    pretrain: Conversations
    finetune: Conversations
    questions: dict[str, tuple[list[Question], str]]


def run(models: list[str], config: LlavaConfig, output: Path) -> list[Result]:
    """One `Result` a model: what each set of questions scores, in percent.

    A model is a student. A killed run goes on where it was, within a phase or among the questions. The trained LLaVA
    stays at OUTPUT/<model>/llava.<name>/finetune/llava. Under `accelerate launch` every process calls this.

    Raises:
        FileNotFoundError, ValueError, OSError: data, settings or a model that cannot be used; before the first step.
        ImportError: lmms-eval is wanted and not installed.
    """
    data = _check(config)
    students = {ModelSpec.parse(model): _load_student(model, config.image_size) for model in models}
    return [_measure(spec.title, str(spec), student, config, data, output) for spec, student in students.items()]


def _check(config: LlavaConfig) -> _Data:
    check_lmms_eval(config.lmms_eval_tasks)
    if not config.questions and not config.lmms_eval_tasks:
        raise ValueError("There is nothing to ask: name a file in questions, or a task in lmms_eval_tasks.")
    AutoConfig.from_pretrained(config.language_model)
    check_tokenizer(AutoTokenizer.from_pretrained(config.language_model), config.language_model)
    root = Path(config.data)
    for phase in (config.pretrain, config.finetune):
        check_batch_size(phase, config.hardware, PartialState().num_processes)
    pretrain, finetune = (
        read_conversations(root / phase.conversations, root / phase.images, config.max_skipped_share)
        for phase in (config.pretrain, config.finetune)
    )
    questions = {
        name: read_questions(root / one.questions, root / one.images, one.scorer)
        for name, one in config.questions.items()
    }
    return _Data(pretrain, finetune, questions)


def _load_student(spec: str, image_size: int) -> RadioModel:
    parsed = ModelSpec.parse(spec)
    if not parsed.is_student:
        raise ValueError(f"{spec} is no student, so it cannot be the vision tower of this LLaVA.")
    student = load_student(parsed.checkpoint)
    check_image_size(student, image_size)
    return student


def _measure(name: str, spec: str, student: RadioModel, config: LlavaConfig, data: _Data, output: Path) -> Result:
    pretrain = {
        "model": spec,
        "weights": digest_weights(student),
        "language_model": config.language_model,
        "language_model_files": fingerprint_checkpoint(config.language_model),
        "image_size": config.image_size,
        "pretrain": _phase_settings(config.pretrain, data.pretrain),
        "bf16": config.hardware.bf16,
        "seed": config.seed,
    }
    finetune = {**pretrain, "finetune": _phase_settings(config.finetune, data.finetune)}
    asked = {key: _asked({**asdict(one), "digest": data.questions[key][1]}) for key, one in config.questions.items()}
    lmms = {"lmms_eval": version("lmms_eval"), "limit": config.lmms_eval_limit} if config.lmms_eval_tasks else {}
    settings = {**finetune, "questions": asked, **lmms, "lmms_eval_tasks": list(config.lmms_eval_tasks)}
    if TEXTVQA in config.lmms_eval_tasks:
        settings["textvqa_ocr"] = config.textvqa_ocr
    path = result_path(output, name, "llava", config.name)

    def before(there: dict[str, Any]) -> dict[str, Any]:
        files = {"language_model_files": pretrain["language_model_files"]}
        model = there.get("language_model", "")  # earlier versions knew it by its place alone
        is_moved = not os.path.exists(model) and path_name(model) == path_name(config.language_model)
        is_same = "language_model_files" not in there and (model == config.language_model or is_moved)
        questions = there.get("questions", {})  # of a result by name, of a folder of answers its own
        named = {key: _asked(one) for key, one in questions.items() if isinstance(one, dict)}
        return {**there, **(files if is_same else {}), "questions": named or _asked(questions)}

    finished = done(path, settings, RESULT_COUNTED, config.overwrite, before)
    if finished is not None:
        return finished

    work = work_folder(path)
    claim_folder(work / "pretrain", pretrain, PRETRAIN_COUNTED, config.overwrite, before)
    claim_folder(work / "finetune", finetune, FINETUNE_COUNTED, config.overwrite, before)
    for key in asked:
        own = {**finetune, "questions": asked[key]}
        claim_folder(work / "answers" / slug(key), own, (*FINETUNE_COUNTED, "questions"), config.overwrite, before)
    if lmms:
        claim_folder(work / "lmms", {**finetune, **lmms}, (*FINETUNE_COUNTED, *lmms), config.overwrite, before)
    folder = _train(student, config, data, work)

    llava, processor = load_llava(str(folder), torch.bfloat16 if config.hardware.bf16 else torch.float32)
    llava.to(PartialState().device)  # type: ignore[arg-type]
    metrics: dict[str, float] = {}
    for key, one in config.questions.items():
        questions = data.questions[key][0]
        answers = answer_questions(
            llava, processor, questions, one, work / "answers" / slug(key), config.answer_batch_size, f"{name} {key}"
        )
        metrics |= score(one.scorer, key, answers, [question.answers for question in questions])
    if config.lmms_eval_tasks:
        metrics |= evaluate_lmms(
            llava,
            processor,
            config.lmms_eval_tasks,
            work / "lmms",
            config.answer_batch_size,
            config.lmms_eval_limit,
            config.textvqa_ocr,
        )
    counts = {f"{key} questions": len(data.questions[key][0]) for key in config.questions}
    for phase, conversations in (("pretrain", data.pretrain), ("finetune", data.finetune)):
        counts[f"{phase} examples"] = len(conversations.examples)
        counts[f"{phase} missing images"] = conversations.missing
        counts[f"{phase} unreadable images"] = count_unreadable(work / phase)
    language_model = ModelSpec.parse(config.language_model).title
    result = Result(
        "llava",
        name,
        config.name,
        metrics,
        f"LLaVA-1.5 with {language_model}, projector and then language model trained, tower frozen; longest side "
        f"{config.image_size} px, aspect kept, patch tokens of the last layer; greedy answers{_prompts(config)}",
        settings,
        counts,
        count_parameters(student) - count_parameters(student.adaptors),
        config.image_size,
    )
    return result.write(path) if PartialState().is_main_process else result


def _prompts(config: LlavaConfig) -> str:
    """What a question's prompt held beside the question, for the protocol line."""
    if TEXTVQA not in config.lmms_eval_tasks:
        return ""
    return f"; TextVQA {'with' if config.textvqa_ocr else 'without'} OCR tokens in the prompt"


def _build(student: RadioModel, config: LlavaConfig) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    set_seed(config.seed)  # of the projector's first weights
    return build_llava(student, config.language_model, config.image_size)


def _asked(settings: dict[str, Any]) -> dict[str, Any]:
    """Of the settings of questions those that answers and scores depend on."""
    return {name: settings[name] for name in QUESTIONS_COUNTED if name in settings}


def _phase_settings(phase: LlavaPhase, data: Conversations) -> dict[str, Any]:
    return {**{key: value for key, value in asdict(phase).items() if key != "save_steps"}, "digest": data.digest}


def _train(student: RadioModel, config: LlavaConfig, data: _Data, work: Path) -> Path:
    """Both phases, or what is left of them; the folder of the trained LLaVA."""
    trained = work / "finetune" / "llava"
    if trained.exists():
        return trained
    rest = (config.hardware, config.max_skipped_share, config.seed)
    llava, processor = _build(student, config)
    projector = work / "pretrain" / "projector"
    if not projector.exists():
        train_phase(llava, processor, data.pretrain, config.pretrain, work / "pretrain", True, *rest)
        # Built again, so that the second phase begins alike whether or not the first one ran in this process; and
        # the first one's optimizer makes room for it.
        del llava
        gc.collect()
        torch.cuda.empty_cache()
        llava, processor = _build(student, config)
    load_projector(llava, projector)
    return train_phase(llava, processor, data.finetune, config.finetune, work / "finetune", False, *rest)

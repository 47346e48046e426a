"""`eval llava`: LLaVA-1.5 with a student as its vision tower, trained in its two phases and asked about images."""

import gc
import os
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoTokenizer, LlavaForConditionalGeneration, LlavaProcessor, set_seed

from transformers_radio.evaluation.models.encoder import count_parameters, load_student
from transformers_radio.evaluation.models.specs import ModelSpec
from transformers_radio.evaluation.paths import fingerprint_checkpoint, path_name
from transformers_radio.evaluation.result import slug
from transformers_radio.evaluation.task import Job, Measured, Task
from transformers_radio.evaluation.workspace import claim_folder
from transformers_radio.modeling import RadioModel
from transformers_radio.teachers import digest_weights

from .answers import answer_questions, read_questions
from .config import LlavaConfig, LlavaPhase
from .data import Conversations, read_conversations
from .lmms import TEXTVQA, LmmsTasks, check_lmms_eval, evaluate_lmms
from .model import build_llava, check_image_size, check_tokenizer, load_llava
from .scorers import score
from .train import PhaseWork, check_batch_size, count_unreadable, load_projector, train_phase

PHASE_COUNTED = ("learning_rate", "batch_size", "epochs", "warmup", "max_length", "digest")
QUESTIONS_COUNTED = ("scorer", "prompt", "max_new_tokens", "digest")
# What the first phase and the second are known by.
PRETRAIN_COUNTED = (
    *("weights", "language_model_files", "image_size", "bf16", "seed"),
    *(f"pretrain.{name}" for name in PHASE_COUNTED),
)
FINETUNE_COUNTED = (*PRETRAIN_COUNTED, *(f"finetune.{name}" for name in PHASE_COUNTED))
LMMS_SETTINGS = ("lmms_eval", "limit")


class Llava(Task):
    """What each set of questions scores, in percent.

    A model is a student. A killed run resumes where it was, within a phase or among the questions. The trained LLaVA
    stays at OUTPUT/<model>/llava.<name>/finetune/llava.

    Raises:
        FileNotFoundError, ValueError, OSError: data, settings or a model that cannot be used; before the first step.
        ImportError: lmms-eval is wanted and not installed.
    """

    name = "llava"
    config_class = LlavaConfig
    config: LlavaConfig
    counted = (*FINETUNE_COUNTED, "questions", *LMMS_SETTINGS, "lmms_eval_tasks", "textvqa_ocr")
    several_processes = True
    columns = ("*",)
    without_column = (" precision", " recall", " yes")  # of yes-or-no questions; their F1 sums these up
    hub_task = ("visual-question-answering", "Visual question answering with LLaVA-1.5")
    hub_metrics = {"F1": "f1", "precision": "precision", "recall": "recall", "yes": "yes_ratio"}

    def open(self, models: list[str]) -> list[Job]:
        config = self.config
        check_lmms_eval(config.lmms_eval_tasks)
        if not config.questions and not config.lmms_eval_tasks:
            raise ValueError("There is nothing to ask: name a file in questions, or a task in lmms_eval_tasks.")
        AutoConfig.from_pretrained(config.language_model)
        check_tokenizer(AutoTokenizer.from_pretrained(config.language_model), config.language_model)
        self.language_model_files = fingerprint_checkpoint(config.language_model)
        self.pretrain, self.finetune = map(self._read_phase, (config.pretrain, config.finetune))
        root = Path(config.data)
        self.questions = {
            name: read_questions(root / one.questions, root / one.images, one.scorer)
            for name, one in config.questions.items()
        }
        return [self._job(spec) for spec in models]

    def recognized(self, settings: dict[str, Any]) -> dict[str, Any]:
        found = dict(settings)
        language_model = self.config.language_model
        place = settings.get("language_model", "")  # earlier versions knew the language model by its place alone
        is_moved = not os.path.exists(place) and path_name(place) == path_name(language_model)
        if "language_model_files" not in settings and (place == language_model or is_moved):
            found["language_model_files"] = self.language_model_files
        if TEXTVQA in settings.get("lmms_eval_tasks", []):
            found.setdefault("textvqa_ocr", False)  # lmms-eval's default, before there was the setting
        questions = settings.get("questions", {})  # by name in a result; in a folder of answers its own
        named = {name: _counted_of(one) for name, one in questions.items() if isinstance(one, dict)}
        return {**found, "questions": named or _counted_of(questions)}

    def measure(self, job: Job, folder: Path) -> Measured:
        config = self.config
        self._claim_folders(job, folder)
        trained = self._train(job.encoder, folder)
        llava, processor = load_llava(str(trained), torch.bfloat16 if config.hardware.bf16 else torch.float32)
        llava.to(PartialState().device)  # type: ignore[arg-type]
        metrics: dict[str, float] = {}
        for name, one in config.questions.items():
            questions = self.questions[name][0]
            answers = answer_questions(
                llava, processor, questions, one, folder / "answers" / slug(name), config.answer_batch_size
            )
            metrics |= score(one.scorer, name, answers, [question.answers for question in questions])
        if config.lmms_eval_tasks:
            tasks = LmmsTasks(config.lmms_eval_tasks, config.lmms_eval_limit, config.textvqa_ocr)
            metrics |= evaluate_lmms(llava, processor, tasks, folder / "lmms", config.answer_batch_size)
        return Measured(metrics, self._protocol(), self._counts(folder))

    def _read_phase(self, phase: LlavaPhase) -> Conversations:
        config, root = self.config, Path(self.config.data)
        check_batch_size(phase, config.hardware, PartialState().num_processes)
        return read_conversations(root / phase.conversations, root / phase.images, config.max_skipped_share)

    def _job(self, model: str) -> Job:
        config = self.config
        spec = ModelSpec.parse(model)
        if not spec.is_student:
            raise ValueError(f"{model} is not a student, so it cannot be the vision tower of this LLaVA.")
        student = load_student(spec.checkpoint)
        check_image_size(student, config.image_size)
        settings = {
            "model": str(spec),
            "weights": digest_weights(student),
            "language_model": config.language_model,
            "language_model_files": self.language_model_files,
            "image_size": config.image_size,
            "pretrain": _phase_settings(config.pretrain, self.pretrain),
            "bf16": config.hardware.bf16,
            "seed": config.seed,
            "finetune": _phase_settings(config.finetune, self.finetune),
            "questions": {
                name: _counted_of({**asdict(one), "digest": self.questions[name][1]})
                for name, one in config.questions.items()
            },
            "lmms_eval_tasks": list(config.lmms_eval_tasks),
        }
        if config.lmms_eval_tasks:
            settings |= {"lmms_eval": version("lmms_eval"), "limit": config.lmms_eval_limit}
        if TEXTVQA in config.lmms_eval_tasks:
            settings["textvqa_ocr"] = config.textvqa_ocr
        params = count_parameters(student) - count_parameters(student.adaptors)
        return Job(spec.title, config.name, "student", student, settings, params, config.image_size)

    def _claim_folders(self, job: Job, folder: Path) -> None:
        """Each phase, each set of questions and lmms-eval has its own work folder and settings."""
        asked = ("finetune", "questions", "lmms_eval_tasks", "textvqa_ocr", *LMMS_SETTINGS)
        pretrain = {name: value for name, value in job.settings.items() if name not in asked}
        finetune = {**pretrain, "finetune": job.settings["finetune"]}
        parts = {"pretrain": (pretrain, PRETRAIN_COUNTED), "finetune": (finetune, FINETUNE_COUNTED)}
        for name, questions in job.settings["questions"].items():
            own = {**finetune, "questions": questions}
            parts[f"answers/{slug(name)}"] = (own, (*FINETUNE_COUNTED, "questions"))
        if self.config.lmms_eval_tasks:
            lmms = {name: job.settings[name] for name in LMMS_SETTINGS}
            parts["lmms"] = ({**finetune, **lmms}, (*FINETUNE_COUNTED, *LMMS_SETTINGS))
        for part, (settings, counted) in parts.items():
            claim_folder(folder / part, settings, counted, self.config.overwrite, self.recognized)

    def _train(self, student: RadioModel, folder: Path) -> Path:
        """Both phases, or what is left of them; returns the folder of the trained LLaVA."""
        config = self.config
        trained = folder / "finetune" / "llava"
        if trained.exists():
            return trained
        common = (config.hardware, config.max_skipped_share, config.seed)
        pretrain = PhaseWork(config.pretrain, self.pretrain, folder / "pretrain", projector_only=True)
        finetune = PhaseWork(config.finetune, self.finetune, folder / "finetune", projector_only=False)
        llava, processor = self._build(student)
        if not pretrain.result.exists():
            train_phase(llava, processor, pretrain, *common)
            # Built again, so that the second phase begins alike whether or not the first one ran in this process; and
            # the first one's optimizer makes room for it.
            del llava
            gc.collect()
            torch.cuda.empty_cache()
            llava, processor = self._build(student)
        load_projector(llava, pretrain.result)
        return train_phase(llava, processor, finetune, *common)

    def _build(self, student: RadioModel) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
        set_seed(self.config.seed)  # for the projector's first weights
        return build_llava(student, self.config.language_model, self.config.image_size)

    def _protocol(self) -> str:
        config = self.config
        prompts = ""
        if TEXTVQA in config.lmms_eval_tasks:
            prompts = f"; TextVQA {'with' if config.textvqa_ocr else 'without'} OCR tokens in the prompt"
        return (
            f"LLaVA-1.5 with {ModelSpec.parse(config.language_model).title}, projector and then language model "
            f"trained, tower frozen; longest side {config.image_size} px, aspect kept, patch tokens of the last "
            f"layer; greedy answers{prompts}"
        )

    def _counts(self, folder: Path) -> dict[str, int]:
        counts = {f"{name} questions": len(questions) for name, (questions, _) in self.questions.items()}
        for phase, conversations in (("pretrain", self.pretrain), ("finetune", self.finetune)):
            counts[f"{phase} examples"] = len(conversations.examples)
            counts[f"{phase} missing images"] = conversations.missing
            counts[f"{phase} unreadable images"] = count_unreadable(folder / phase)
        return counts


def _counted_of(questions: dict[str, Any]) -> dict[str, Any]:
    """Those settings of a set of questions that answers and scores depend on."""
    return {name: questions[name] for name in QUESTIONS_COUNTED if name in questions}


def _phase_settings(phase: LlavaPhase, data: Conversations) -> dict[str, Any]:
    return {**{name: value for name, value in asdict(phase).items() if name != "save_steps"}, "digest": data.digest}

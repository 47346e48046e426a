"""The two phases of LLaVA-1.5 on transformers' Trainer: first the projector alone, then the language model with it.

FOLDER/                one phase
  settings.json        what it is trained with; other settings are refused
  checkpoint-N/        the Trainer's own; a killed phase resumes from the newest whole one
  unreadable.txt       images that could not be read; every start and epoch adds them again
  projector/           the result of the first phase: model.safetensors
  llava/               the result of the second: a LLaVA with its processor
"""

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration, LlavaProcessor, Trainer, TrainingArguments

from transformers_radio.disk import remove, replace_whole

from .config import LlavaHardware, LlavaPhase
from .data import Conversations, LlavaCollator, LlavaDataset

logger = logging.getLogger(__name__)


class LlavaTrainer(Trainer):
    """A Trainer whose checkpoints really bring the weights back.

    A LLaVA's weights have other names in its files than in memory. The Trainer reads a checkpoint by the names in
    memory and ignores missing ones, so it would continue with the fresh model.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if self.is_fsdp_enabled:  # FSDP's own files have the names in memory
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = LlavaForConditionalGeneration.from_pretrained(resume_from_checkpoint, dtype=torch.float32)
        target: Any = self.model if model is None else model
        target.load_state_dict(saved.state_dict())  # strict: nothing may be missing


@dataclass(frozen=True)
class PhaseWork:
    """A phase with its data and its folder.

    The first phase (`projector_only`) sees images and captions alone, the second conversations in the chat template.
    """

    settings: LlavaPhase
    data: Conversations
    folder: Path
    projector_only: bool

    @property
    def result(self) -> Path:
        return self.folder / ("projector" if self.projector_only else "llava")


def train_phase(
    llava: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    work: PhaseWork,
    hardware: LlavaHardware,
    max_skipped_share: float,
    seed: int,
) -> Path:
    """Trains, or resumes from the newest whole checkpoint in the folder; returns the folder of the result.

    The loss is on captions and answers. The tower is frozen in both phases. Call it on all processes.

    Raises:
        ValueError: a batch size that the processes cannot share, too many unreadable images.
    """
    if work.result.exists():
        return work.result
    state = PartialState()
    check_batch_size(work.settings, hardware, state.num_processes)
    llava.requires_grad_(not work.projector_only)
    llava.model.vision_tower.requires_grad_(False)
    llava.model.multi_modal_projector.requires_grad_(True)
    dataset = LlavaDataset(
        work.data.examples,
        processor,
        plain=work.projector_only,
        max_length=work.settings.max_length,
        unreadable=work.folder / "unreadable.txt",
        max_skipped_share=max_skipped_share,
    )
    arguments = _arguments(work, hardware, seed)
    trainer = LlavaTrainer(llava, arguments, train_dataset=dataset, data_collator=LlavaCollator(processor))
    checkpoint = newest_checkpoint(work.folder)
    if checkpoint is not None:
        logger.warning("%s resumes from %s", work.folder, checkpoint.name)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    _save_result(trainer, processor, work)
    return work.result


def _arguments(work: PhaseWork, hardware: LlavaHardware, seed: int) -> TrainingArguments:
    phase = work.settings
    at_once = hardware.per_device_batch_size * PartialState().num_processes
    return TrainingArguments(
        output_dir=str(work.folder),
        learning_rate=phase.learning_rate,
        per_device_train_batch_size=hardware.per_device_batch_size,
        gradient_accumulation_steps=phase.batch_size // at_once,
        num_train_epochs=phase.epochs,
        lr_scheduler_type="cosine",
        warmup_steps=phase.warmup,  # below 1 it is a share
        weight_decay=0.0,
        bf16=hardware.bf16,
        gradient_checkpointing=hardware.gradient_checkpointing,
        dataloader_num_workers=hardware.num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=hardware.log_steps,
        save_steps=phase.save_steps,
        save_total_limit=2,  # one to fall back on when the newest is half written
        seed=seed,
        report_to="none",
        remove_unused_columns=False,
    )


def _save_result(trainer: LlavaTrainer, processor: LlavaProcessor, work: PhaseWork) -> None:
    """Writes what the phase has trained, and deletes the checkpoints, which are of no use afterwards."""
    state = PartialState()
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # of all shards: on all processes
    if state.is_main_process:
        with replace_whole(work.result) as temporary:
            remove(temporary)  # what a kill has left
            temporary.mkdir()
            if work.projector_only:
                prefix = "model.multi_modal_projector."
                projector = {
                    name.removeprefix(prefix): tensor.detach().cpu().contiguous()
                    for name, tensor in weights.items()
                    if name.startswith(prefix)
                }
                save_file(projector, temporary / "model.safetensors")
            else:
                trainer.accelerator.unwrap_model(trainer.model).save_pretrained(temporary, state_dict=weights)
                processor.save_pretrained(temporary)
        for path in work.folder.glob("checkpoint-*"):
            shutil.rmtree(path)
    state.wait_for_everyone()


def load_projector(llava: LlavaForConditionalGeneration, folder: Path) -> None:
    """Puts the projector that the first phase left in `folder` into a LLaVA."""
    llava.model.multi_modal_projector.load_state_dict(load_file(folder / "model.safetensors"))


def check_batch_size(phase: LlavaPhase, hardware: LlavaHardware, processes: int) -> None:
    """ValueError unless a batch is a whole number of what the processes take at once."""
    at_once = hardware.per_device_batch_size * processes
    if phase.batch_size < 1 or at_once < 1 or phase.batch_size % at_once:
        raise ValueError(
            f"batch_size is {phase.batch_size}; expected a multiple of {hardware.per_device_batch_size} examples on "
            f"each of {processes} processes: change hardware.per_device_batch_size or the number of processes."
        )


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end. The Trainer writes its state last."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            return path
        except (OSError, json.JSONDecodeError):
            logger.warning("%s was not written to its end and is not used", path)
    return None


def count_unreadable(folder: Path) -> int:
    """Images of a phase that could not be read."""
    file = folder / "unreadable.txt"
    return len(set(file.read_text(encoding="utf-8").splitlines())) if file.exists() else 0

"""One stage of a run: what it trains and reads, and one step of it."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed

from transformers_radio.data import ImageStream
from transformers_radio.teachers import TeacherOutput
from transformers_radio.training.phi_s.statistics import standardize_teachers
from transformers_radio.training.run.checkpoint import load_training, load_weights, save_checkpoint
from transformers_radio.training.run.log import FiniteCheck, Log, TermSums
from transformers_radio.training.run.state import Run
from transformers_radio.training.stability.batch_norm import BatchNorms
from transformers_radio.training.stability.ema import EMA
from transformers_radio.training.stability.spectral import power_steps

from .distill import Distillation, build_distillation, teacher_targets
from .groups import Group, passes_in_step
from .losses import Term
from .optimizer import build_optimizer, start_schedule
from .streams import open_stream, resume_stream, to_device


class Stage:
    """A stage at its first step or as a checkpoint left it: model, optimizer, schedule, average, streams and log.

    Attributes:
        first_step, last_step: the run's step from which the stage starts, and the one after which it ends.
        groups: those that this process serves.
        model: the `Distillation` as Accelerate wrapped it.
        distillation: the same, unwrapped.
        transforms: teacher -> PHI-S of its features, where the recipe standardizes them.
        streams: group -> its images.
    """

    def __init__(self, run: Run, name: str):
        recipe, accelerator, state = run.recipe, run.accelerator, run.state
        self.run, self.name, self.recipe = run, name, recipe.stages[name]
        self.last_step = run.last_step(name)
        self.first_step = self.last_step - self.recipe.steps
        self.groups = [group for group in run.groups[name] if group.index is not None]
        self.transforms, state.statistics = standardize_teachers(run, run.groups_until(name))
        run.release_teachers(name)

        resumes = state.stage == name
        model = build_distillation(recipe, name, run.student)
        if run.checkpoint is not None:
            load_weights(run.checkpoint, model, same_stage=resumes)
        optimizer = build_optimizer(model, recipe, self.recipe)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.distillation: Distillation = accelerator.unwrap_model(self.model)
        together = {group.name: group.ranks for group in run.groups[name] if self.recipe.batch_norm == "sync"}
        self.batch_norms = BatchNorms(self.distillation, together)
        self.schedule = start_schedule(self.optimizer.optimizer, self.recipe)
        self.ema = EMA(self.distillation, recipe.ema_decay) if recipe.ema_decay else None
        # From here on every process draws its own position crops.
        set_seed(recipe.seed + self.first_step, device_specific=True)
        if run.checkpoint is not None and resumes:
            load_training(run, self.model, self.optimizer.optimizer, self.ema)
            # earlier versions had more groups of weights, all with the same rate
            rates = self.schedule.base_lrs
            self.schedule.load_state_dict({**state.schedule, "base_lrs": rates, "lr_lambdas": [None] * len(rates)})

        self.streams = {group.name: self._open_stream(group, resumes) for group in self.groups}
        self.batches = {name: iter(stream) for name, stream in self.streams.items()}
        self.model.train()
        self.terms = self.distillation.balancing.terms
        self.log = Log(run, self.terms)
        self.finite = FiniteCheck([*map(str, self.terms), "gradient norm"], accelerator.device)

    def _open_stream(self, group: Group, same_stage: bool) -> ImageStream:
        stream = open_stream(self.run.recipe, group, group.sides(self.run.shapes))
        position = self.run.state.streams.get(group.name)
        if position is not None:
            resume_stream(stream, position, self.run.recipe, group, same_stage)
        return stream

    def train_step(self) -> None:
        """One optimizer step: the passes of all groups whose turn it is."""
        if self.run.recipe.student.spectral_reparam:
            power_steps(self.distillation.student)
        sums = TermSums(self.terms, self.run.accelerator)
        passes = self.passes()
        for number, group in enumerate(passes, start=1):
            # Gradients are reduced once, in the last pass.
            with nullcontext() if number == len(passes) else self.run.accelerator.no_sync(self.model):
                sums.add(self.forward_backward(group))
        self.update_weights(sums)
        self.log.add(sums)
        self.run.state.step += 1
        self.run.progress.update()

    def passes(self) -> list[Group | None]:
        """The group of each forward pass of this process in the coming step; None for passes without images.

        Every process needs a pass, in which the gradients are reduced. Sharded weights are gathered in every pass, so
        that all processes run equally many.
        """
        accelerator, step = self.run.accelerator, self.run.state.step - self.first_step
        passes = [group for group in self.groups if group.takes_part(step) for _ in range(group.passes)]
        everyone = range(accelerator.num_processes)
        most = max(passes_in_step(self.run.groups[self.name], rank, step) for rank in everyone)
        idle = most - len(passes) if accelerator.is_fsdp2 else int(not passes)
        return [*passes, *[None] * idle]

    def forward_backward(self, group: Group | None) -> dict[Term, torch.Tensor]:
        """One pass, whose gradients are added to those there are. Returns term -> unweighted losses (B,)."""
        run, accelerator, student = self.run, self.run.accelerator, self.distillation.student
        targets: dict[str, TeacherOutput] = {}
        if group is None:
            side = self.groups[0].resolution
            pixels, weight, options = torch.zeros(1, 3, side, side, device=accelerator.device), 0.0, {}
        else:
            with self.log.waiting():
                batch = next(self.batches[group.name])
            images = to_device(batch, accelerator.device)
            pixels, weight = images[group.resolution], group.image_weight
            teachers = {name: run.teachers[name] for name in group.teachers}
            targets = teacher_targets(teachers, images, self.transforms, batch.keys, run.caches)
            # Drawn for the whole group, as they decide how long a pass takes.
            generator = group.generator(run.recipe.seed, run.state.step)
            sizes = group.input_sizes(student.min_resolution_step)
            size = sizes[int(torch.randint(len(sizes), (), generator=generator))] if len(sizes) > 1 else sizes[0]
            if size != pixels.shape[2:]:
                pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
            options = student.training_options(*size, generator)
            self.log.images += len(pixels)
        self.batch_norms.begin_pass(None if group is None else group.name)
        with accelerator.autocast():
            totals, losses = self.model(pixels, targets, **options)  # (B,), term -> (B,)
        loss = weight * totals.sum()
        # The processes' gradients are averaged, but their losses are parts of one sum.
        accelerator.backward(loss * accelerator.num_processes)
        self.log.loss += loss.detach()
        return losses

    def update_weights(self, sums: TermSums) -> None:
        """The optimizer's step, and all that follows the weights: schedule, average, balancing.

        Args:
            sums: of this process's losses in the step.
        """
        accelerator, step = self.run.accelerator, self.run.state.step + 1
        self.grad_norm = accelerator.clip_grad_norm_(self.model.parameters(), self.run.recipe.optimizer.max_grad_norm)
        self.finite.check()
        self.finite.put(step, sums.sums[0], self.grad_norm, scaled=accelerator.scaler is not None)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.batch_norms.update()
        if not accelerator.optimizer_step_was_skipped:  # fp16: the scaler found an overflow
            self.schedule.step()
            if self.ema is not None:
                self.ema.update(self.schedule.last_epoch)
        self.distillation.balancing.update(sums.means)

    def is_due(self, every_steps: int) -> bool:
        """Whether it is time for what is done every so many steps and at the end of the stage."""
        step = self.run.state.step
        return step % every_steps == 0 or step == self.last_step

    def write_log(self) -> None:
        self.finite.check()
        skipped = sum(sum(stream.skipped.values()) for stream in self.streams.values())
        learning_rate = float(max(self.schedule.get_last_lr()))
        self.log.write(self.name, learning_rate, self.grad_norm, skipped)

    def save(self) -> None:
        """Writes the checkpoint of this step, on all processes together."""
        run = self.run
        self.finite.check()
        if run.caches is not None:
            run.caches.flush()  # before the checkpoint: the outputs that it has seen are on the disk
        run.state.stage, run.state.schedule = self.name, self.schedule.state_dict()
        positions = {name: stream.state_dict() for name, stream in self.streams.items()}
        save_checkpoint(run, self.model, self.optimizer.optimizer, self.ema, self.transforms, positions)

    def close(self) -> None:
        for stream in self.streams.values():
            stream.close()

"""AdamW's parameter groups and the learning-rate schedule (paper section 4)."""

import torch
from transformers import get_cosine_schedule_with_warmup

from .distill import Distillation
from .recipe import Recipe, StageRecipe

# What learns in the first steps of a stage with `freeze_trunk_steps`.
HEADS = ("student.adaptors.", "balancing.")


def build_optimizer(model: Distillation, recipe: Recipe, stage: StageRecipe) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only: none on norms, biases, the balancing, and what the student excludes.

    Args:
        model: before it is wrapped; the names of its parameters tell the trunk from the heads.
    """
    decay = recipe.optimizer.weight_decay if stage.weight_decay is None else stage.weight_decay
    excluded = {f"student.{name}" for name in model.student.no_weight_decay()}
    groups: dict[tuple[bool, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            bare = parameter.ndim < 2 or name in excluded or name.startswith("balancing.")
            groups.setdefault((not name.startswith(HEADS), 0.0 if bare else decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": weight_decay, "trunk": trunk}
            for (trunk, weight_decay), parameters in groups.items()
        ],
        lr=stage.learning_rate or recipe.optimizer.learning_rate,
        betas=(recipe.optimizer.beta1, recipe.optimizer.beta2),
        eps=recipe.optimizer.eps,
        fused=True,  # one pass over the weights: a third of the time on a CPU
    )


def start_schedule(optimizer: torch.optim.Optimizer, stage: StageRecipe) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then cosine to zero over the stage; the trunk's rate is zero while it is frozen.

    A frozen trunk does not move, but AdamW's moments of it are gathered already, as in a warm-up.
    """
    schedule = get_cosine_schedule_with_warmup(optimizer, stage.warmup_steps, stage.steps)
    curve = schedule.lr_lambdas[0]

    def trunk(step: int) -> float:
        return curve(step) if step >= stage.freeze_trunk_steps else 0.0

    schedule.lr_lambdas = [trunk if group["trunk"] else curve for group in optimizer.param_groups]
    for group, scale in zip(optimizer.param_groups, schedule.lr_lambdas, strict=True):
        group["lr"] = group["initial_lr"] * scale(schedule.last_epoch)
    return schedule

"""AdamW's parameter groups and the learning-rate schedule (paper section 4)."""

import torch
from transformers import get_cosine_schedule_with_warmup

from .recipe import OptimizerRecipe, StageRecipe

# Tokens and the position table are inputs, not maps between spaces: decay would pull them to zero.
UNDECAYED = ("cls_register_token", "position_embedding")


def build_optimizer(student: torch.nn.Module, recipe: OptimizerRecipe) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only: none on tokens, position table, norms and biases."""
    decayed: list[torch.nn.Parameter] = []
    undecayed: list[torch.nn.Parameter] = []
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            bare = parameter.ndim < 2 or name.endswith(UNDECAYED)
            (undecayed if bare else decayed).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": recipe.weight_decay},
            {"params": undecayed, "weight_decay": 0.0},
        ],
        lr=recipe.learning_rate,
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.eps,
    )


def start_schedule(
    optimizer: torch.optim.Optimizer, stage: StageRecipe, learning_rate: float
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then cosine to zero over the stage. Every stage starts again at the base learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = learning_rate
    return get_cosine_schedule_with_warmup(optimizer, stage.warmup_steps, stage.steps)

import math

import pytest
import torch

from transformers_radio.modeling import RadioConfig, RadioModel
from transformers_radio.training.balancing import NaiveBalancing
from transformers_radio.training.distill import Distillation
from transformers_radio.training.optimizer import build_optimizer, start_schedule
from transformers_radio.training.recipe import LossRecipe, OptimizerRecipe, Recipe, StageRecipe


def test_tokens_position_table_norms_and_biases_are_not_decayed():
    adaptors = {"clip": {"summary_dim": 4, "feature_dim": 4, "hidden_dim": 8}}
    config = RadioConfig.from_size(
        "vit-ti-16", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, adaptors=adaptors
    )
    student = RadioModel(config)
    model = Distillation(student, NaiveBalancing([]), LossRecipe())
    recipe = Recipe(optimizer=OptimizerRecipe(weight_decay=0.02))
    optimizer = build_optimizer(model, recipe, StageRecipe(steps=1, resolution=16))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    decayed = {name for name, p in student.named_parameters() if decay[id(p)] > 0}
    assert set(decay.values()) == {0.02, 0.0} and len(decay) == len(list(student.parameters()))
    matrices = {
        name for name, module in student.named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }
    assert decayed == {f"{name}.weight" for name in matrices}
    stage = StageRecipe(steps=1, resolution=16, weight_decay=0.5)  # a stage may have its own
    assert {group["weight_decay"] for group in build_optimizer(model, recipe, stage).param_groups} == {0.5, 0.0}


def test_the_schedule_warms_up_and_falls_as_a_cosine():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([weight], lr=1e-3, weight_decay=0.1)
    schedule = start_schedule(optimizer, StageRecipe(steps=10, resolution=16, warmup_steps=2))
    rates = []
    for step in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        weight.grad = torch.ones(1)
        optimizer.step()
        schedule.step()
        assert (weight.item() == 1) == (step == 0)  # the first rate of a warm-up is 0
    cosine = [1e-3 * 0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
    assert rates == pytest.approx([0.0, 0.5e-3, *cosine])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0)

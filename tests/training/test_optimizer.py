import math

import pytest
import torch

from transformers_radio.modeling import RadioConfig, RadioModel
from transformers_radio.training.optimizer import build_optimizer, start_schedule
from transformers_radio.training.recipe import OptimizerRecipe, StageRecipe


def test_tokens_position_table_norms_and_biases_are_not_decayed():
    adaptors = {"clip": {"summary_dim": 4, "feature_dim": 4, "hidden_dim": 8}}
    config = RadioConfig.from_size(
        "vit-ti-16", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, adaptors=adaptors
    )
    student = RadioModel(config)
    optimizer = build_optimizer(student, OptimizerRecipe(weight_decay=0.02))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    decayed = {name for name, p in student.named_parameters() if decay[id(p)] > 0}
    assert set(decay.values()) == {0.02, 0.0} and len(decay) == len(list(student.parameters()))
    matrices = {
        name for name, module in student.named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }
    assert decayed == {f"{name}.weight" for name in matrices}


def test_the_schedule_warms_up_and_falls_as_a_cosine_and_restarts_with_a_stage():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    for _ in range(2):  # the second stage starts again at the base rate
        schedule = start_schedule(optimizer, StageRecipe(steps=10, resolution=16, warmup_steps=2), 1e-3)
        rates = []
        for _ in range(10):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        cosine = [1e-3 * 0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
        assert rates == pytest.approx([0.0, 0.5e-3, *cosine])
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0)

"""A new loss is one function and one Term; loop, log, balancing and checkpoints do not know its name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from transformers_radio.training import checks, distill, load_recipe, losses, train
from transformers_radio.training.losses import Term, common_grid, resize_grid


def gram_loss(head, target, config):
    """How differently student and teacher relate the positions of an image, (B,): their cosines with each other."""
    grid = common_grid(head.grid, target.grid, config.grid)
    student = F.normalize(resize_grid(head.features, head.grid, grid), dim=-1)  # (B, N, C)
    teacher = F.normalize(resize_grid(target.features, target.grid, grid), dim=-1)
    return (student @ student.mT - teacher @ teacher.mT).square().mean(dim=(1, 2))


@pytest.fixture(autouse=True)
def a_gram_term_for_sam(monkeypatch):
    """As a line in LOSSES and a line in `loss_terms` would add it."""
    usual_terms = losses.loss_terms

    def loss_terms(recipe, stage_name, student):
        return [*usual_terms(recipe, stage_name, student), Term("sam", "gram", 0.5)]

    monkeypatch.setitem(losses.LOSSES, "gram", gram_loss)
    for module in (checks, distill):
        monkeypatch.setattr(module, "loss_terms", loss_terms)


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def trained(run, step):
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "training_state" / "model.safetensors")


def test_it_is_part_of_the_loss_and_of_the_log(make_recipe, tmp_path):
    train(load_recipe(make_recipe(), ["stages.main.steps=40", "optimizer.learning_rate=3e-3"]))
    first, *_, last = metrics(tmp_path / "run")
    others = first["clip/summary"] + first["clip/features"] + first["sam/features"]
    assert first["sam/gram"] > 0 and first["loss"] == pytest.approx(others + 0.5 * first["sam/gram"])
    assert last["sam/gram"] < 0.8 * first["sam/gram"]


@pytest.mark.parametrize("balancing", ["uncertainty", "adaloss", "amtml_kd"])
def test_it_is_balanced_and_resumes_to_the_bit(balancing, make_recipe, tmp_path):
    options = [f"loss.balancing={balancing}", "stages.main.steps=6", "checkpoints.every_steps=2"]
    train(load_recipe(make_recipe("whole"), options))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "student")
    shutil.rmtree(cut / "checkpoints" / "step-00000006")
    train(load_recipe(make_recipe("cut"), options))
    left, right = trained(whole, 6), trained(cut, 6)
    assert left.keys() == right.keys() and not [name for name in left if not torch.equal(left[name], right[name])]
    assert [line["sam/gram"] for line in metrics(whole)] == [line["sam/gram"] for line in metrics(cut)]
    if balancing == "uncertainty":
        assert left["balancing.heads.gram.bias"].any()  # its own uncertainty, which has learned
    if balancing == "adaloss":
        assert len(left["balancing.averages"]) == 4 and left["balancing.updates"].tolist() == [6] * 4

"""Where teachers' and students' weights are, and what a step waits for."""

import copy
import gc
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.groups_of_processes import run
from transformers_radio.modeling import RadioConfig, RadioModel
from transformers_radio.teachers import Teacher, TeacherOutput
from transformers_radio.training import load_recipe, train
from transformers_radio.training.recipe import TeacherRecipe
from transformers_radio.training.run.log import FiniteCheck
from transformers_radio.training.run.signals import STEPS_PER_AGREEMENT
from transformers_radio.training.stability.spectral import add_spectral_reparam, power_steps
from transformers_radio.training.teachers import _place, stack


class Blocks(Teacher):
    """Three blocks of 6 x 6 weights over patches of 2 pixels."""

    def __init__(self):
        torch.manual_seed(0)
        network = nn.Module()
        network.patches = nn.Conv2d(3, 6, 2, 2)
        network.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        super().__init__(
            network, image_size=8, patch_size=2, summary_dim=None, feature_dim=6, normalization=((0.5,) * 3,) * 2
        )

    def encode(self, pixel_values):
        tokens = self.model.patches(pixel_values).flatten(2).transpose(1, 2)  # (B, 6, 4, 4) -> (B, 16, 6)
        for block in self.model.blocks:
            tokens = block(tokens).relu()
        return TeacherOutput(None, tokens, (4, 4))


def sharded_teacher():
    mesh = init_device_mesh("cpu", (2,))
    images = torch.rand(2, 3, 8, 8)
    dist.broadcast(images, 0)
    expected = Blocks()(images).features
    teacher = _place(Blocks(), TeacherRecipe("python", "", placement="sharded"), torch.device("cpu"), mesh)
    for _ in range(2):
        torch.testing.assert_close(teacher(images).features, expected)
        parameters = [one for block in stack(teacher.model) for one in block.parameters()]
        assert all(isinstance(parameter, DTensor) for parameter in parameters)
        # half of what the whole blocks have: nothing stays gathered after a forward pass
        assert sum(parameter.to_local().numel() for parameter in parameters) == 3 * (6 * 6 + 6) / 2


def sharded_power_steps():
    torch.manual_seed(0)
    config = RadioConfig(hidden_size=33, num_attention_heads=3, num_hidden_layers=2, mlp_ratio=1.3, patch_size=8)
    plain = RadioModel(config)
    add_spectral_reparam(plain)
    sharded = copy.deepcopy(plain)
    for layer in sharded.encoder.layer:
        fully_shard(layer)
    fully_shard(sharded)
    for _ in range(3):
        for model in (plain, sharded):
            power_steps(model)
    vectors = [{k: v for k, v in model.named_buffers() if k.endswith(("._u", "._v"))} for model in (plain, sharded)]
    assert len(vectors[0]) > 8 and vectors[0].keys() == vectors[1].keys()
    for name, vector in vectors[0].items():
        torch.testing.assert_close(vectors[1][name], vector, rtol=1e-4, atol=1e-5)


def in_group():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    sharded_teacher()
    sharded_power_steps()
    gc.collect()  # sharded models hold on to the group, whose threads would outlive the interpreter: an abort
    dist.destroy_process_group()


def test_sharded_blocks_are_whole_only_while_they_compute_and_power_steps_need_no_whole_weights():
    run(2, target=in_group)


class Reads(TorchDispatchMode):
    """Counts what reads a value of a tensor in Python, for which a GPU has to finish all its work first."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **(options or {}))


def test_no_step_reads_a_value_from_the_device(make_recipe, monkeypatch):
    """As on an accelerator, where ranges are looked at on the first calls only."""
    monkeypatch.setattr(Teacher, "_wants_range_check", lambda self, images: False)
    monkeypatch.setattr(RadioModel, "_range_checked", True)
    options = ["log_every_steps=100", "checkpoints.every_steps=100", "stages.main.warmup_steps=1"]
    counts = []
    for steps in (4, 9):
        with Reads() as reads:
            train(load_recipe(make_recipe(f"{steps}"), [*options, f"stages.main.steps={steps}"]))
        counts.append(reads.count)
    assert counts[0] == counts[1] > 0


def test_a_value_that_is_not_finite_is_named_with_its_step():
    check = FiniteCheck(["clip/summary", "sam/features", "gradient norm"], torch.device("cpu"))
    check.check()
    check.put(1, torch.tensor([1.0, 2.0]), 3.0, scaled=False)
    check.check()
    check.put(2, torch.tensor([1.0, math.nan]), torch.tensor(math.inf), scaled=False)
    with pytest.raises(FloatingPointError, match="at step 2: sam/features = nan, gradient norm = inf"):
        check.check()
    check.put(3, torch.tensor([1.0, 2.0]), math.inf, scaled=True)  # fp16: the scaler skips the step
    check.check()
    assert STEPS_PER_AGREEMENT > 1


@pytest.mark.parametrize("calls", [1, 4, 5, 1000, 1001])
def test_ranges_are_looked_at_on_first_calls_and_now_and_then_on_an_accelerator(calls):
    teacher = Blocks()
    images = type("Images", (), {"device": torch.device("cuda"), "is_meta": False, "numel": lambda self: 1})()
    looked = [teacher._wants_range_check(images) for _ in range(calls)]
    assert looked[-1] is (calls in (1, 4, 1000))

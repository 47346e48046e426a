import copy
import gc

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from helpers.groups_of_processes import run
from transformers_radio.training.stability.ema import EMA


def network():
    """A matrix, vectors, a scalar-like (1, 1) parameter, buffers that training changes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.GELU(), nn.Linear(7, 3))
    model.register_parameter("scale", nn.Parameter(torch.ones(1, 1)))
    return model


def train_step(model, optimizer, x):
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def batches(number):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 5, generator=generator) for _ in range(number)]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def trained(steps=6, decay=0.9):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    ema = EMA(model, decay)
    for number, x in enumerate(batches(steps), start=1):
        train_step(model, optimizer, x)
        ema.update(number)
    return model, ema


def test_the_average_is_that_of_a_numpy_loop():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    ema = EMA(model, 0.9)

    def values():
        """Parameters, and the statistics of batch norms."""
        state = {name: value.detach().numpy().astype(np.float64) for name, value in model.state_dict().items()}
        return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}

    seen = []
    for number, x in enumerate(batches(10), start=1):
        train_step(model, optimizer, x)
        ema.update(number)
        seen.append(values())
    weights = 0.9 ** np.arange(9, -1, -1)  # of the steps, the last one with 1
    expected = {name: np.average([step[name] for step in seen], axis=0, weights=weights) for name in seen[0]}
    averages = ema.state_dict()
    assert averages.keys() == expected.keys()
    for name, average in averages.items():
        np.testing.assert_allclose(average.numpy(), expected[name], rtol=1e-5, atol=1e-6)
        assert average.dtype == torch.float32
        if name != "scale":  # nothing trains it
            assert np.abs(average.numpy() - model.state_dict()[name].numpy()).max() > 1e-3
    assert torch.equal(averages["scale"], torch.ones(1, 1))


def test_half_precision_weights_are_averaged_in_float32():
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.constant_(model.weight, 1.0)
    ema = EMA(model, 0.999)
    for number in range(1, 1001):
        if number == 998:
            nn.init.constant_(model.weight, 2.0)
        ema.update(number)
    # a bfloat16 would stay at 1: the steps are smaller than its spacing
    late = (1 - 0.999**3) / (1 - 0.999**1000)
    assert ema.state_dict()["weight"].item() == pytest.approx(1 + late, abs=1e-5)


def test_a_short_average_has_a_batch_norms_statistics_and_not_their_start():
    """The variance of small activations, from which an average that began at 1 would be far."""
    model = nn.Sequential(nn.BatchNorm1d(5, momentum=1.0))
    ema = EMA(model, 0.999)
    for number, x in enumerate(batches(20), start=1):
        model(0.01 * x)
        ema.update(number)
    assert ema.state_dict()["0.running_var"].max() < 1e-3


def test_a_saved_average_goes_on_with_the_same_bits(tmp_path):
    model, ema = trained()
    torch.save({"ema": ema.state_dict(), "model": model.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed_model = network()
    resumed_model.load_state_dict(saved["model"])
    resumed = EMA(resumed_model, 0.9)
    resumed.load_state_dict(saved["ema"])
    for average, weights in ((ema, model), (resumed, resumed_model)):
        with torch.no_grad():
            for parameter in weights.parameters():
                parameter.mul_(1.1)
        average.update(7)
    assert same(resumed.state_dict(), ema.state_dict())
    snapshot = ema.state_dict()
    ema.update(8)
    assert not same(snapshot, ema.state_dict())  # what was returned does not move


def test_bad_input_is_named():
    for decay in (0, 1, -1, float("nan")):
        with pytest.raises(ValueError, match=f"weight average is {decay}; expected"):
            EMA(network(), decay)
    ema = EMA(network(), 0.9)
    state = ema.state_dict()
    with pytest.raises(ValueError, match=r"3\.bias: saved None, expected \(3,\)"):
        ema.load_state_dict({name: average for name, average in state.items() if name != "3.bias"})
    with pytest.raises(ValueError, match=r"scale: saved \(2, 1\), expected \(1, 1\)"):
        ema.load_state_dict({**state, "scale": torch.ones(2, 1)})


def sharded_average():
    """In each of two processes: the same steps plain and sharded, every second followed by a forward in eval mode."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    plain = network()
    sharded = copy.deepcopy(plain)
    fully_shard(sharded[3])
    fully_shard(sharded)
    models = (plain, sharded)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in models]
    emas = [EMA(model, 0.8) for model in models]
    for step, x in enumerate(batches(6), start=1):
        for model, optimizer, ema in zip(models, optimizers, emas, strict=True):
            model.train()
            train_step(model, optimizer, x)  # the same batch on both, so the mean gradient is that of one
            ema.update(step)
            if step % 2 == 0:
                model.eval()
                with torch.no_grad():
                    model(x)  # leaves the root's parameters gathered
    assert not isinstance(dict(sharded.named_parameters())["0.weight"], DTensor)  # gathered, by the last forward
    sharded.reshard()
    average = emas[1].averages["0.weight"]
    weight = dict(sharded.named_parameters())["0.weight"]
    assert isinstance(average, DTensor) and average.placements == weight.placements
    assert average.to_local().shape == weight.to_local().shape == ((4, 5) if rank == 0 else (3, 5))
    whole = [ema.state_dict() for ema in emas]
    for name in whole[0]:
        assert type(whole[1][name]) is torch.Tensor
        torch.testing.assert_close(whole[1][name], whole[0][name], rtol=1e-5, atol=1e-6)

    # the plain average into the sharded one and back: exactly
    emas[1].load_state_dict(whole[0])
    assert same(emas[1].state_dict(), whole[0])
    assert emas[1].averages["0.weight"].placements == average.placements


def in_group():
    sharded_average()
    gc.collect()  # sharded models hold on to the group, whose threads would outlive the interpreter: an abort
    dist.destroy_process_group()


def test_the_average_of_sharded_weights_is_that_of_plain_ones():
    run(2, target=in_group)

"""What a teacher is known by, so that outputs of another one are never taken for its own."""

import multiprocessing

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from transformers_radio.teachers import Teacher, digest_weights
from transformers_radio.training.teachers import _layers

torch.set_num_threads(1)

FORK = multiprocessing.get_context("fork")


def test_a_digest_is_of_weights_and_layers_wherever_they_are(tmp_path):
    def teacher(change=lambda network: None, activation=nn.GELU):
        torch.manual_seed(0)
        network = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), activation(), nn.BatchNorm1d(4)) for _ in range(2)))
        change(network)
        sizes = {"image_size": 8, "patch_size": 8, "summary_dim": 4, "feature_dim": 4}
        return Teacher(network, **sizes, normalization=((0.5,) * 3,) * 2)

    def both(one):
        return digest_weights(one), _layers(one)

    digest = both(teacher())
    assert both(teacher()) == digest
    changes = (
        lambda network: network[0][0].bias.data[1:2].add_(1e-6),
        lambda network: network[1][2].running_mean[:1].add_(1),
        lambda network: network.bfloat16(),
    )
    others = [*map(teacher, changes), teacher(activation=nn.ReLU)]
    assert len({digest, *map(both, others)}) == 5

    def shard():
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
        one = teacher()
        for block in one.model:
            fully_shard(block, mesh=init_device_mesh("cpu", (1,)))
        assert any(isinstance(parameter, DTensor) for parameter in one.parameters())
        assert both(one) == digest
        torch.distributed.destroy_process_group()

    process = FORK.Process(target=shard)
    process.start()
    process.join(240)
    assert process.exitcode == 0

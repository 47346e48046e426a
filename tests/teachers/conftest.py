"""Shared by the teacher tests: images, and one set of assertions that every teacher has to pass."""

import pickle

import pytest
import torch


@pytest.fixture
def images():
    """Random RGB batches in [0, 1]: `images(size)` -> (2, 3, size, size)."""

    def make(size):
        return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(size))

    return make


@pytest.fixture
def assert_contract(images):
    """Everything a `Teacher` promises, checked by running it as a part of a model in training."""

    def check(teacher):
        torch.nn.Sequential(teacher).train()
        assert not any(module.training for module in teacher.modules())
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        batch = images(teacher.image_size).requires_grad_()
        output = teacher(batch)
        h, w = output.grid
        assert output.features.shape == (2, h * w, teacher.feature_dim)
        assert output.features.dtype == torch.float32 and not output.features.requires_grad
        if teacher.summary_dim is None:
            assert output.summary is None
        else:
            assert output.summary.shape == (2, teacher.summary_dim)
            assert output.summary.dtype == torch.float32 and not output.summary.requires_grad
        with torch.autocast("cpu", dtype=torch.bfloat16):
            under_autocast = teacher(batch)
        torch.testing.assert_close(under_autocast.features, output.features, rtol=0, atol=0)
        return output

    return check


@pytest.fixture
def randomize():
    """Give every saved tensor of a network random values, so that nothing is zero or one by design."""

    def fill(model, seed=0):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if not tensor.is_floating_point():
                    continue
                noise = torch.randn(tensor.shape, generator=generator)
                if "running_var" in name:
                    tensor.copy_(0.5 + noise.abs())
                elif "norm" in name.lower() and name.endswith("weight"):
                    tensor.copy_(1 + 0.2 * noise)
                else:
                    tensor.copy_(noise / max(1, tensor[0].numel() if tensor.ndim > 1 else 4) ** 0.5)
        return model.eval()

    return fill


@pytest.fixture
def malicious_file(tmp_path):
    """`malicious_file(path)` writes a torch file whose unpickling would create the returned file; it really would."""
    proof = tmp_path / "proof"

    class Payload:
        def __reduce__(self):
            return open, (str(proof), "w")

    def write(path):
        pickle.loads(pickle.dumps(Payload())).close()
        assert proof.exists()
        proof.unlink()
        torch.save({"weight": torch.zeros(1), "payload": Payload()}, path)
        return proof

    return write

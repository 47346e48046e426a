"""What a pass computes, operation by operation: no more than transformers' RADIO does, and less once it is fused."""

from collections import Counter

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from transformers_radio import RadioConfig, RadioModel

BATCH, SIDE, BLOCKS = 8, 96, 3
SIZE = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": BLOCKS, "max_img_size": SIDE}
SIZE |= {"num_cls_tokens": 1, "num_registers": 4, "patch_size": 16}
TOKENS = BATCH * ((SIDE // 16) ** 2 + 5) * 32  # numbers in the tokens of a batch


class Written(TorchDispatchMode):
    """Operation -> how many numbers it writes, in new memory or in place."""

    def __init__(self):
        super().__init__()
        self.numbers, self.calls = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        # the second output of some is for a backward pass
        first = output[0] if isinstance(output, tuple | list) else output
        is_view = isinstance(first, torch.Tensor) and any(
            isinstance(arg, torch.Tensor) and arg.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            for arg in args
        )
        if isinstance(first, torch.Tensor) and (not is_view or func.overloadpacket.__name__.endswith("_")):
            self.numbers[str(func.overloadpacket)] += first.numel()
            self.calls[str(func.overloadpacket)] += 1
        return output


def written(model, dtype, trains):
    images = torch.rand(BATCH, 3, SIDE, SIDE, dtype=dtype)
    model = model.to(dtype).train(trains)

    def run():
        output = model(images)
        features = output.features if hasattr(output, "features") else output.last_hidden_state
        if trains:
            features.float().square().mean().backward()
        return features

    with torch.set_grad_enabled(trains):
        run()  # what is kept between passes
        with Written() as counts:
            run()
    return counts


@pytest.fixture
def native():
    config = transformers.RadioConfig(**SIZE, intermediate_size=128, summary_idxs=[0])
    return transformers.RadioModel(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trains", [False, True])
def test_no_more_than_native(monkeypatch, native, dtype, trains):
    monkeypatch.setattr("transformers_radio.modeling.attention_radio._fused_kernel_is_slow", lambda: False)
    ours = written(RadioModel(RadioConfig(**SIZE)), dtype, trains).numbers
    theirs = written(native, dtype, trains).numbers
    assert ours["aten.addmm"] == theirs["aten.addmm"] == 9 * BLOCKS * TOKENS
    # not of one image alone, such as its positions
    assert {name: count for name, count in ours.items() if count > theirs[name] and count >= TOKENS} == {}
    assert sum(ours.values()) < 1.01 * sum(theirs.values())


@torch.no_grad()
def test_a_fused_one_multiplies_once_for_query_key_and_value_and_scales_nothing():
    model = RadioModel(RadioConfig(**SIZE)).eval()
    before, after = written(model, torch.float32, False), written(model.fuse(), torch.float32, False)
    assert (before.calls["aten.addmm"], after.calls["aten.addmm"]) == (6 * BLOCKS, 4 * BLOCKS)
    assert before.numbers["aten.addmm"] == after.numbers["aten.addmm"] == 9 * BLOCKS * TOKENS
    assert (before.calls["aten.mul"], after.calls["aten.mul"]) == (2 * BLOCKS, 0)
    changed = {name for name in before.numbers if after.numbers[name] != before.numbers[name]}
    assert changed == {"aten.mul"}

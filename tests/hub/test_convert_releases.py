"""Which release a name states, and what follows from it."""

import subprocess
import sys

import pytest

from helpers.nvidia_files import LAYOUTS, Randoms, arguments, backbone, write_hub, write_pth
from transformers_radio.hub.releases import find_release, version_in

OURS, OPEN = "nsclv1", "nvidia-open-model-license"
FIVE, EIGHT = {"window_num_windowed": 5}, {"window_num_global": 8}


@pytest.mark.parametrize(
    ("name", "license", "side", "windows"),
    [
        ("radio_v1.pth.tar", OURS, 378, {}),
        ("radio_v2.pth.tar", OURS, 432, FIVE),
        ("radio_v2.1_bf16.pth.tar.tar", OURS, 432, FIVE),
        ("e-radio_v2.pth.tar.tar", OURS, 512, {}),
        ("nvidia/E-RADIO", OURS, 512, {}),
        ("radio-v2.5-h_bf16.pth.tar", OURS, 768, {}),
        ("radio_v2.5-h-norm.pth.tar", OURS, 768, {}),
        ("radio_v2.5-g.pth.tar", OURS, 896, EIGHT),
        ("nvidia/RADIO-B", OURS, 768, {}),
        ("nvidia/RADIO-g", OURS, 896, EIGHT),
        ("nvidia/C-RADIO", OPEN, 768, {}),
        ("nvidia/C-RADIOv2-B", OPEN, 768, {}),
        ("nvidia/C-RADIOv2-g", OPEN, 768, EIGHT),
        ("nvidia/C-RADIOv2-VLM-H", OPEN, 768, EIGHT),
        ("c-radio_v3-b_half.pth.tar", OPEN, 512, None),
        ("nvidia/C-RADIOv4-SO400M", OPEN, 512, {}),
        ("c-radio_v4-h_half.pth.tar", OPEN, 512, {}),
    ],
)
def test_names_state_the_release(name, license, side, windows):
    release = find_release(version_in(name))
    assert (release.license["license_name"], release.preferred, release.windows) == (license, side, windows)


@pytest.mark.parametrize("name", ["model.pth.tar", "nvidia/RADIO", "portradio", "checkpoint-100"])
def test_other_names_state_none(name):
    assert find_release(version_in(name)) is None


PEAK = """
import re, sys
from pathlib import Path
import timm
import transformers_radio.hub.convert, transformers_radio.modeling.modeling_radio_heads
from transformers_radio.hub.folder import convert
# of this process alone: ru_maxrss begins with the peak of its parent
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)) << 10
before = peak()
convert(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
print((peak() - before) / int(sys.argv[4]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "target"), [("pth", "radio"), ("hub", "radio"), ("hub", "nvidia"), ("hub", "vllm"), ("hub", "timm")]
)
def test_the_peak_of_memory_is_about_the_model(tmp_path, form, target):
    """ViT-B with LayerScale: 330 MiB. Mapped pages that were read count, and so do copies."""
    layout = LAYOUTS["radio_v2.5-b"] | {"scale": True}
    state = backbone(layout, Randoms(), 768, 12, 32)
    args = arguments(layout, 768, 32, 12)
    prefix = {"pth": "base_model.", "hub": "radio_model.model."}[form]
    state = {prefix + name: tensor for name, tensor in state.items()}
    size = sum(tensor.nbytes for tensor in state.values())
    if form == "pth":
        source = write_pth(tmp_path / "radio_v2.5-b.pth.tar", args, state)
    else:
        source = write_hub(tmp_path / "hub", args, state, "radio_v2.5-b")
    del state
    command = [sys.executable, "-c", PEAK, str(source), str(tmp_path / "out"), target, str(size)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(run.stdout.split()[-1]) <= 1.2

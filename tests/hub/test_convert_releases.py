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
import resource, sys
from transformers_radio.hub.convert import load_nvidia_checkpoint
from transformers_radio.hub.folder import convert
import transformers_radio.modeling.modeling_radio
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
before = peak()
model = load_nvidia_checkpoint(sys.argv[1])
print((peak() - before) / sum(tensor.nbytes for tensor in model.state_dict().values()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["pth", "hub"])
def test_the_peak_of_memory_is_about_the_model(tmp_path, form):
    """ViT-H's width, 8 blocks: 609 MiB. Mapped pages that were read count, and so do copies."""
    state = backbone(LAYOUTS["radio_v2.5-h"], Randoms(), 1280, 8, 32)
    args = arguments(LAYOUTS["radio_v2.5-h"], 1280, 32, 16)
    prefix = {"pth": "base_model.", "hub": "radio_model.model."}[form]
    state = {prefix + name: tensor for name, tensor in state.items()}
    if form == "pth":
        source = write_pth(tmp_path / "radio_v2.5-h.pth.tar", args, state)
    else:
        source = write_hub(tmp_path / "hub", args, state, "radio_v2.5-h")
    del state
    run = subprocess.run([sys.executable, "-c", PEAK, str(source)], capture_output=True, text=True, check=True)
    assert float(run.stdout.split()[-1]) <= 1.2

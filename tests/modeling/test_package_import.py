"""What `import transformers_radio` costs, and which types it makes known, each in a process of its own."""

import subprocess
import sys

import pytest


def run(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_the_package_imports_neither_torch_nor_transformers():
    loaded = run(
        "import transformers_radio, sys; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    assert loaded == "[]"


@pytest.mark.parametrize(
    "imports",
    [
        "from transformers import AutoConfig, AutoModel; import transformers_radio",
        "from transformers_radio import RadioConfig; from transformers import AutoConfig, AutoModel",
    ],
)
def test_the_new_types_are_known_to_the_auto_classes(imports):
    code = (
        f"{imports}\n"
        "radio = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, patch_size=8, max_img_size=64)\n"
        "config = AutoConfig.for_model('radio_vision_tower', radio_config=radio)\n"
        "print(type(AutoModel.from_config(config)).__name__, type(AutoConfig.for_model('radio_backbone')).__name__)"
    )
    assert run(code) == "RadioVisionTower RadioBackboneConfig"


def test_a_config_of_ours_builds_a_model_of_ours():
    code = (
        "from transformers_radio import RadioConfig; from transformers import AutoModel\n"
        "config = RadioConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)\n"
        "print(type(AutoModel.from_config(config)).__module__.split('.')[0])"
    )
    assert run(code) == "transformers_radio"


def test_the_native_radio_stays_what_it_is_until_register_is_called():
    code = (
        "from transformers import AutoConfig; import transformers_radio; transformers_radio.RadioModel\n"
        "native = type(AutoConfig.for_model('radio')).__module__; transformers_radio.register()\n"
        "print(native.split('.')[0], type(AutoConfig.for_model('radio')).__module__.split('.')[0])"
    )
    assert run(code) == "transformers transformers_radio"

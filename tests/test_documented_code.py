"""The Python of the pages about export, fine-tuning and intermediate features runs as it stands."""

import re
from pathlib import Path

import pytest
import torch

from helpers.tiny_radio import build_with_adaptors

DOCS = Path(__file__).parents[1] / "docs"


def code_of(page, heading):
    """The Python blocks below a heading of a page, up to the next one of its level."""
    section = re.split(r"^## ", (DOCS / page).read_text(), flags=re.MULTILINE)
    chosen = next(part for part in section if part.startswith(heading) or f"# {heading}\n" in part)
    return "\n".join(re.findall(r"^```python\n(.*?)^```", chosen, flags=re.MULTILINE | re.DOTALL))


@pytest.fixture
def student(tmp_path):
    build_with_adaptors(preferred_resolution=64).save_pretrained(tmp_path)
    return str(tmp_path)


def test_intermediate_features():
    scope = {"torch": torch, "model": build_with_adaptors(num_hidden_layers=12)}
    exec(code_of("models.md", "Features of the blocks between"), scope)
    assert [maps.shape for maps in scope["maps"]] == 3 * [(2, 32, 14, 10)]


def test_running_an_onnx_file(student):
    pytest.importorskip("onnxruntime")
    from transformers_radio.export.run import export_student

    export_student(student, Path(student), adaptors=[])
    scope = {"student": student}
    exec(code_of("export.md", "Export"), scope)
    assert scope["summary"].shape == (2, 64) and scope["features"].shape == (2, 24, 32)


def test_lora(student):
    pytest.importorskip("peft")
    scope = {"student": student}
    exec(code_of("fine_tuning.md", "LoRA"), scope)
    trained = [name for name, weight in scope["model"].named_parameters() if weight.requires_grad]
    assert len(trained) == 2 * 6 * 2 and all(".encoder.layer." in name and ".lora_" in name for name in trained)

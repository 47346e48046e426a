"""Folders that earlier releases have saved (tests/saved) give the outputs that they gave then."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import transformers_radio
from transformers_radio import RadioImageProcessor
from transformers_radio.modeling import student_class

SAVED = Path(__file__).parents[1] / "saved"
FOLDERS = sorted(path.parent for path in SAVED.glob("*/*/config.json"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_folder_of_an_earlier_release_gives_its_outputs(folder):
    expected = load_file(folder.with_suffix(".safetensors"))
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    model = student_class(model_type).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        out = model(expected.pop("images") / 255)
    found = {"summary": out.summary, "features": out.features}
    for name, adaptor in out.adaptors.items():
        found |= {f"{name}.{kind}": adaptor[kind] for kind in ("summary", "features") if kind in adaptor}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4 * float(value.abs().max()))
    processor = RadioImageProcessor.from_pretrained(folder)
    assert dict(processor.size) == {"height": 64, "width": 64}


def test_every_type_of_student_is_there_and_the_folders_are_small():
    newest = {path.name for path in FOLDERS if path.parent.name == transformers_radio.__version__}
    assert newest == {"radio", "eradio", "radio_timm"}, "run tests/saved/write.py for this release"
    for release in {path.parent for path in FOLDERS}:
        assert sum(path.stat().st_size for path in release.rglob("*") if path.is_file()) < 450_000

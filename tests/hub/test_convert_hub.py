"""Releases on the Hub, by their ids: what is read of a repository, and what models say that cannot read it."""

import json
import os
import subprocess
import sys

import pytest
import transformers

from helpers.hub_server import HubServer
from helpers.nvidia_files import make, write_hub, write_pth
from helpers.tiny_radio import TINY

SCRIPT = """
from transformers_radio import ERadioModel, RadioModel
from transformers_radio.hub.convert import load_nvidia_checkpoint

for source in ("nvidia/RADIO-B", "nvidia/C-RADIOv4-H", "nvidia/RADIO:radio_v2.5-b.pth.tar"):
    model = load_nvidia_checkpoint(source)
    print(model.config.converted_from["source"], model.config.converted_from["version"], *model.adaptors)
for model, name in ((RadioModel, "RADIO-B"), (ERadioModel, "RADIO-B"), (RadioModel, "C-RADIOv4-H")):
    try:
        model.from_pretrained(f"nvidia/{name}", trust_remote_code=True)
    except ValueError as error:
        print(error)
try:
    load_nvidia_checkpoint("nvidia/RADIO:none.pth.tar")
except FileNotFoundError as error:
    print(error)
"""


@pytest.fixture
def server():
    server = HubServer()
    yield server
    server.stop()


def test_releases_are_read_by_their_ids(tmp_path, server):
    """As remote code with `args`, which never runs; flattened for transformers' own class; and a file by its name."""
    args, stored, *_ = make("radio_v2.5-b")
    write_pth(tmp_path / "radio_v2.5-b.pth.tar", args, stored)
    bare = {name: tensor for name, tensor in make("radio_v2.5-b", "hub")[1].items() if ".adaptors." not in name}
    write_hub(tmp_path / "RADIO-B", args, bare, "radio_v2.5-b")
    (tmp_path / "RADIO-B/hf_model.py").write_text("raise SystemExit('run')")
    transformers.RadioModel(transformers.RadioConfig(**TINY)).save_pretrained(tmp_path / "C-RADIOv4-H")
    assert "model_type" not in json.loads((tmp_path / "RADIO-B/config.json").read_text())
    for name in ("RADIO-B", "C-RADIOv4-H"):
        server.commits[f"nvidia/{name}"] = [("a" * 40, {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()})]
    content = (tmp_path / "radio_v2.5-b.pth.tar").read_bytes()
    server.commits["nvidia/RADIO"] = [("b" * 40, {"radio_v2.5-b.pth.tar": content})]
    environment = {**os.environ, **server.environment, "HF_HOME": str(tmp_path / "home")}
    run = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[:3] == [
        "nvidia/RADIO-B radio_v2.5-b",
        "nvidia/C-RADIOv4-H c-radiov4-h",
        "nvidia/RADIO:radio_v2.5-b.pth.tar radio_v2.5-b clip siglip dino_v2 sam",
    ]
    for line, name in zip(lines[3:6], ("RADIO-B", "RADIO-B", "C-RADIOv4-H"), strict=True):
        assert f"`transformers-radio convert nvidia/{name} FOLDER`" in line
    assert "nvidia/RADIO:none.pth.tar" in lines[6] and len(lines) == 7

"""The page runs an exported student in a real browser. Skipped where Chromium or onnxruntime-web are not installed."""

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.tiny_radio import build_with_adaptors
from transformers_radio.disk import write_json
from transformers_radio.export.run import export_student

PAGE = Path(__file__).parents[2] / "docs" / "browser" / "index.html"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
RUNTIME = Path(os.environ.get("ONNXRUNTIME_WEB", "node_modules/onnxruntime-web/dist"))


def test_the_page_loads_nothing_from_elsewhere():
    page = PAGE.read_text()
    assert not re.findall(r"https?://", page)
    assert set(re.findall(r'asked\.(?:get|has)\("(\w+)"\)', page)) == {"runtime", "side", "model", "words", "image"}


@pytest.fixture
def site(tmp_path):
    """The page, the runtime, a student in int8, an image and three words, served on this machine."""
    shutil.copy(PAGE, tmp_path)
    (tmp_path / "ort").symlink_to(RUNTIME.absolute())
    build_with_adaptors(preferred_resolution=64).save_pretrained(tmp_path / "student")
    program, _ = export_student(str(tmp_path / "student"), tmp_path, dtype="q8", adaptors=["clip"])
    shutil.copy(program, tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    vectors = np.random.default_rng(1).normal(size=(3, 12))
    write_json(tmp_path / "words.json", {"names": ["ball", "cube", "ring"], "vectors": vectors.tolist()})
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/index.html", program, pixels, vectors
    server.shutdown()


@pytest.mark.skipif(CHROMIUM is None or not RUNTIME.is_dir(), reason="needs Chromium and onnxruntime-web")
def test_a_browser_computes_what_onnxruntime_computes(site, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    address, program, pixels, vectors = site
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [CHROMIUM, *options, "--virtual-time-budget=120000", "--dump-dom", f"{address}?image=image.png"]
    page = subprocess.run(command, capture_output=True, text=True, timeout=180).stdout
    assert 'data-state="done"' in page, re.findall(r'id="status"[^<]*<?[^<]*', page)
    found = json.loads(re.search(r'data-summary="(\[[^"]*\])"', page)[1])
    images = pixels.transpose(2, 0, 1)[None].astype(np.float32) / 255
    session = onnxruntime.InferenceSession(str(program))
    summary, clip = session.run(["summary", "clip_summary"], {"pixel_values": images})
    # int8 activations are rounded otherwise on other processors
    assert np.linalg.norm(found - summary[0]) < 0.05 * np.linalg.norm(summary)
    scores = vectors @ clip[0] / np.linalg.norm(clip)
    rows = re.findall(r"<tr><td>(\w+)</td><td>(-?[\d.]+)</td></tr>", page)
    assert len(rows) == 3
    for name, score in rows:
        assert abs(float(score) - scores[["ball", "cube", "ring"].index(name)]) < 0.1
    assert '<canvas id="features" width="4" height="4"' in page

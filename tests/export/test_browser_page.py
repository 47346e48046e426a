"""The page runs an exported student in a real browser, where there is one, and onnxruntime-web."""

import functools
import http.server
import json
import os
import re
import runpy
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.chromium import needs_browser, open_browser, open_page
from helpers.documented_world import save_eradio
from helpers.tiny_radio import build_with_adaptors
from transformers_radio.disk import write_json
from transformers_radio.export.run import export_student

PAGE = Path(__file__).parents[2] / "docs" / "browser" / "index.html"
RUNTIME = Path(os.environ.get("ONNXRUNTIME_WEB", "node_modules/onnxruntime-web/dist"))


def test_the_page_loads_nothing_from_elsewhere():
    page = PAGE.read_text()
    assert not re.findall(r"https?://", page)
    assert set(re.findall(r'asked\.(?:get|has)\("(\w+)"\)', page)) == {"runtime", "side", "model", "words", "image"}


def test_what_prepare_writes_fits_together(tmp_path, monkeypatch):
    """The program takes images of the side that the page reads, and its summary has the words' width."""
    onnxruntime = pytest.importorskip("onnxruntime")
    save_eradio(tmp_path / "student", side=96)
    arguments = ["prepare.py", str(tmp_path / "student"), "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(PAGE.with_name("prepare.py")), run_name="__main__")
    words = json.loads((tmp_path / "words.json").read_text())
    assert words["side"] == 96 and len(words["names"]) == len(words["vectors"])
    session = onnxruntime.InferenceSession(str(tmp_path / "model_quantized.onnx"))
    images = np.zeros((1, 3, 96, 96), np.float32)
    (clip,) = session.run(["clip_summary"], {"pixel_values": images})
    assert clip.shape == (1, len(words["vectors"][0]))


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


@needs_browser
@pytest.mark.skipif(
    not RUNTIME.is_dir(), reason="no onnxruntime-web: npm install it, or name its dist in ONNXRUNTIME_WEB"
)
def test_a_browser_computes_what_onnxruntime_computes(site):
    onnxruntime = pytest.importorskip("onnxruntime")
    address, program, pixels, vectors = site
    with open_browser() as browser, open_page(browser, f"{address}?image=image.png", 800, 600) as (page, faults):
        page.wait_for_selector("body[data-state=done], body[data-state=failed]", timeout=120_000)
        assert page.get_attribute("body", "data-state") == "done", page.inner_text("#status")
        found = json.loads(page.get_attribute("body", "data-summary"))
        rows = [row.split("\t") for row in page.locator("#words tr").all_inner_texts()]
        grid = page.locator("#features").get_attribute("width"), page.locator("#features").get_attribute("height")
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth") and faults == []
    images = pixels.transpose(2, 0, 1)[None].astype(np.float32) / 255
    session = onnxruntime.InferenceSession(str(program))
    summary, clip = session.run(["summary", "clip_summary"], {"pixel_values": images})
    # int8 activations are rounded otherwise on other processors
    assert np.linalg.norm(found - summary[0]) < 0.05 * np.linalg.norm(summary)
    scores = vectors @ clip[0] / np.linalg.norm(clip)
    assert len(rows) == 3
    for name, score in rows:
        assert abs(float(score) - scores[["ball", "cube", "ring"].index(name)]) < 0.1
    assert grid == ("4", "4")

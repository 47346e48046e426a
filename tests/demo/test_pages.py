"""The pages as they are served: with clicks in a real browser, and asked for what they must not give."""

import json
import re
import runpy
import socket
import urllib.error
import urllib.request
import uuid
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.chromium import needs_browser, open_browser, open_page
from helpers.taught_student import DINOV2, adaptor, save_taught_student
from helpers.watched_run import line, save_checkpoint, write

gradio = pytest.importorskip("gradio", reason='the pages need gradio: pip install "transformers_radio[demo]"')

from transformers_radio.demo import page as demo_page  # noqa: E402
from transformers_radio.demo import run_page, serve  # noqa: E402
from transformers_radio.demo.html import CSS  # noqa: E402
from transformers_radio.demo.models import load_models  # noqa: E402
from transformers_radio.demo.run_view import Progress, Watcher  # noqa: E402
from transformers_radio.demo.space import write_space  # noqa: E402

DESKTOP, PHONE = (1280, 900), (390, 844)


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def address(models):
    page = demo_page.build_page(models)
    yield serve.launch(page, CSS, "127.0.0.1", None, max_bytes=100_000, block=False)
    page.close()


@pytest.fixture(scope="module")
def photo(image, tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    image.save(path)
    return path


def fits(page):
    """Whether nothing sticks out at the right."""
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@needs_browser
def test_a_visitor_drops_an_image_types_labels_and_clicks_a_mask(browser, address, photo):
    with open_page(browser, address, *DESKTOP) as (page, faults):
        page.set_input_files("#upload input[type=file]", photo)
        page.wait_for_selector("#features figure")
        assert page.locator("#features figcaption b").all_inner_texts() == [
            *("Image", "Student", "clip, the teacher", "Student as clip"),
            *("dinov2, the teacher", "Student as dinov2", "sam, the teacher", "Student as sam"),
        ]
        assert "8\u00a0×\u00a08 patches" in page.locator("#features figcaption").nth(1).inner_text()
        page.fill("#labels textarea", "red circle, <img src=x onerror=alert(1)>")
        page.click("#compare")
        page.wait_for_selector("#scores .name")
        assert set(page.locator("#scores .name").all_inner_texts()) == {"red circle", "<img src=x onerror=alert(1)>"}
        assert page.locator("#scores img").count() == 0
        shares = [int(share) for share in re.findall(r"(\d+) %", page.inner_text("#scores"))]
        assert abs(sum(shares) - 100) <= 1
        before = page.inner_text("#scores")
        knob = page.locator("#side input[type=range]").bounding_box()
        page.mouse.click(knob["x"] + knob["width"] - 2, knob["y"] + knob["height"] / 2)  # its right end
        page.wait_for_function("document.querySelectorAll('#features figcaption')[1].innerText.includes('16')")
        page.wait_for_function("before => document.querySelector('#scores').innerText != before", arg=before)
        clean = page.locator("#picture img").get_attribute("src")
        page.locator("#picture img").click()  # its middle
        page.wait_for_function("document.querySelector('#note').innerText.includes('IoU')")
        assert page.locator("#picture img").get_attribute("src") != clean
        assert re.search(r"\d+% of the image; .*: \d\.\d\d; \d+ ms for the student, \d+ ms", page.inner_text("#note"))
        assert fits(page)
        page.set_viewport_size({"width": PHONE[0], "height": PHONE[1]})
        first, second = (page.locator("#features figure").nth(number).bounding_box() for number in (0, 1))
        assert fits(page) and first["y"] == second["y"] and first["width"] > 140  # two side by side
        assert faults == []


@needs_browser
def test_two_corners_mark_a_box(browser, address, photo, image, monkeypatch):
    asked = []
    draw = demo_page.draw_mask
    monkeypatch.setattr(demo_page, "draw_mask", lambda *args: asked.append(args[3]) or draw(*args))
    with open_page(browser, address, *PHONE) as (page, faults):
        page.set_input_files("#upload input[type=file]", photo)
        page.wait_for_selector("#picture img")
        page.get_by_label("a box, by two corners").check()
        box = page.locator("#picture img").bounding_box()
        # as it keeps its shape, it does not fill its place
        scale = min(box["width"] / image.width, box["height"] / image.height)
        left = (box["width"] - scale * image.width) / 2
        top = (box["height"] - scale * image.height) / 2
        for note, (x, y) in (("opposite corner", (80, 70)), ("IoU", (10, 20))):
            place = {"x": left + (x + 0.5) * scale, "y": top + (y + 0.5) * scale}
            page.locator("#picture img").click(position=place)
            page.wait_for_function(f"document.querySelector('#note').innerText.includes('{note}')")
        assert np.abs(np.array(asked) - [[[80, 70], [10, 20]]]).max() <= 1
        assert faults == []


@needs_browser
def test_what_is_wrong_with_the_input_is_told(browser, address, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"<script>no image</script>")
    with open_page(browser, address, *DESKTOP) as (page, _):
        page.set_input_files("#upload input[type=file]", tmp_path / "bad.png")
        page.wait_for_selector("text=This is no image that can be shown")
        page.click("#compare")
        page.wait_for_selector("text=There is no label")
        page.fill("#labels textarea", "cat")
        page.click("#compare")
        page.wait_for_selector("text=There is no image yet")


@needs_browser
def test_what_is_left_out_is_said(browser, tmp_path):
    page = demo_page.build_page(load_models(save_taught_student(tmp_path / "student", dinov2=adaptor(DINOV2, 192))))
    address = serve.launch(page, CSS, "127.0.0.1", None, max_bytes=100_000, block=False)
    with open_page(browser, address, *PHONE) as (shown, faults):
        shown.wait_for_selector("text=Labels are left out: the student has no adaptor to a teacher with a text tower")
        shown.wait_for_selector("text=Masks are left out")
        assert not shown.locator("#compare").is_visible() and not shown.locator("#picture").is_visible()
        assert fits(shown) and faults == []
    page.close()


@needs_browser
def test_a_run_is_watched_while_it_trains(browser, run, monkeypatch):
    monkeypatch.setattr(run_page, "EVERY_SECONDS", 0.5)
    write(run, line(10), line(20))
    save_checkpoint(run, 10)
    watcher = Watcher(run, count=2)
    watcher.look()
    page = run_page.build_page(watcher)
    address = serve.launch(page, CSS, "127.0.0.1", None, max_bytes=1, block=False)
    with open_page(browser, address, *DESKTOP) as (shown, faults):
        shown.wait_for_selector("#losses svg, #losses canvas")
        assert "20 of 120 (17%)" in shown.inner_text("#facts")
        assert shown.locator("#legend span").all_inner_texts() == ["clip/summary 0.050", "dinov2/features 0.500"]
        assert shown.locator("#checkpoints img").count() == 4
        write(run, line(10), line(20), line(110, "high", skipped=9))
        watcher.look()
        shown.wait_for_function("document.querySelector('#facts').innerText.includes('110 of 120')")
        assert "high" in shown.inner_text("#facts") and "9" in shown.inner_text("#facts")
        assert fits(shown)
        shown.set_viewport_size({"width": PHONE[0], "height": PHONE[1]})
        shown.wait_for_function("document.documentElement.scrollWidth <= window.innerWidth")
        assert faults == []
    page.close()


def test_the_facts_of_a_run_are_words():
    facts = run_page.facts(Progress(step=5, total_steps=10, seconds_left=90061.4, reasons={"<b>": 2}, skipped=2))
    assert "5 of 10 (50%)" in facts and "1 d 1 h" in facts and "2 (&lt;b&gt;: 2)" in facts
    assert "Nothing is logged yet" in facts
    assert "may have stopped" in run_page.facts(Progress(step=5, total_steps=10, seconds_ago=3600.0))
    assert "may have stopped" not in run_page.facts(Progress(step=9, total_steps=9, seconds_ago=3600.0, finished=True))


# ---------------------------------------------------------------- what the server must not give


def request(address, path, data=None, **headers):
    """(status, headers, body)"""
    asked = urllib.request.Request(address.rstrip("/") + path, data=data, headers=headers)
    try:
        with urllib.request.urlopen(asked, timeout=30) as answer:
            return answer.status, answer.headers, answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read().decode(errors="replace")


def call(address, element, trigger, *values):
    """What the page answers to an event of an element, asked for as the browser would: the stream's last message."""
    config = json.loads(request(address, "/config")[2])
    component = next(one["id"] for one in config["components"] if one["props"].get("elem_id") == element)
    event = next(one for one in config["dependencies"] if [component, trigger] in one["targets"])
    session = uuid.uuid4().hex
    asked = {"data": values, "fn_index": event["id"], "session_hash": session, "trigger_id": component}
    path = "/gradio_api/queue/join"
    request(address, path, json.dumps(asked).encode(), **{"Content-Type": "application/json"})
    stream = request(address, f"/gradio_api/queue/data?session_hash={session}")[2]
    messages = [json.loads(part[6:]) for part in stream.split("\n\n") if part.startswith("data: ")]
    return next(one for one in messages if one["msg"] == "process_completed")


def test_only_this_machine_is_served_and_nothing_from_elsewhere(address):
    assert address.startswith("http://127.0.0.1:")
    port = int(address.rstrip("/").rpartition(":")[2])
    with socket.socket() as other:  # another address of this machine
        assert other.connect_ex(("127.0.0.2", port)) != 0
    status, headers, body = request(address, "/")
    assert status == 200 and headers["Content-Security-Policy"] == serve.POLICY
    loaded = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="([^"]+)"', body)
    assert loaded and not [one for one in loaded if one.startswith(("http:", "https:", "//")) and address not in one]
    config = json.loads(request(address, "/config")[2])
    assert config["analytics_enabled"] is False
    assert {one["api_visibility"] for one in config["dependencies"]} == {"private"}


@pytest.mark.parametrize("path", ["/etc/passwd", "{here}", "{student}", "../../etc/passwd"])
def test_no_file_is_served(address, student_folder, path):
    path = path.format(here=__file__, student=f"{student_folder}/config.json")
    status, _, body = request(address, f"/gradio_api/file={path}")
    assert status in (403, 404) and "root:" not in body and "adaptors" not in body


def test_large_uploads_are_refused(address):
    def upload(size):
        head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        kind = {"Content-Type": "multipart/form-data; boundary=x"}
        return request(address, "/gradio_api/upload", head + size * b"0" + b"\r\n--x--\r\n", **kind)[0]

    assert upload(1000) == 200 and upload(200_000) == 413


@pytest.mark.parametrize(
    "path", ["/etc/passwd", __file__, "http://example.com/image.png", "data:image/png;base64,AAAA"]
)
def test_an_image_is_taken_from_an_upload_alone(address, path):
    given = {"path": path, "url": None, "meta": {"_type": "gradio.FileData"}, "orig_name": "a.png"}
    answer = call(address, "upload", "upload", given, 64)
    assert answer["success"] is False and "root:" not in json.dumps(answer)
    if path.startswith("http"):
        assert "Addresses are not fetched" in answer["output"]["error"]


@pytest.mark.parametrize("side", [63, 0, 1e9, "x"])
def test_a_side_off_the_slider_is_refused(address, side):
    assert call(address, "side", "release", None, side)["success"] is (side == 63)  # no image: nothing to compute


# ---------------------------------------------------------------- a Space


@pytest.fixture
def space(student_folder, tmp_path):
    card = Path(student_folder) / "README.md"
    card.write_text("---\nlicense: other\nlicense_name: research-only\nlicense_link: LICENSE\n---\n# A card\n")
    yield tmp_path / "space"
    card.unlink()


def test_the_app_of_a_space_runs(space, student_folder, monkeypatch):
    files = write_space(f"mine's={student_folder}", space)
    assert [file.name for file in files] == ["app.py", "requirements.txt", "README.md", "student"]
    found = {file.name for file in (space / "student").iterdir()}
    assert {"config.json", "model.safetensors", "modeling_radio.py", "preprocessor_config.json"} <= found
    from huggingface_hub import SpaceCard

    data = SpaceCard.load(space / "README.md").data
    assert (data.title, data.sdk, data.sdk_version, data.app_file) == (
        "mine's",
        "gradio",
        gradio.__version__,
        "app.py",
    )
    assert (data.license, data.license_name) == ("other", "research-only")
    seen = []

    def visit(page):  # in the place of serving until Ctrl-C
        seen.append((page.title, request(page.local_url, "/")[0], page.server_name))
        page.close()

    monkeypatch.setattr(gradio.Blocks, "block_thread", visit)
    runpy.run_path(str(space / "app.py"), run_name="__main__")
    assert seen == [("mine's: a student", 200, "127.0.0.1")]  # a Space sets GRADIO_SERVER_NAME


def test_what_a_space_cannot_have_is_refused(space, student_folder, tmp_path):
    with pytest.raises(ValueError, match="file of this machine"):
        write_space(student_folder, space, {"sam": f"segment_anything:{__file__}"})
    (space / "mine").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="give a new folder"):
        write_space(student_folder, space)
    with pytest.raises(ValueError, match="--space .*inner lies in .*, which is read"):
        write_space(student_folder, Path(student_folder) / "inner")
    with pytest.raises(FileNotFoundError, match="takes a student from a folder"):
        write_space("ORG/NAME", tmp_path / "other")
    (Path(student_folder) / "README.md").write_text("---\ntags: [a]\n---\n# A card\n")
    with pytest.raises(ValueError, match="names no license"):
        write_space(student_folder, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_an_image_in_the_page_is_escaped():
    from transformers_radio.demo.html import image_tag, quiet

    tag = image_tag(Image.new("RGB", (2, 2)), '"><script>')
    assert "<script>" not in tag and quiet("<b>") == '<p class="quiet">&lt;b&gt;</p>'

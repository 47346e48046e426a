"""`transformers-radio demo`: drop an image; see features beside the teachers', type labels, click masks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

import gradio as gr
import torch
from PIL import Image, ImageDraw, ImageOps
from torchvision.transforms.v2.functional import pil_to_tensor

from transformers_radio.visualization.masks import overlay_masks

from .html import CSS, colors_image, labels_html, panels_html, quiet
from .models import DemoModels, load_models
from .parts import (
    MAX_BYTES,
    MAX_LABELS,
    MAX_LETTERS,
    WORKING_SIDE,
    draw_mask,
    embed_for_masks,
    feature_panels,
    parse_labels,
    read_upload,
    score_labels,
    sides,
)
from .serve import KEPT_SECONDS, launch, new_page

POINT, BOX = "a thing, by one click", "a box, by two corners"
SHOWN = 512  # pixels: side of the square beside the features
ABOUT = (
    "Features are shown as colors: their three principal components. A teacher and the student in its place share "
    "their colors. All models see the same square, the center of your image."
)


@dataclass
class Visit:
    """What the server remembers of a visitor, for an hour.

    Attributes:
        embedding: what SAM's decoder reads of the image; made by the first click.
        corner: the first corner of a box.
    """

    image: Image.Image | None = None
    embedding: torch.Tensor | None = None
    corner: tuple[int, int] | None = None


def uploaded_path(payload: Any) -> str | None:
    """The path of an upload. Gradio itself would open the file, whatever it is; `read_upload` does, within bounds."""
    return None if payload is None or payload.path is None else payload.path


@contextmanager
def told() -> Iterator[None]:
    """Tells a visitor what is wrong with the input."""
    try:
        yield
    except ValueError as error:
        raise gr.Error(escape(str(error)), print_exception=False) from None


def show_image(models: DemoModels, path: str | None, side: float) -> tuple[Visit, str, Image.Image | None]:
    """A new image: what is remembered of it, its features, and the picture to click on."""
    if path is None:
        return Visit(), quiet("Drop an image to see its features."), None
    with told():
        image = read_upload(path)
        visit = Visit(image)
        return visit, show_features(models, visit, side), picture_of(image)


def show_features(models: DemoModels, visit: Visit, side: float) -> str:
    if visit.image is None:
        return quiet("Drop an image to see its features.")
    with told():
        panels = feature_panels(models, visit.image, int(side))
    edge = min(SHOWN, *visit.image.size)
    square = ImageOps.fit(visit.image, (edge, edge), Image.Resampling.BICUBIC)
    return panels_html(square, panels)


def show_labels(models: DemoModels, visit: Visit, side: float, text: str, must: bool = True) -> str:
    """Scores of what the visitor typed; `must` is False where nobody asked for them yet."""
    if models.text is None or (not must and (visit.image is None or not text.strip())):
        return ""
    with told():
        labels = parse_labels(text)
        if visit.image is None:
            raise ValueError("There is no image yet: drop one first.")
        return labels_html(*score_labels(models, visit.image, int(side), labels))


def click(models: DemoModels, visit: Visit, kind: str, place: Sequence[int]) -> tuple[Visit, Image.Image, str]:
    """A click at x, y of the picture: a mask, or the first corner of a box."""
    with told():
        if visit.image is None:
            raise ValueError("There is no image yet: drop one first.")
        zoom, size = zoom_of(visit.image), (visit.image.height, visit.image.width)
        x, y = (int(value) // zoom for value in place)
        if not (0 <= x < size[1] and 0 <= y < size[0]):
            raise ValueError("The click is outside of the image.")
        if kind == BOX and visit.corner is None:
            visit.corner = (x, y)
            return visit, picture_of(visit.image, [(x, y)]), quiet("Now click the opposite corner.")
        clicks = [(x, y)] if visit.corner is None or kind == POINT else [visit.corner, (x, y)]
        visit.corner = None
        encoded = ""
        if visit.embedding is None:
            visit.embedding, took = embed_for_masks(models, visit.image)
            encoded = f"{took:.0f} ms for the student, "
        mask, quality, took = draw_mask(models, visit.embedding, size, clicks)
    colored = colors_image(overlay_masks(pil_to_tensor(visit.image), mask[None]))
    note = f"{mask.float().mean():.0%} of the image; IoU as the decoder predicts it: {quality:.2f}; "
    return visit, picture_of(colored, clicks), quiet(f"{note}{encoded}{took:.0f} ms for SAM's decoder")


def zoom_of(image: Image.Image) -> int:
    """How often a small image is enlarged to click on. The browser does not: gradio would misplace the clicks."""
    return max(1, WORKING_SIDE // max(image.size))


def picture_of(image: Image.Image, clicks: Sequence[tuple[int, int]] = ()) -> Image.Image:
    """The picture to click on: the image, enlarged if it is small, with its clicks or the box between them."""
    zoom = zoom_of(image)
    picture = image.resize((zoom * image.width, zoom * image.height), Image.Resampling.BICUBIC)
    draw, radius = ImageDraw.Draw(picture), max(2, max(picture.size) // 100)
    places = [(zoom * x + zoom // 2, zoom * y + zoom // 2) for x, y in clicks]
    if len(places) == 2:
        (left, right), (top, bottom) = (sorted(values) for values in zip(*places, strict=True))
        draw.rectangle((left, top, right, bottom), outline="white", width=max(2, radius // 2))
    elif places:
        ((x, y),) = places
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill="white", outline="black", width=2)
    return picture


def build_page(models: DemoModels) -> gr.Blocks:
    """The page of these models; nothing is served yet."""
    name = models.student.name
    smallest, largest, step = sides(models)
    with new_page(f"{name}: a student") as page:
        visit = gr.State(Visit(), time_to_live=KEPT_SECONDS)
        gr.Markdown(f"## {_plain(name)}\n{ABOUT}")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                upload = gr.Image(
                    label="Image", sources=["upload", "clipboard"], height=260, elem_id="upload", buttons=[],
                    type="filepath", image_mode=None,
                )  # fmt: skip
                upload.preprocess = uploaded_path  # type: ignore[method-assign]
                side = gr.Slider(
                    smallest, largest, models.student.image_size, step=step, elem_id="side",
                    label="Resolution in pixels",
                    info=f"Side of the student's input; it prefers {models.student.image_size}.",
                )  # fmt: skip
                for sentence in models.left_out.values():
                    gr.HTML(quiet(sentence))
            with gr.Column(scale=2, min_width=300):
                features = gr.HTML(quiet("Drop an image to see its features."), elem_id="features")
        with gr.Row():
            with gr.Column(min_width=300, visible=models.text is not None):
                gr.Markdown("### Which label suits?")
                text = gr.Textbox(
                    label="Labels, parted by commas", placeholder="cat, dog, bicycle", elem_id="labels",
                    lines=2, max_length=MAX_LABELS * (MAX_LETTERS + 2),
                )  # fmt: skip
                compare = gr.Button("Compare", variant="primary", elem_id="compare")
                scores = gr.HTML(elem_id="scores")
            with gr.Column(min_width=300, visible=models.sam is not None):
                gr.Markdown("### Click for a mask")
                kind = gr.Radio([POINT, BOX], value=POINT, label="Mark", elem_id="kind")
                picture = gr.Image(label="Click here", interactive=False, elem_id="picture", buttons=[])
                note = gr.HTML(quiet("SAM's own decoder reads the student's features."), elem_id="note")

        def on_click(visit: Visit, kind: str, event: gr.SelectData) -> tuple[Visit, Image.Image, str]:
            return click(models, visit, kind, event.index)

        def listen(event: Callable[..., Any], function: Callable[..., Any], inputs: list, outputs: list) -> Any:
            # all in one queue: the models work for one visitor at a time
            return event(
                function, inputs, outputs, concurrency_id="models", concurrency_limit=1, api_visibility="private"
            )

        labels_inputs = [visit, side, text]
        for event in (upload.upload, upload.clear):
            shown = listen(event, partial(show_image, models), [upload, side], [visit, features, picture])
            listen(shown.success, partial(show_labels, models, must=False), labels_inputs, [scores])
        moved = listen(side.release, partial(show_features, models), [visit, side], [features])
        listen(moved.success, partial(show_labels, models, must=False), labels_inputs, [scores])
        for event in (compare.click, text.submit):
            listen(event, partial(show_labels, models), labels_inputs, [scores])
        listen(picture.select, on_click, [visit, kind], [visit, picture, note])
    return page


def _plain(text: str) -> str:
    """Text that Markdown and HTML leave as it is."""
    return "".join(f"&#{ord(letter)};" if not letter.isalnum() and letter not in " /-." else letter for letter in text)


def serve(
    student: str,
    teachers: Mapping[str, str] | None = None,
    with_teachers: bool = True,
    host: str | None = "127.0.0.1",
    port: int | None = None,
) -> None:
    """Loads a student and serves its page until Ctrl-C; see `models.load_models` and `serve.launch`."""
    launch(build_page(load_models(student, teachers, with_teachers)), CSS, host, port, MAX_BYTES)

"""`transformers-radio demo`: drop an image, see the student's features beside its teachers', type labels, click masks."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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


class Upload(gr.Image):
    """An image whose file gradio does not open: `read_upload` does, within its bounds."""

    is_template = True  # the browser shows it as it shows a gr.Image

    def preprocess(self, payload: Any) -> str | None:
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
        visit = Visit(read_upload(path))
        return visit, show_features(models, visit, side), visit.image


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


def click(models: DemoModels, visit: Visit, kind: str, place: tuple[int, int]) -> tuple[Visit, Image.Image, str]:
    """A click on the picture: a mask, or the first corner of a box."""
    with told():
        if visit.image is None:
            raise ValueError("There is no image yet: drop one first.")
        if not (0 <= place[0] < visit.image.width and 0 <= place[1] < visit.image.height):
            raise ValueError("The click is outside of the image.")
        if kind == BOX and visit.corner is None:
            visit.corner = place
            return visit, _marked(visit.image, [place]), quiet("Now click the opposite corner.")
        clicks = [place] if visit.corner is None or kind == POINT else [visit.corner, place]
        visit.corner = None
        encoded = ""
        if visit.embedding is None:
            visit.embedding, took = embed_for_masks(models, visit.image)
            encoded = f"{took:.0f} ms for the student, "
        mask, quality, took = draw_mask(models, visit.embedding, (visit.image.height, visit.image.width), clicks)
        colored = colors_image(overlay_masks(pil_to_tensor(visit.image), mask[None]))
        note = f"{mask.float().mean():.0%} of the image; IoU as the decoder predicts it: {quality:.2f}; "
        return visit, _marked(colored, clicks), quiet(f"{note}{encoded}{took:.0f} ms for SAM's decoder")


def _marked(image: Image.Image, clicks: list[tuple[int, int]]) -> Image.Image:
    """The image with its clicks, or with the box between them."""
    image = image.copy()
    draw, radius = ImageDraw.Draw(image), max(2, max(image.size) // 100)
    if len(clicks) == 2:
        (left, right), (top, bottom) = (sorted(values) for values in zip(*clicks, strict=True))
        draw.rectangle((left, top, right, bottom), outline="white", width=max(1, radius // 2))
    else:
        x, y = clicks[0]
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill="white", outline="black")
    return image


def build_page(models: DemoModels) -> gr.Blocks:
    """The page of these models; nothing is served yet."""
    name = models.student.name
    smallest, largest, step = sides(models)
    with new_page(f"{name}: a student") as page:
        visit = gr.State(Visit(), time_to_live=KEPT_SECONDS)
        gr.Markdown(f"## {_plain(name)}\n{ABOUT}")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                upload = Upload(label="Image", sources=["upload", "clipboard"], height=260, elem_id="upload", buttons=[])
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
                picture = gr.Image(label="Click here", interactive=False, elem_id="picture", buttons=[], format="png")
                note = gr.HTML(quiet("SAM's own decoder reads the student's features."), elem_id="note")

        def on_click(visit: Visit, kind: str, event: gr.SelectData) -> tuple[Visit, Image.Image, str]:
            return click(models, visit, kind, tuple(map(int, event.index)))

        def listen(event: Callable[..., Any], function: Callable[..., Any], inputs: list, outputs: list) -> Any:
            # all in one queue: the models work for one visitor at a time
            return event(
                function, inputs, outputs, concurrency_id="models", concurrency_limit=1, api_visibility="private"
            )

        def with_models(function: Callable[..., Any], *more: Any) -> Callable[..., Any]:
            return lambda *inputs: function(models, *inputs, *more)

        labels_inputs = [visit, side, text]
        for event in (upload.upload, upload.clear):
            shown = listen(event, with_models(show_image), [upload, side], [visit, features, picture])
            listen(shown.success, with_models(show_labels, False), labels_inputs, [scores])
        moved = listen(side.release, with_models(show_features), [visit, side], [features])
        listen(moved.success, with_models(show_labels, False), labels_inputs, [scores])
        for event in (compare.click, text.submit):
            listen(event, with_models(show_labels), labels_inputs, [scores])
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

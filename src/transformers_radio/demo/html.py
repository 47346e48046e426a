"""The pages' pieces of HTML. Whatever comes from a visitor or from a student's files is escaped here."""

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
import torch
from PIL import Image

from .parts import LabelScore, Panel

CSS = """
.panels {display: grid; grid-template-columns: repeat(4, 1fr); gap: 14px;}
.panels figure {margin: 0; min-width: 0;}
.panels img {width: 100%; aspect-ratio: 1; object-fit: fill; border-radius: 6px; display: block;}
.panels img.patches {image-rendering: pixelated;}
.panels figcaption {font-size: 13px; line-height: 1.35; margin-top: 4px; overflow-wrap: anywhere;}
.panels figcaption b, .panels figcaption span {display: block;}
.quiet {opacity: 0.72;}
.labels {display: grid; grid-template-columns: minmax(80px, max-content) max-content 1fr; gap: 6px 12px;
  align-items: center; font-size: 14px;}
.labels .name {overflow-wrap: anywhere;}
.labels .bar {background: var(--border-color-primary); border-radius: 4px; height: 14px; overflow: hidden;}
.labels .bar i {display: block; height: 100%; background: #0072B2;}
.facts {display: flex; flex-wrap: wrap; gap: 8px 28px;}
.facts span {display: block; font-size: 12px; opacity: 0.72;}
.facts b {font-size: 18px; font-weight: 600; overflow-wrap: anywhere;}
.legend {display: flex; flex-wrap: wrap; gap: 4px 20px; font-size: 14px;}
.legend i {display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px;}
.steps {display: grid; grid-template-columns: max-content repeat(var(--images), minmax(0, 140px)); gap: 8px;
  align-items: center; font-size: 13px;}
.steps img {width: 100%; aspect-ratio: 1; border-radius: 4px; display: block;}
.steps img.patches {image-rendering: pixelated;}
#picture img {width: 100%; height: min(420px, 80vw); object-fit: scale-down; cursor: crosshair;}
@media (max-width: 640px) {
  .panels {grid-template-columns: repeat(2, 1fr);}
  .labels {grid-template-columns: 1fr max-content;}
  .labels .bar {grid-column: 1 / 3;}
}
"""


def image_tag(image: Image.Image, description: str, css_class: str = "") -> str:
    """An image inside the page itself, as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img class="{css_class}" alt="{escape(description)}" src="data:image/png;base64,{data}">'


def colors_image(colors: torch.Tensor) -> Image.Image:
    """float (h, w, 3) in [0, 1] -> an image with a pixel per patch."""
    return Image.fromarray((255 * colors).round().to(torch.uint8).numpy().astype(np.uint8), "RGB")


def panels_html(image: Image.Image, panels: Sequence[Panel]) -> str:
    """The image beside its features; captions say what each model is and how long it took."""
    side = f"{image.width} × {image.height} px"
    figures = [_figure(image_tag(image, "the image"), "Image", side)]
    for panel in panels:
        took = "" if panel.milliseconds is None else f", {panel.milliseconds:.0f}\u00a0ms"
        tag = image_tag(colors_image(panel.colors), f"features: {panel.title}", "patches")
        figures.append(_figure(tag, panel.title, panel.note + took))
    return f'<div class="panels">{"".join(figures)}</div>'


def _figure(tag: str, title: str, note: str) -> str:
    caption = f'<b>{escape(title)}</b><span class="quiet">{escape(note)}</span>'
    return f"<figure>{tag}<figcaption>{caption}</figcaption></figure>"


def labels_html(scores: Sequence[LabelScore], milliseconds: float) -> str:
    """A row per label: its share as a bar and in percent, and the cosine."""
    rows = "".join(
        f'<span class="name">{escape(score.label)}</span>'
        f'<span>{100 * score.share:.0f} % <span class="quiet">cosine {score.cosine:.2f}</span></span>'
        f'<span class="bar"><i style="width: {100 * score.share:.1f}%"></i></span>'
        for score in scores
    )
    return f'<div class="labels">{rows}</div>{quiet(f"{milliseconds:.0f} ms for the image and the labels")}'


def quiet(text: str) -> str:
    """A sentence that does not ask for attention."""
    return f'<p class="quiet">{escape(text)}</p>'


def facts_html(facts: Sequence[tuple[str, str]]) -> str:
    """(name, value) side by side."""
    cells = "".join(f"<div><span>{escape(name)}</span><b>{escape(value)}</b></div>" for name, value in facts)
    return f'<div class="facts">{cells}</div>'

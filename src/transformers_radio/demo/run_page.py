"""`transformers-radio watch`: the live view of a run, as a page."""

from collections.abc import Sequence
from html import escape
from itertools import cycle
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd
import torch
from PIL import Image, ImageOps

from transformers_radio.evaluation.figure_style import LINE_COLORS

from .html import CSS, colors_image, facts_html, image_tag, quiet
from .run_view import Progress, Watcher, curve, loss_terms
from .serve import launch, new_page

EVERY_SECONDS = 5.0
SILENT_SECONDS = 600.0  # without a new line a run may have stopped
SHOWN = 160  # pixels: side of the images above the features
CURVES = {"loss": "Sum of all losses", "lr": "Learning rate", "images_per_second": "Images per second"}


def facts(now: Progress) -> str:
    """Where the run is, in a line."""
    share = now.step / max(now.total_steps, 1)
    left = "finished" if now.finished else "unknown" if now.seconds_left is None else _duration(now.seconds_left)
    skipped = f"{now.skipped:,}"
    if now.reasons:
        skipped += f" ({', '.join(f'{reason}: {count:,}' for reason, count in sorted(now.reasons.items()))})"
    rows = [("Step", f"{now.step:,} of {now.total_steps:,} ({share:.0%})"), ("Time left", left)]
    if now.stage is not None:
        rows.insert(1, ("Stage", now.stage))
    if now.images_per_second is not None:
        waiting = "" if not now.data_wait else f", {now.data_wait:.0%} waiting for images"
        rows.append(("Speed", f"{now.images_per_second:,.0f} images/s{waiting}"))
    if now.learning_rate is not None:
        rows.append(("Learning rate", f"{now.learning_rate:.3g}"))
    rows.append(("Skipped images", skipped))
    html = facts_html(rows)
    if now.seconds_ago is None:
        return html + quiet("Nothing is logged yet.")
    silent = not now.finished and now.seconds_ago > SILENT_SECONDS
    note = " The run may have stopped: the same command resumes it." if silent else ""
    return html + quiet(f"Last logged {_duration(now.seconds_ago)} ago.{note}")


def _duration(seconds: float) -> str:
    """90061 -> "1 d 1 h", the two largest units."""
    whole = round(seconds)
    parts: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, whole = divmod(whole, size)
        if count or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def losses(lines: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """A row per point of a curve: step, loss, and the term, teacher/head."""
    rows = [(step, value, term) for term in loss_terms(lines) for step, value in curve(lines, term)]
    return pd.DataFrame(rows, columns=["step", "loss", "term"])


def colors_of(lines: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Term -> the color of its curve."""
    return dict(zip(loss_terms(lines), cycle(LINE_COLORS), strict=False))


def legend_html(lines: Sequence[dict[str, Any]]) -> str:
    """Each term's color, name and last value."""
    entries = "".join(
        f'<span><i style="background: {color}"></i>{escape(term)} <b>{points[-1][1]:.3f}</b></span>'
        for term, color in colors_of(lines).items()
        if (points := curve(lines, term))
    )
    return f'<div class="legend">{entries}</div>'


def one_curve(lines: Sequence[dict[str, Any]], name: str) -> pd.DataFrame:
    return pd.DataFrame(curve(lines, name), columns=["step", name])


def checkpoints_html(images: Sequence[Image.Image], pictures: dict[int, list[torch.Tensor]], note: str) -> str:
    """The images, then a row per checkpoint, the newest first."""
    if note or not pictures:
        return quiet(note or "There is no checkpoint yet.")
    small = [ImageOps.fit(image, (SHOWN, SHOWN)) for image in images]
    cells = ["<span></span>", *(image_tag(one, "an image") for one in small)]
    for step, colors in sorted(pictures.items(), reverse=True):
        cells.append(f"<span>step {step:,}</span>")
        cells += [image_tag(colors_image(one), f"features at step {step}", "patches") for one in colors]
    return f'<div class="steps" style="--images: {len(images)}">{"".join(cells)}</div>'


def build_page(watcher: Watcher) -> gr.Blocks:
    """The page of a run; nothing is served yet."""
    name = str(watcher.run)
    with new_page(f"{name}: a run") as page:
        seen = gr.State(None)
        gr.HTML(f"<h2>{escape(name)}</h2>")
        line = gr.HTML(facts(watcher.progress()), elem_id="facts")
        plot: dict[str, Any] = {"x": "step", "height": 260}
        terms = gr.LinePlot(
            losses(watcher.lines), y="loss", color="term", label="Losses per teacher and head", elem_id="losses",
            color_map=colors_of(watcher.lines), colors_in_legend=[], **{**plot, "height": 320},
        )  # fmt: skip
        legend = gr.HTML(legend_html(watcher.lines), elem_id="legend")
        with gr.Row():
            curves = [
                gr.LinePlot(
                    one_curve(watcher.lines, key), y=key, y_title=" ", label=title, min_width=280, elem_id=key, **plot
                )
                for key, title in CURVES.items()
            ]
        gr.HTML("<h3>Features of the student at each checkpoint</h3>")
        pictures = gr.HTML(
            checkpoints_html(watcher.images, dict(watcher.pictures), watcher.note), elem_id="checkpoints"
        )

        def refresh(before: Any) -> list[Any]:
            lines, found = watcher.lines, dict(watcher.pictures)
            now = (len(lines), lines[-1]["step"] if lines else 0, sorted(found))
            if now == before:
                return [now, facts(watcher.progress()), *[gr.skip()] * (3 + len(curves))]
            first = gr.LinePlot(losses(lines), color_map=colors_of(lines))
            plots = [first, legend_html(lines), *(one_curve(lines, key) for key in CURVES)]
            return [now, facts(watcher.progress()), *plots, checkpoints_html(watcher.images, found, watcher.note)]

        for event in (page.load, gr.Timer(EVERY_SECONDS).tick):
            event(
                refresh, [seen], [seen, line, terms, legend, *curves, pictures],
                show_progress="hidden", concurrency_limit=4, api_visibility="private",
            )  # fmt: skip
    return page


def watch(
    run: Path, data: str | None = None, images: int = 4, host: str | None = "127.0.0.1", port: int | None = None
) -> None:
    """Serves the view of a run until Ctrl-C. Training needs its cores more: this takes one.

    Args:
        run: the run's output_dir; it is only read.
        data: images to show features of, as `visualize` takes them; None for the first that the run trains on.
        images: how many; 0 for no features.
        host, port: see `serve.launch`.

    Raises:
        OSError, ValueError: no run, or data that cannot be read.
    """
    torch.set_num_threads(1)
    watcher = Watcher(run, data, images)
    watcher.start(EVERY_SECONDS)
    try:
        launch(build_page(watcher), CSS, host, port, max_bytes=1)
    finally:
        watcher.stop()

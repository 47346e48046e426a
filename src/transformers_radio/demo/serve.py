"""How the pages are served: to this machine alone, with bounded uploads and queues, and nothing from elsewhere."""

from typing import Any

import gradio
from gradio import processing_utils
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware

MAX_WAITING = 16  # events; more are refused
MAX_VISITORS = 64  # whose images are in memory at once
KEPT_SECONDS = 3600  # of what visitors upload
# The browser refuses whatever is not from the page's own server, should a library ask for a font or a script.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; object-src 'none'; base-uri 'self'"
)


class OnlyFromHere:
    """ASGI middleware that puts `POLICY` into the header of every answer."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = POLICY
            await send(message)

        await self.app(scope, receive, send_with_policy)


def new_page(title: str) -> gradio.Blocks:
    """An empty page that reports nothing to anybody; uploads are deleted after `KEPT_SECONDS`."""
    return gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(600, KEPT_SECONDS))


def launch(
    page: gradio.Blocks, css: str, host: str | None, port: int | None, max_bytes: int, block: bool = True
) -> str:
    """Serves a page until Ctrl-C, and returns its address.

    Args:
        host: whom it listens to; "127.0.0.1" is this machine alone. None leaves it to gradio, as Spaces need.
        port: None for the first free one from 7860 on.
        max_bytes: of an uploaded file.
        block: False returns at once; `page.close()` ends it.

    Raises:
        OSError: the port is taken.
    """
    processing_utils.async_ssrf_protected_download = _fetch_nothing
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=1, api_open=False)
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        max_file_size=max_bytes,
        allowed_paths=[],
        state_session_capacity=MAX_VISITORS,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        show_error=False,
        quiet=True,
        theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=css,
        app_kwargs={"middleware": [Middleware(OnlyFromHere)], "docs_url": None, "redoc_url": None},
        prevent_thread_lock=True,
    )
    print(f"{page.title}: {address}  (Ctrl-C ends it)", flush=True)
    if block:
        page.block_thread()
    return address


async def _fetch_nothing(url: str, *_: Any, **__: Any) -> str:
    """In the place of what gradio does with an address that a visitor names instead of a file."""
    raise gradio.Error("Addresses are not fetched: upload the file.", print_exception=False)

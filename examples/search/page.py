"""A local page: words or a picture in, pictures with scores out. Only this machine reaches it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio
from collection import thumbnail
from searcher import Found, Searcher

FONTS = ["system-ui", "sans-serif"]  # the themes' own come from the net


def make_page(searcher: Searcher) -> Any:
    """The page as a ``gradio.Blocks``, not yet served."""

    def shown(found: Found) -> tuple[list[Any], str]:
        tiles = [(thumbnail(item), f"{score:.3f}  {item}") for item, score in found]
        if all(picture is None for picture, _ in tiles):
            return [], f"{found.note}\n```\n{found!r}\n```"
        return [(picture, text) for picture, text in tiles if picture is not None], found.note

    def by_words(text: str, top: int) -> tuple[list[Any], str]:
        try:
            return shown(searcher.words(text, top))
        except ValueError as error:
            return [], str(error)

    def by_picture(path: str | None, top: int) -> tuple[list[Any], str]:
        if path is None:
            return [], ""
        try:
            return shown(searcher.picture(Path(path), top))
        except ValueError as error:
            return [], str(error)

    with gradio.Blocks(title="Search pictures") as page:
        with gradio.Row():
            words = gradio.Textbox(label="Words", placeholder="what the picture shows", elem_id="words", scale=2)
            picture = gradio.Image(
                label="or a picture", type="filepath", sources=["upload"], elem_id="picture", height=160
            )
            top = gradio.Slider(1, 48, value=12, step=1, label="How many")
        note = gradio.Markdown(elem_id="note")
        gallery = gradio.Gallery(label="Found", columns=6, height="auto", elem_id="found", object_fit="contain")
        words.submit(by_words, [words, top], [gallery, note])
        picture.change(by_picture, [picture, top], [gallery, note])
    return page


def serve(searcher: Searcher, port: int | None = None, *, wait: bool = True, browser: bool = True) -> str:
    """Serves the page on 127.0.0.1 and opens a browser; returns its address. ``wait``: until Ctrl-C."""
    page = make_page(searcher)
    theme = gradio.themes.Base(font=FONTS, font_mono=["monospace"])
    _, url, _ = page.launch(
        server_name="127.0.0.1", server_port=port, share=False, inbrowser=browser, prevent_thread_lock=True,
        theme=theme, quiet=True,
    )  # fmt: skip
    print(f"{len(searcher.items)} images at {url} (Ctrl-C ends it)", flush=True)
    if wait:
        page.block_thread()
    return str(url)

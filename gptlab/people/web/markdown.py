"""Replies as HTML that can't hold a script.

Markdown by CommonMark with tables, without raw HTML and without images: what looks like a tag is
shown as text, and nothing is fetched from elsewhere. Links are absolute, of a harmless scheme.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import OptionsDict
from markupsafe import Markup, escape

_SCHEMES = ("https://", "http://", "mailto:")


def render(text: str) -> Markup:
    """The HTML of a whole text."""
    return Markup(_MARKDOWN.render(text))


class Streamed:
    """The HTML of a text that grows: each block is rendered until the next one has begun."""

    def __init__(self) -> None:
        self._tail = ""
        self._returned = False  # whether the text so far ends with half of a \r\n

    def add(self, text: str) -> tuple[str, str]:
        """Takes more text.

        Returns:
          (HTML of the blocks that are complete since the last call, HTML of the block that is
          still growing). Links that a later block defines are found by `render` alone.
        """
        if self._returned and text.startswith("\n"):
            text = text[1:]
        self._returned = text.endswith("\r") or (self._returned and not text)
        # As lines are counted by the parser.
        self._tail = (self._tail + text).replace("\r\n", "\n").replace("\r", "\n")
        # A line that isn't complete may yet belong to another block: '*' begins a list, '**' none.
        complete = self._tail[: self._tail.rfind("\n") + 1]
        blocks = [t for t in _MARKDOWN.parse(complete) if t.level == 0 and t.map is not None]
        settled = ""
        if len(blocks) > 1:
            lines = self._tail.split("\n")
            begin = (blocks[-1].map or [0])[0]
            settled = _MARKDOWN.render("\n".join(lines[:begin]))
            self._tail = "\n".join(lines[begin:])
        return settled, _MARKDOWN.render(self._tail)


def _open_link(
    renderer: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict, env: Any
) -> str:
    tokens[index].attrs |= {"rel": "noopener noreferrer nofollow", "target": "_blank"}
    return renderer.renderToken(tokens, index, options, env)


def _heading(
    renderer: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict, env: Any
) -> str:
    """A reply's headings stand below those of the page."""
    tokens[index].tag = f"h{min(6, int(tokens[index].tag[1]) + 2)}"
    return renderer.renderToken(tokens, index, options, env)


def _cell(
    renderer: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict, env: Any
) -> str:
    """The policy for content forbids style attributes, so that alignment is a class."""
    style = str(tokens[index].attrs.pop("style", ""))
    if style:
        tokens[index].attrs["class"] = f"align-{style.rpartition(':')[2]}"
    return renderer.renderToken(tokens, index, options, env)


def _code(
    renderer: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict, env: Any
) -> str:
    """Code can be scrolled by keyboard."""
    content = escape(tokens[index].content)
    return f'<pre tabindex="0" role="region" aria-label="code"><code>{content}</code></pre>\n'


def _markdown() -> MarkdownIt:
    made = MarkdownIt("commonmark", {"html": False, "linkify": False})
    made.enable(["table", "strikethrough"]).disable(["image", "html_block", "html_inline"])
    made.validateLink = lambda url: url.lower().startswith(_SCHEMES)  # type: ignore[method-assign]
    for name, rule in (
        ("link_open", _open_link),
        ("heading_open", _heading),
        ("heading_close", _heading),
        ("th_open", _cell),
        ("td_open", _cell),
        ("fence", _code),
        ("code_block", _code),
    ):
        made.add_render_rule(name, rule)
    return made


_MARKDOWN = _markdown()

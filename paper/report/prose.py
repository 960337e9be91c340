"""The Markdown of this repository's documents -> HTML, by markdown-it: what a page that stands alone needs changed."""

from __future__ import annotations

from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup

WEB = ("http://", "https://", "#", "mailto:")


def to_html(text: str, item: str = "", top: int = 1) -> Markup:
    """`item`: numbered items get the id <item>-<number>; `top`: the level of the first heading.

    A link to another file of the repository leads nowhere from a page that stands alone: its name stays.
    """
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = markdown.parse(text)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{int(token.tag[1:]) + top - 1}"
        elif token.type == "list_item_open" and token.info and item:
            token.attrSet("id", f"{item}-{token.info}")
        elif token.type == "inline":
            token.children = _without_dead_links(token.children)
    html = markdown.renderer.render(tokens, markdown.options, {})
    return Markup(html.replace("<table>", '<div class="scroll"><table>').replace("</table>", "</table></div>"))


def _without_dead_links(tokens: list[Token]) -> list[Token]:
    kept, dead = [], []  # whether each link that is open is dead
    for token in tokens:
        if token.type == "link_open":
            dead.append(not str(token.attrGet("href")).startswith(WEB))
        alive = not (token.type in ("link_open", "link_close") and dead[-1])
        kept += [token] if alive else []
        if token.type == "link_close":
            dead.pop()
    return kept

"""The Markdown of this repository's documents -> HTML: headings, paragraphs, lists, tables, code, emphasis, links.

A line that begins a block at the margin ends the block before it; a list's continuation lines are indented.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable

BLOCK = re.compile(r"(?P<heading>#{1,6}) |(?P<number>\d+)\. |(?P<bullet>[*-]) |(?P<fence>```)|(?P<table>\|)")
CODE = "\0"  # stands for a piece of code while the rest is emphasised
WEB = ("http://", "https://", "#", "mailto:")


def to_html(text: str, item: str = "", top: int = 1) -> str:
    """`item`: numbered items get the id <item>-<number>; `top`: the level of the first heading."""
    parts, lines = [], text.splitlines()
    while lines:
        found = BLOCK.match(lines[0])
        kind = found.lastgroup if found else "text"
        block = _take(lines, FENCED if kind == "fence" else kind)
        parts.append(_block(kind, block, item, top))
    return _joined("\n".join(part for part in parts if part))


FENCED = "fence"


def _take(lines: list[str], kind: str) -> list[str]:
    """The lines of the block that comes first, off `lines`."""
    first = lines.pop(0)
    if not first.strip() or kind == "heading":
        return [first]
    end = 0
    while end < len(lines) and not _ends(lines[end], kind):
        end += 1
    block = [first, *lines[:end]]
    del lines[: end + (kind == FENCED)]
    return block


def _ends(line: str, kind: str) -> bool:
    if kind == FENCED:
        return line.startswith("```")
    if kind == "table":
        return not line.startswith("|")
    return not line.strip() or bool(BLOCK.match(line))


def _block(kind: str, lines: list[str], item: str, top: int) -> str:
    """One block as HTML; nothing for an empty line."""
    if kind in WRITERS:
        return WRITERS[kind](lines)
    text = inline("\n".join(line.strip() for line in lines))
    if kind == "heading":
        marks, _, title = text.partition(" ")
        return f"<h{len(marks) + top - 1}>{title}</h{len(marks) + top - 1}>"
    if kind == "number":
        number, _, rest = text.partition(". ")
        name = f' id="{item}-{number}"' if item else ""
        return f'<ol start="{number}">\n<li{name}>{rest}</li>\n</ol>'
    if kind == "bullet":
        return f"<ul>\n<li>{text[2:]}</li>\n</ul>"
    return f"<p>{text}</p>" if text.strip() else ""


def _code(lines: list[str]) -> str:
    return f"<pre>{html.escape(chr(10).join(lines[1:]))}</pre>"


def _table(lines: list[str]) -> str:
    head, _, *body = [[inline(cell.strip()) for cell in line.strip("| ").split("|")] for line in lines]
    rows = [_row(head, "th"), *(_row(cells, "td") for cells in body)]
    return '<div class="scroll"><table>\n' + "\n".join(rows) + "\n</table></div>"


def _row(cells: list[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"


WRITERS: dict[str, Callable[[list[str]], str]] = {"fence": _code, "table": _table}


def _joined(text: str) -> str:
    """Neighbouring items in one list."""
    return re.sub(r'</ol>\n<ol start="\d+">\n|</ul>\n<ul>\n', "", text)


def inline(text: str) -> str:
    """Code, bold, emphasis and links; nothing is emphasised inside of code."""
    codes = re.findall(r"`([^`]+)`", html.escape(text, quote=False))
    text = _emphasis(re.sub(r"`[^`]+`", CODE, html.escape(text, quote=False)))
    for code in codes:
        text = text.replace(CODE, f"<code>{code}</code>", 1)
    return text


def _emphasis(text: str) -> str:
    text = re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", _link, text)
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text, flags=re.DOTALL)
    return re.sub(r"(?<!\w)\*(\S(?:.*?\S)?)\*(?!\w)", r"<em>\1</em>", text, flags=re.DOTALL)


def _link(found: re.Match[str]) -> str:
    """A link to another file of the repository leads nowhere from a page that stands alone: its name stays."""
    name, target = found.groups()
    return f'<a href="{target}">{name}</a>' if target.startswith(WEB) else name

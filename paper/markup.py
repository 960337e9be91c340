"""A table of strings as Markdown and as LaTeX."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

TEX = {"\\": r"\textbackslash{}", "±": r"$\pm$", "×": r"$\times$", "|": r"\textbar{}", "–": "--"}
ESCAPES = str.maketrans({**TEX, **{character: "\\" + character for character in "%&_#${}"}})
WIDE = 6  # columns; a wider table is scaled to the line in LaTeX


@dataclass(frozen=True)
class Sheet:
    """What a table shows. A line of the body is a row of cells, or a string: the title of the rows that follow."""

    name: str
    title: str
    columns: Sequence[tuple[str, str]]  # group (may be empty) and name
    body: Sequence[Sequence[str] | str]
    footnotes: Sequence[str]  # [1], [2], ...
    legend: Sequence[str]
    widths: Sequence[float] = ()  # of columns of prose in LaTeX, in line widths; none: as wide as their text


class Footnotes(list):
    """Texts in the order in which they were first asked for."""

    def marks(self, texts: Iterable[str]) -> str:
        """` [2]` for each distinct text, which joins the footnotes where it is new."""
        marks = ""
        for text in dict.fromkeys(text for text in texts if text):
            if text not in self:
                self.append(text)
            marks += f" [{self.index(text) + 1}]"
        return marks


def markdown(sheet: Sheet) -> str:
    """Columns aligned, so that it reads well as plain text, too."""
    head = [f"{group}: {name}" if group and name else group or name for group, name in sheet.columns]
    blank = [""] * (len(head) - 1)
    body = [[f"**{line}**", *blank] if isinstance(line, str) else line for line in sheet.body]
    lines = [[_escape(text) for text in line] for line in [head, *body]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    rows = ["| " + " | ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)) + " |" for line in lines]
    rows.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n\n".join([f"**{sheet.title}**", "\n".join(rows), *_numbered(sheet), *sheet.legend]) + "\n"


def _escape(text: str) -> str:
    """A star ends a method's name (MixMask*): only paired ones are Markdown's."""
    return text.replace("|", "\\|") if text.startswith("**") else text.replace("|", "\\|").replace("*", "\\*")


def latex(sheet: Sheet) -> str:
    """For booktabs, and graphicx where the table is wide."""
    wide = len(sheet.columns) > WIDE
    layout = "".join(rf"p{{{width}\linewidth}}" for width in sheet.widths) or "l" * len(sheet.columns)
    star = "*" if wide else ""
    lines = [
        r"% \usepackage{booktabs, graphicx}",
        rf"\begin{{table{star}}}",
        r"\centering",
        rf"\caption{{{_tex(_caption(sheet.title))}}}",
        rf"\label{{tab:{sheet.name}}}",
        *([r"\resizebox{\linewidth}{!}{%"] if wide else []),
        rf"\begin{{tabular}}{{{layout}}}",
        r"\toprule",
        *_tex_groups(sheet),
        " & ".join(_tex(name) for _, name in sheet.columns) + r" \\",
        r"\midrule",
        *(_tex_line(line, len(sheet.columns)) for line in sheet.body),
        r"\bottomrule",
        r"\end{tabular}" + ("}" if wide else ""),
        r"\par\medskip\footnotesize\raggedright",
        *(_tex(text) + r"\par" for text in [*_numbered(sheet), *sheet.legend]),  # after \\ a [ would be its argument
        rf"\end{{table{star}}}",
    ]
    return "\n".join(lines) + "\n"


def _caption(title: str) -> str:
    """LaTeX numbers its tables itself."""
    text = title.partition(": ")[2] or title
    return text[:1].upper() + text[1:]


def _tex_groups(sheet: Sheet) -> list[str]:
    """The line of the columns' groups and the rules under them; nothing where no column has one."""
    spans: list[list] = []  # group, first column, last column
    for number, (group, _) in enumerate(sheet.columns, 1):
        if spans and group and spans[-1][0] == group:
            spans[-1][2] = number
        else:
            spans.append([group, number, number])
    if not any(group for group, _, _ in spans):
        return []
    heads = [rf"\multicolumn{{{last - first + 1}}}{{c}}{{{_tex(group)}}}" for group, first, last in spans]
    rules = [rf"\cmidrule(lr){{{first}-{last}}}" for group, first, last in spans if group]
    return [" & ".join(heads) + r" \\", " ".join(rules)]


def _tex_line(line: Sequence[str] | str, columns: int) -> str:
    if isinstance(line, str):
        return rf"\multicolumn{{{columns}}}{{l}}{{\textit{{{_tex(line)}}}}} \\"
    return " & ".join(_tex(text) for text in line) + r" \\"


def _numbered(sheet: Sheet) -> list[str]:
    return [f"[{number}] {text}" for number, text in enumerate(sheet.footnotes, 1)]


def _tex(text: str) -> str:
    return text.translate(ESCAPES)

"""A table of strings as Markdown and as LaTeX."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

TEX = {"\\": r"\textbackslash{}", "±": r"$\pm$", "×": r"$\times$", "|": r"\textbar{}", "–": "--"}
ESCAPES = str.maketrans({**TEX, **{character: "\\" + character for character in "%&_#${}"}})
WIDE = 60  # characters; a wider table takes both columns of a page in LaTeX
ROWS = 4  # of prose, on a page
FIT = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"  # scaled to the line where it is wider


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
    """For booktabs and graphicx, in documents of one column and of two. A long table of prose is several."""
    if sheet.widths and len(sheet.body) > ROWS:
        return "\n".join(latex(part) for part in _parts(sheet))
    lines = [[name for _, name in sheet.columns], *(line for line in sheet.body if not isinstance(line, str))]
    characters = sum(max(map(len, column)) for column in zip(*lines, strict=True))
    layout = "".join(rf"p{{\dimexpr {width}\linewidth-2\tabcolsep}}" for width in sheet.widths)
    star = "*" if sheet.widths or characters > WIDE else ""
    table = [
        r"\footnotesize\raggedright\sloppy" if sheet.widths else FIT,
        rf"\begin{{tabular}}{{{layout or 'l' * len(sheet.columns)}}}",
        r"\toprule",
        *_tex_groups(sheet),
        " & ".join(_tex(name) for _, name in sheet.columns) + r" \\",
        r"\midrule",
        *(_tex_line(line, len(sheet.columns), bool(sheet.widths)) for line in sheet.body),
        r"\bottomrule",
        r"\end{tabular}" + ("" if sheet.widths else "}"),
    ]
    lines = [
        r"% \usepackage{booktabs, graphicx}",
        rf"\begin{{table{star}}}",
        r"\centering",
        rf"\caption{{{_tex(_caption(sheet.title))}}}",
        rf"\label{{tab:{sheet.name}}}",
        *(table if sheet.body else []),
        r"\par\medskip\footnotesize\raggedright",
        *(_tex(text) + r"\par" for text in [*_numbered(sheet), *sheet.legend]),  # after \\ a [ would be its argument
        rf"\end{{table{star}}}",
    ]
    return "\n".join(lines) + "\n"


def _parts(sheet: Sheet) -> list[Sheet]:
    """Tables of at most ROWS lines; what stands under the table is the last of them."""
    bodies = [*(sheet.body[start : start + ROWS] for start in range(0, len(sheet.body), ROWS)), []]
    last = len(bodies) - 1
    return [
        replace(
            sheet,
            name=f"{sheet.name}-{number + 1}" if number else sheet.name,
            title=f"{sheet.title} ({number + 1} of {last + 1})",
            body=body,
            footnotes=sheet.footnotes if number == last else (),
            legend=sheet.legend if number == last else (),
        )
        for number, body in enumerate(bodies)
    ]


def _caption(title: str) -> str:
    """LaTeX numbers its tables itself."""
    text = re.sub(r"^(Table|Figure) \d+: ", "", title)
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


def _tex_line(line: Sequence[str] | str, columns: int, prose: bool = False) -> str:
    if isinstance(line, str):
        return rf"\multicolumn{{{columns}}}{{l}}{{\textit{{{_tex(line)}}}}} \\"
    if prose:  # in columns of a fixed width commands are broken, too
        line = [re.sub(r"([/,=_])(?=\S)", "\\1\0", text) for text in line]
        cells = [r"\raggedright " + _tex(text).replace("\0", r"\allowbreak{}") for text in line]
        return " & ".join(cells) + r" \tabularnewline"
    return " & ".join(_tex(text) for text in line) + r" \\"


def _numbered(sheet: Sheet) -> list[str]:
    return [f"[{number}] {text}" for number, text in enumerate(sheet.footnotes, 1)]


def _tex(text: str) -> str:
    return text.translate(ESCAPES)

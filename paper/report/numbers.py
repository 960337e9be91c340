"""Tables of numbers and of settings as HTML: the published value beside ours, a word and a colour for what it means."""

from __future__ import annotations

import html
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import pandas as pd

from paper import comparisons
from paper.cells import Heading, Table
from paper.collect import NO_RUN, NOT_IMPLEMENTED, PUBLIC_ONLY, UNREADABLE
from paper.markup import Footnotes, Sheet
from paper.presets import presets
from paper.report.records import Runs, definitions

# What a number can be, in the order in which the summary counts them; colours in style.css.
STATES = {
    "agrees": "agrees",
    "differs": "differs",
    "undecided": "undecided",
    "incomparable": "not comparable",
    "absent": "not run",
    "public": "public checkpoint, not run",
    "unbuilt": "not implemented",
    "unreadable": "unreadable result",
    "ours": "ours alone",
}
WITHOUT_NUMBER = {NO_RUN: "absent", PUBLIC_ONLY: "public", NOT_IMPLEMENTED: "unbuilt", UNREADABLE: "unreadable"}
MEANING = {
    "agrees": "the published value fits our seeds, and a difference of one point would have been seen",
    "differs": "it does not: the 95 % interval of the difference leaves out zero, as it does by chance once in 20",
    "undecided": "one seed, or too few for their noise to see a difference of one point",
    "incomparable": "a run of another budget (smoke: embedded photographs, a small net): never a replication",
    "ours": "besides: numbers of ours where the paper prints none",
    "absent": "no finished run",
    "public": "the method is not implemented here; its authors' checkpoint can be measured",
    "unbuilt": "the method is not implemented here",
    "unreadable": "the result of a run is damaged; the reason stands behind the number",
}


def state(cell: pd.Series) -> str:
    """A key of STATES."""
    if not cell["n"]:
        return WITHOUT_NUMBER[cell["state"]]
    if pd.isna(cell["published"]):
        return "ours"
    return cell["word"] or "incomparable"


def count(frames: Iterable[pd.DataFrame]) -> Counter[str]:
    """How many of the numbers that the paper prints are in each state; `ours`: how many of ours stand by themselves."""
    cells = [cell for frame in frames for _, cell in frame.iterrows()]
    return Counter(state(cell) for cell in cells if pd.notna(cell["published"]) or cell["n"])


def ours(cell: pd.Series) -> str:
    """`69.0 ± 0.3`."""
    return f"{cell['ours_mean']:.1f}" + (f" ± {cell['ours_std']:.1f}" if cell["n"] > 1 else "")


def words(cell: pd.Series) -> str:
    """What the badge says."""
    kind = state(cell)
    if kind == "ours" and cell["against"]:
        return f"{cell['preset']}: {comparisons.words(cell)} from {cell['against']}"
    if kind == "incomparable" or (kind == "ours" and cell["preset"] != "paper"):
        return f"{STATES[kind]} ({cell['preset']})"
    return comparisons.words(cell) or STATES[kind]


# ------------------------------------------------------------------------------------------------------- tables


def table(source: Table, frame: pd.DataFrame, runs: Runs) -> str:
    """The paper's layout in a box that scrolls, its footnotes, and what is behind each number."""
    notes, cells = Footnotes(), {(cell["row"], cell["column"]): cell for _, cell in frame.iterrows()}
    rows, group = [], ""
    for row in source.rows:
        if row.group != group:
            group = row.group
            rows.append(f'<tr class="group"><th colspan="{len(source.columns) + 1}">{html.escape(group)}</th></tr>')
        rows.append(_row(row, [cells.get((row.label, column.label)) for column in source.columns], notes))
    head = _head([(column.group, column.name) for column in [Heading(""), *source.columns]])
    behind = "\n".join(details(cell, runs) for _, cell in frame.iterrows())
    title = f"Behind each number ({len(frame)})"
    about = f"<p>{html.escape(scale(source))}</p>" if source.scale else ""
    below = _footnotes(notes) + _legend(source, frame)
    return f"{about}{_box(head, rows)}{below}<details><summary>{title}</summary>\n{behind}</details>"


def scale(source: Table) -> str:
    """What a table of another scale than the paper's must say above its numbers."""
    return f"{source.title}. {source.scale.capitalize()}: {source.about}."


def _legend(source: Table, frame: pd.DataFrame) -> str:
    """What was measured, and what each preset that occurs means."""
    metrics = ", ".join(f"<code>{html.escape(name)}</code>" for name in dict.fromkeys(frame["metric"]))
    used = [name for name in presets() if any(frame["preset"].str.split(",").str[0] == name)]
    texts = [f"Metric: {metrics}.", "Ours: mean ± standard deviation over n seeds." if any(frame["n"] > 1) else ""]
    texts += map(html.escape, comparisons.legend(source, frame))
    texts += [f"Preset {name}: {html.escape(presets()[name].about)}." for name in used]
    return f'<p class="notes">{" ".join(filter(None, texts))}</p>'


def _row(row: Heading, cells: Sequence[pd.Series | None], notes: Footnotes) -> str:
    name = html.escape(row.name + notes.marks(cell["note"] for cell in cells if cell is not None))
    return f"<tr><th>{name}</th>{''.join(_number(cell, notes) for cell in cells)}</tr>"


def _number(cell: pd.Series | None, notes: Footnotes) -> str:
    if cell is None:
        return "<td></td>"
    mark = notes.marks([_origin(cell)])
    published = f'<span title="published">{cell["published"]:.1f}{mark}</span>' if pd.notna(cell["published"]) else ""
    own = f'<b title="ours">{ours(cell)}{notes.marks([cell["remark"]])}</b>' if cell["n"] else ""
    size = f"n = {cell['n']}" + (f", {_epochs(cell)}" if _epochs(cell) else "") if cell["n"] else ""
    link, text = html.escape(cell["cell"]), html.escape(searchable(cell))
    return (
        f'<td class="cell {state(cell)}" data-text="{text}"><a href="#{link}">'
        f'<span class="pair">{published}{own}</span>'
        f'<small>{size}</small><span class="badge">{html.escape(words(cell))}</span></a></td>'
    )


def _epochs(cell: pd.Series) -> str:
    """Of our pre-training; nothing where there is none, or none of ours."""
    return f"{cell['epochs']:.0f} epochs" if pd.notna(cell["epochs"]) else ""


def _origin(cell: pd.Series) -> str:
    return "" if cell["origin"] in ("own", "") else f"published value {cell['origin']}: {cell['source']}"


def searchable(cell: pd.Series) -> str:
    """All that the search box looks at; `is:published` and `is:agrees` (or another state) are exact."""
    exact = f"is:{state(cell)}" + (" is:published" if pd.notna(cell["published"]) else "")
    place = [cell["cell"], cell["row"], cell["column"], exact]
    return " ".join([*place, words(cell), cell["metric"], cell["preset"], cell["runs"]]).lower()


def details(cell: pd.Series, runs: Runs) -> str:
    """A number's provenance: what it is, and the runs that it comes from."""
    names = list(dict.fromkeys(itertools.chain.from_iterable(map(runs.chain, cell["runs"].split()))))
    facts = {
        "cell": cell["cell"],
        "published": f"{cell['published']:.1f}" if pd.notna(cell["published"]) else "nothing",
        "origin": _origin(cell),
        "ours": f"{ours(cell)} (preset {cell['preset']}, n = {cell['n']})" if cell["n"] else words(cell),
        "difference": comparisons.words(cell),
        "95 % interval": f"{cell['low']:+.1f} to {cell['high']:+.1f}" if pd.notna(cell["low"]) else "",
        "to decide": cell["to_decide"],
        "metric": cell["metric"],
        "pre-training": _epochs(cell),
        "note": "; ".join(filter(None, [cell["note"], cell["remark"]])),
        "launch": f"python slurm/launch.py {cell['cell']}" if cell["state"] != NOT_IMPLEMENTED else "",
    }
    links = "".join(
        f'<div class="run" data-run="{n}"><a href="#run/{n}">{n}</a></div>' for n in map(html.escape, names)
    )
    title = f"{html.escape(cell['row'])} · {html.escape(cell['column'])}"
    name, badge = html.escape(cell["cell"]), f'<span class="badge">{html.escape(words(cell))}</span>'
    return (
        f'<details id="{name}" class="behind {state(cell)}" data-text="{html.escape(searchable(cell))}">'
        f'<summary>{title} {badge}</summary><p><a href="#{name}">link to this number</a>, '
        f'<a href="#{cell["cell"].split("/")[0]}">back to the table</a></p>{definitions(facts)}{links}</details>'
    )


def sheet(source: Sheet) -> str:
    """A table of settings."""
    rows = [_settings(line) for line in source.body]
    legend = "".join(f"<p>{html.escape(text)}</p>" for text in source.legend)
    return _box(_head(source.columns), rows) + _footnotes(source.footnotes) + legend


def _settings(line: Sequence[str]) -> str:
    cells = "".join(f"<td>{html.escape(text)}</td>" for text in line)
    return f'<tr data-text="{html.escape(" ".join(line).lower())}">{cells}</tr>'


def _head(columns: Sequence[tuple[str, str]]) -> str:
    """The columns' names, under their groups where there are any."""
    names = "".join(f"<th>{html.escape(name)}</th>" for _, name in columns)
    if not any(group for group, _ in columns):
        return f"<tr>{names}</tr>"
    spans = [(group, len(list(part))) for group, part in itertools.groupby(group for group, _ in columns)]
    groups = "".join(f'<th colspan="{n}">{html.escape(group)}</th>' for group, n in spans)
    return f'<tr class="groups">{groups}</tr><tr>{names}</tr>'


def _box(head: str, rows: Sequence[str]) -> str:
    body = "\n".join(rows)
    return f'<div class="scroll" tabindex="0"><table><thead>{head}</thead>\n<tbody>{body}</tbody></table></div>\n'


def _footnotes(notes: Sequence[str]) -> str:
    texts = "".join(f"<p>[{number}] {linked(text)}</p>" for number, text in enumerate(notes, 1))
    return f'<div class="notes">{texts}</div>' if texts else ""


def linked(text: str) -> str:
    """The ledger, where it is named, as a link to the ledger."""
    return re.sub(r"docs/fidelity\.md", '<a href="#fidelity">docs/fidelity.md</a>', html.escape(text))

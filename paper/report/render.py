"""The page's templates (jinja2), which escape all that they are given but Markup."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

PIECES = Path(__file__).resolve().parent


@functools.cache
def _environment() -> Environment:
    loader, look = FileSystemLoader(PIECES), {"trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, **look)
    environment.filters["linked"] = _linked
    return environment


def _linked(text: str) -> Markup:
    """The ledger, where it is named, as a link to the ledger."""
    name = "docs/fidelity.md"
    return escape(text).replace(name, Markup(f'<a href="#fidelity">{name}</a>'))


def render(template: str, **values: Any) -> Markup:
    """`page.html` with these values."""
    return Markup(_environment().get_template(template).render(**values))


def piece(name: str) -> Markup:
    """A style sheet or a script, as it is."""
    return Markup((PIECES / name).read_text(encoding="utf-8"))

"""What the site has besides the pages of docs/: README, API, commands and report; links that leave docs/.

MkDocs calls the functions that begin with `on_`. Equations, $$ in a paragraph of its own as GitHub shows them, become
MathML, which browsers set without a script.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import posixpath
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import mixmask

ROOT = Path(__file__).resolve().parents[1]
COPIED = {  # pages that lie elsewhere in the repository, because that is where one looks for them
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "results/README.md": "results.md",
}
SCRIPTS = [
    "slurm/launch.py",
    "pretrain/train.py",
    "eval/knn.py",
    "eval/linear.py",
    "eval/finetune.py",
    "eval/features.py",
    "detection/convert.py",
    "detection/train.py",
    "paper/make_tables.py",
    "paper/make_figures.py",
    "paper/make_report.py",
    "paper/compare.py",
    "paper/keep.py",
    "paper/publish.py",
    "benchmarks/run.py",
    "benchmarks/gpu.py",
]
FENCED = re.compile(r"(^```.*?^```)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
EQUATION = re.compile(r"^\$\$\n(.*?)\n\$\$$", re.DOTALL | re.MULTILINE)


def on_startup(**_: Any) -> None:
    """The scripts import each other from the root."""
    sys.path.insert(0, str(ROOT))


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Every module of the library is a page of the API."""
    (extend,) = [part["Extend"] for part in config.nav if "Extend" in part]
    extend[-1] = {"API": [{name: page_of(name)} for name in modules()]}
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    pages = {page: (ROOT / name).read_text(encoding="utf-8") for name, page in COPIED.items()}
    pages |= {page_of(name): f"# {name}\n\n::: {name}\n" for name in modules()}
    pages[page_of("mixmask")] += exported()
    pages["commands.md"] = commands()
    pages["numbers.html"] = report()  # report.html is the page of docs/report.md
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links lead to pages of the site, or to the source; equations are MathML."""
    source = {page: name for name, page in COPIED.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    parts = FENCED.split(EQUATION.sub(lambda match: convert(match[1], display="block"), markdown))
    parts[::2] = [LINK.sub(lambda match: link(match, source, page, config, files), part) for part in parts[::2]]
    return "".join(parts)


def link(match: re.Match[str], source: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A link of the repository's file `source` as the page needs it: one to code is plain where no source is known."""
    image, text, target = match.groups()
    name, hash_, anchor = target.partition("#")
    if not name or "://" in name or name.startswith("mailto:"):
        return match[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), name))
    wanted = COPIED.get(path, path.removeprefix("docs/"))
    if files.get_file_from_path(wanted):
        relative = posixpath.relpath(wanted, posixpath.dirname(page.file.src_uri) or ".")
        return f"{image}[{text}]({relative}{hash_}{anchor})"
    if not (ROOT / path).exists():
        return match[0]  # MkDocs complains
    kind = "tree" if (ROOT / path).is_dir() else "blob"
    return f"[{text}]({config.repo_url.rstrip('/')}/{kind}/main/{path})" if config.repo_url else text


def modules() -> list[str]:
    """The library's, by name."""
    paths = sorted((ROOT / "mixmask").rglob("*.py"))
    return [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]


def page_of(module: str) -> str:
    return f"api/{module}.md"


def exported() -> str:
    """The names that `import mixmask` offers, and where each is described."""
    lines = [f"| `mixmask.{name}` | [mixmask.{home}](mixmask.{home}.md) |" for name, home in mixmask.HOME.items()]
    return "\n".join(["\n| name | described in |", "|---|---|", *lines, ""])


def commands() -> str:
    """What each script says of itself."""
    sections = [f"## {script}\n\n```\n{usage(script)}\n```\n" for script in SCRIPTS]
    return "\n".join(["# Commands\n\nEvery script's `--help`.\n", *sections])


def usage(script: str) -> str:
    """A script's --help, asked of its `main` in this process: starting each by itself would take a minute."""
    main = importlib.import_module(script.removesuffix(".py").replace("/", ".")).main
    shown, columns, words = io.StringIO(), os.environ.get("COLUMNS"), sys.argv
    os.environ["COLUMNS"], sys.argv = "100", [script, "--help"]
    try:
        with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
            main()
    finally:
        sys.argv = words
        os.environ.pop("COLUMNS") if columns is None else os.environ.update(COLUMNS=columns)
    return shown.getvalue().rstrip()


def report() -> str:
    """The report over results/, one page by itself."""
    from paper import make_report

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        make_report.main(["--runs-dir", str(ROOT / "results"), "--out", f"{folder}/report.html"])
        return Path(folder, "report.html").read_text(encoding="utf-8").replace(f"{ROOT}/", "")

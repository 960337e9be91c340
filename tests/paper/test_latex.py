"""The tables in LaTeX: they compile, fit the column in documents of one and of two, and have captions of their own."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from paper import make_tables

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> Path:
    """Every table as it stands with the runs in results/, the paper's claims among them."""
    out = tmp_path_factory.mktemp("tables")
    for targets in ([], ["claims"]):
        make_tables.main([*targets, "--runs-dir", str(ROOT / "results"), "--out", str(out)])
    return out


def test_every_caption_and_label_is_its_own(tables):
    text = "\n".join(path.read_text(encoding="utf-8") for path in tables.glob("*.tex"))
    for command in ("caption", "label"):
        found = re.findall(rf"\\{command}\{{(.*)\}}$", text, re.MULTILINE)
        assert len(found) > 15 and len(set(found)) == len(found)


@pytest.mark.parametrize("option", ["", "twocolumn"])
def test_all_tables_compile_and_none_is_wider_than_its_line_or_longer_than_its_page(option, tables, tmp_path):
    if not shutil.which("pdflatex") or not shutil.which("kpsewhich"):
        pytest.skip("needs pdflatex (Debian: texlive-latex-recommended)")
    if subprocess.run(["kpsewhich", "booktabs.sty"], capture_output=True).returncode:
        pytest.skip("needs booktabs (Debian: texlive-latex-recommended)")
    inputs = "".join(rf"\input{{{path}}}\clearpage" for path in sorted(tables.glob("*.tex")))
    head = rf"\documentclass[{option}]{{article}}\usepackage{{booktabs,graphicx}}"
    (tmp_path / "all.tex").write_text(rf"{head}\begin{{document}}{inputs}\end{{document}}")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=100)
    assert done.returncode == 0, done.stdout[-2000:]
    complaints = re.findall(r"Overfull \\hbox.*|.*Float too large.*|.*multiply defined.*", done.stdout)
    assert not complaints

"""The documents: every link and anchor leads somewhere, nothing generated is stale, what is shown runs."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import yaml
from scipy import stats

import mixmask
from mixmask.config import UserError

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("results/*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
EXAMPLES = ("paper/cells/table12.yaml", "mixmask/frameworks/dcl.py", "mixmask/datasets/imagenette.py")
NAMES = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]


def script(path):
    """A file that belongs to no package, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def generate():
    return script(ROOT / "docs" / "generate.py")


def prose(path):
    """The document without its code."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`]*`", "", text)


def anchors(path):
    """As GitHub makes them from headings."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_every_relative_link_and_anchor_leads_somewhere(document):
    for link in LINK.findall(prose(document)):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        assert target.exists(), f"{document.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{document.name}: {link}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_every_file_that_a_document_names_exists(document):
    folders = "mixmask|pretrain|eval|detection|slurm|paper|docs|tests|examples|benchmarks"
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for name in re.findall(rf"`((?:{folders})/[\w./]+\.(?:py|yaml|md))`", text):
        known = (ROOT / name).exists() or "NAME" in name or name in EXAMPLES
        assert known, f"{document.name}: {name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_nothing_generated_is_stale(document, generate):
    old = document.read_text(encoding="utf-8")
    assert old == generate.current(document, old), f"python docs/generate.py writes {document.name} anew"


def test_a_stale_block_is_found_and_brought_up_to_date(tmp_path, generate, monkeypatch):
    monkeypatch.setattr(generate, "BLOCKS", {"twice": lambda word: f"{word} {word}"})
    text = "a\n<!-- generated: twice x -->\nold\n<!-- end -->\nb"
    new = generate.current(tmp_path / "x.md", text)
    assert new == "a\n<!-- generated: twice x -->\nx x\n<!-- end -->\nb"
    assert new == generate.current(tmp_path / "x.md", new)
    with pytest.raises(UserError, match="unknown block 'thrice'"):
        generate.current(tmp_path / "x.md", text.replace("twice", "thrice"))


def test_two_blocks_of_a_document_are_two_even_where_the_first_has_no_argument(tmp_path, generate, monkeypatch):
    monkeypatch.setattr(generate, "BLOCKS", {"one": lambda: "1", "two": lambda word: word})
    text = "<!-- generated: one -->\n<!-- end -->\na\n<!-- generated: two b -->\n<!-- end -->\n"
    expected = "<!-- generated: one -->\n1\n<!-- end -->\na\n<!-- generated: two b -->\nb\n<!-- end -->\n"
    assert generate.current(tmp_path / "x.md", text) == expected


def test_the_costs_are_those_that_the_launcher_prints(generate, capsys):
    from slurm import launch

    launch.main(["table7", "--dry-run"])
    (printed,) = [line.split()[3] for line in capsys.readouterr().out.splitlines() if line.startswith("table7 ")]
    (row,) = [line for line in generate.costs().splitlines() if line.startswith("| `table7` ")]
    *_, runs, hours, _ = row.replace(",", "").split("|")
    assert int(runs) == 40 and float(hours) == pytest.approx(float(printed), abs=0.6)  # conversions take no GPU


def test_the_results_block_counts_all_142_numbers(generate):
    rows = [line.split(" | ") for line in generate.results().splitlines()[2:]]
    assert len(rows) == 7 and sum(int(row[1]) for row in rows) == 142


def test_a_change_is_the_t_interval_of_what_each_seed_gained(generate):
    def knn(method, of):
        paths = sorted((ROOT / "results/pretrain").glob(f"cifar100_reduced_moco-{method}-{of}-s[0-2]/result.json"))
        metrics = [json.loads(path.read_text())["metrics"] for path in paths]
        return np.array([values["knn_k200_t0.1_out128_last"] for values in metrics])

    lead = {
        6: knn("mixmask", "e6-3726b66f") - knn("vanilla", "e6-85287c5b"),
        30: knn("mixmask", "e30-a3488348") - knn("vanilla", "e30-cc5eb5a2"),
    }
    cells = generate.changes("reduced_order | MixMask - Vanilla").splitlines()[2].split(" | ")[1:4]
    for cell, values in zip(cells, (lead[6], lead[30], lead[30] - lead[6]), strict=True):
        low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        text = f"{values.mean():+.1f} ({low:+.1f} to {high:+.1f})"
        assert len(values) == 3 and cell == (f"**{text}**" if low * high > 0 else text)
    assert [cell.startswith("**") for cell in cells] == [False, True, False]


def test_the_library_offers_what_its_page_names():
    text = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    names = set(re.findall(r"\bmixmask\.([A-Za-z_]+)\b(?!\.py)", re.sub(r"\[[^\]]*\]\([^)]*\)", "", text)))
    modules = {path.stem for path in (ROOT / "mixmask").iterdir()} | {"pretrain", "eval"}  # those in the wheel alone
    assert len(names) > 10 and all(name in modules or hasattr(mixmask, name) for name in names)


def test_no_name_that_the_library_offers_is_hidden_by_a_module_of_that_name():
    for home in set(mixmask.HOME.values()):
        importlib.import_module(f"mixmask.{home}")  # which binds its name in the package
    assert [name for name in mixmask.HOME if isinstance(getattr(mixmask, name), ModuleType)] == []


def test_the_librarys_own_words_train():
    """The page's blocks as they stand, on a smaller net: two steps, as in a loop."""
    text = (
        (ROOT / "docs" / "library.md").read_text(encoding="utf-8").partition("## The same, in the library's words")[2]
    )
    setup, step = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[:2]
    names = {"seed": 0, "steps": 2, "x1": torch.randn(8, 3, 8, 8), "x2": torch.randn(8, 3, 8, 8)}
    exec(setup.replace("width=64", "width=4").replace("queue=4096", "queue=32"), names)
    trained = [weights for weights in names["framework"].parameters() if weights.requires_grad]
    names["optimizer"] = torch.optim.SGD(trained, lr=0.1)
    before = [weights.detach().clone() for weights in trained]
    for number in range(2):
        exec(step, names | {"step": number})
    assert int(names["framework"].pointer) == 2 * 2 * 8 % 32
    assert not any(torch.equal(*pair) for pair in zip(before, trained, strict=True))


@pytest.mark.parametrize("with_mixmask", [False, True])
def test_the_examples_loss_falls_with_mixmask_and_without(with_mixmask):
    example = script(ROOT / "examples" / "simsiam_mixmask.py")
    losses = example.train(example.squares(256), steps=50, batch=32, with_mixmask=with_mixmask)
    assert sum(losses[-10:]) / 10 < sum(losses[:10]) / 10 - 0.2


def test_mixmask_takes_fewer_than_ten_lines_of_the_example(generate):
    added = generate.lines("examples/simsiam_mixmask.py | from here | to here").splitlines()[1:-1]
    assert 3 < len(added) < 8  # the import and the setting come on top


def test_every_python_block_of_the_documents_is_python():
    for document in DOCUMENTS:
        for margin, block in re.findall(
            r"^( *)```python\n(.*?)^ *```", document.read_text(encoding="utf-8"), re.S | re.M
        ):
            text = textwrap.dedent("\n".join(line.removeprefix(margin) for line in block.splitlines()))
            entry = text.lstrip().startswith('"') and text.rstrip().endswith(",")  # a line of a dictionary
            ast.parse(f"{{\n{text}}}" if entry else text)


def test_the_citation_is_the_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    paper = citation["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Vishniakov", "Xing", "Shen"]
    assert paper["title"] == "MixMask: Revisiting Masking Strategy for Siamese ConvNets"
    assert paper["year"] == 2024 and "BMVC 2024" in paper["collection-title"] and "bmvc2024.org" in paper["url"]
    assert "2210.11456" in paper["identifiers"][0]["value"]
    assert f"## {citation['version']}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert citation["license"] == "MIT" and citation["version"] == mixmask.__version__


def test_the_smallest_library_import_loads_no_torch():
    code = "import sys, mixmask; mixmask.Mask; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)

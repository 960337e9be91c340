"""paper/make_report.py: one page, whole by itself, on which every number opens what is behind it."""

import collections
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from paper import make_report
from paper.cells import tables
from paper.make_figures import FIGURES
from paper.presets import budget, presets
from paper.report import curve, prose, records
from tests.paper.test_tables import finish

ROOT = Path(__file__).resolve().parents[2]
MIXMASK = "table4/imagenet/moco/mixmask/200"
QUICK = ("table4", "table5", "figure6")
CELLS = sum(len(tables()[name].cells) for name in QUICK)
VOID = {"meta", "input", "img", "br", "path"}
EPOCHS = [
    {"kind": "epoch", "step": epoch, "epoch": epoch, "loss": 5.0 - epoch, "test_top1": 60.0 + epoch} for epoch in (1, 2)
]


class Page(HTMLParser):
    """The page's tags, ids and links; raises where a tag is not closed."""

    def __init__(self, text):
        super().__init__()
        self.text, self.ids, self.links, self.sources, self.open = text, collections.Counter(), set(), [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids.update([values["id"]] if "id" in values else [])
        self.links.update([values["href"]] if "href" in values else [])
        self.sources += [values["src"]] if "src" in values else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def part(self, name):
        """The text between the tag with that id and the next id."""
        return re.search(rf'id="{re.escape(name)}"(.*?)(?= id="|</body>)', self.text, re.DOTALL).group(1)


@pytest.fixture
def quick(monkeypatch):
    """Two tables, and one figure that is not drawn."""
    monkeypatch.setattr(make_report, "_drawn", lambda *_: b"<svg/>")
    monkeypatch.setattr(make_report, "tables", lambda: {name: tables()[name] for name in QUICK})
    monkeypatch.setattr(make_report, "FIGURES", ("figure6",))
    monkeypatch.setattr(make_report, "_whole", lambda *_: ())


def made(*folders):
    budgets = [budget(name) for name in presets()]
    frames = {name: make_report.collect(table, budgets, folders) for name, table in make_report.tables().items()}
    return Page(make_report.page(frames, budgets, folders))


def describe(folder, name, lines=EPOCHS, **config):
    """What a run leaves behind, beside the result of `finish`."""
    (where,) = folder.glob(f"*/{name}")
    (where / "config.yaml").write_text("".join(f"{key}: {value}\n" for key, value in config.items()))
    (where / "command.txt").write_text("python eval/linear.py --set lr=<b>\n")
    (where / "environment.json").write_text(json.dumps({"torch": "9.9", "commit": "c0ffee", "modified": True}))
    (where / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return where


def test_the_page_is_made_without_torch_needs_nothing_else_and_each_of_its_links_leads_somewhere(tmp_path):
    code = (
        "import sys; sys.path.insert(0, '.')\nfrom paper import make_report\n"
        f"make_report.main(['--runs-dir', 'none', '--out', {str(tmp_path / 'report.html')!r}])\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, timeout=120)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    cells = {cell.id for table in tables().values() for cell in table.cells}
    names = [*(f"table{n}" for n in range(1, 11)), *(f"figure{n}" for n in range(1, 9))]
    sections = {*names, *tables(), "replication", "claims"}
    assert cells | sections <= set(page.ids) and page.ids.most_common(1)[0][1] == 1
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links if not link.startswith("#?q=")} <= set(page.ids)
    assert page.text.count('<td class="cell') == len(cells)
    assert len(page.sources) == len(FIGURES) and all(source.startswith("data:image/") for source in page.sources)
    assert not re.search(r"https?://|@import|url\(|<link", re.sub(r'src="[^"]*"', "", page.text))


def test_without_runs_every_number_says_so(tmp_path, quick):
    page = made(tmp_path / "none")
    assert page.text.count('<td class="cell') == page.text.count('<td class="cell absent"') == CELLS
    assert "None is finished." in page.part("runs")


def test_a_smoke_number_is_marked_in_words_and_colour_and_is_never_compared(tmp_path, quick):
    finish(tmp_path, MIXMASK, 57.34, "smoke")
    part = made(tmp_path).part("table4")
    assert '<span title="published">69.2</span><b title="ours">57.3</b>' in part
    assert 'class="cell incomparable"' in part and "not comparable (smoke)" in part and "n = 1, 4 epochs" in part


@pytest.mark.parametrize(
    ("values", "look", "words"),
    [
        ((68.3, 68.4, 68.3), "agrees", "-0.1 (agrees, -0.4 to +0.2)"),
        ((65.0, 65.1, 65.2), "differs", "-3.3 (differs, -3.8 to -2.8)"),
        ((67.0, 68.0, 69.0), "undecided", "-0.4 (undecided: 3 seeds could only see a difference of 6.5)"),
        ((65.0,), "undecided", "-3.4 (undecided: one seed)"),
    ],
)
def test_a_run_of_the_papers_budget_is_judged_by_the_spread_of_its_seeds(tmp_path, quick, values, look, words):
    cell = "table5/cifar100/moco/mixmask"
    for seed, value in enumerate(values):
        finish(tmp_path, cell, value, seed=seed)
    page = made(tmp_path)
    (number,) = re.findall(rf'<td class="cell {look}"[^>]*><a href="#{cell}">.*?</td>', page.text)
    assert words in number and f"n = {len(values)}, 1000 epochs" in number
    numbers = page.text.count(f'class="cell {look}"')
    assert f'<li class="{look}"><b>{numbers}</b>' in page.part("summary")


def test_a_number_opens_the_config_command_commit_environment_and_curve_of_its_runs(tmp_path, quick):
    name = finish(tmp_path, MIXMASK, 69.0)
    describe(tmp_path, name, recipe="imagenet_linear", note="<script>")
    page = made(tmp_path)
    assert f'data-run="{name}"' in page.part(MIXMASK) and "linear_sgd_last" in page.part(MIXMASK)
    record = page.part(f"run/{name}")
    for text in (
        "note: &lt;script&gt;",
        "--set lr=&lt;b&gt;",
        "c0ffee and changes that were not committed",
        "torch 9.9",
    ):
        assert text in record
    assert record.count("<polyline") == 2 and "test_top1: 62 at 2" in record


def test_the_pretraining_of_an_evaluation_is_opened_too(tmp_path, quick):
    name = finish(tmp_path, MIXMASK, 69.0)
    (where,) = tmp_path.glob(f"linear/{name}")
    (where / "result.json").write_text('{"checkpoint": "encoder-s0", "metrics": {"linear_sgd_last": 69.0}}')
    encoder = tmp_path / "pretrain" / "encoder-s0"
    encoder.mkdir(parents=True)
    (encoder / "result.json").write_text('{"metrics": {"loss": 6.5}}')
    page = made(tmp_path)
    assert re.findall(r'data-run="(.*?)"', page.part(MIXMASK)) == ["encoder-s0", name]
    assert "loss 6.5" in page.part("run/encoder-s0")


def test_each_log_is_read_once_however_many_numbers_share_the_run(tmp_path, quick, monkeypatch):
    name = finish(tmp_path, MIXMASK, 69.1)
    describe(tmp_path, name, recipe="imagenet_linear")
    read = collections.Counter()
    log = records.read_log
    monkeypatch.setattr(records, "read_log", lambda path: read.update([path.name]) or log(path))
    page = made(tmp_path)
    assert page.text.count('<b title="ours">69.1</b>') == 3 and read == {name: 1}


def test_kept_runs_stand_where_the_working_folder_has_none_of_the_papers_budget(tmp_path, quick):
    finish(tmp_path / "runs", MIXMASK, 57.3, "smoke")
    name = finish(tmp_path / "results", MIXMASK, 69.0)
    (tmp_path / "results" / "linear" / name / "kept.json").write_text('{"checkpoint_sha256": "5ad5ad"}')
    page = made(tmp_path / "runs", tmp_path / "results")
    assert '<b title="ours">69.0</b>' in page.part("table4") and "57.3" not in page.part("table4")
    assert "SHA-256 5ad5ad" in page.part(f"run/{name}")


def test_an_unfinished_run_is_named_with_its_last_epoch(tmp_path, quick):
    name = finish(tmp_path, MIXMASK, 69.0)
    (describe(tmp_path, name, recipe="imagenet_linear") / "result.json").unlink()
    assert f"{name}: epoch 2" in made(tmp_path).part("runs")


def test_the_features_of_each_pretraining_stand_in_columns_and_old_logs_have_none(tmp_path, quick):
    measured = {"knn_k5": 61.25, "feature_std": 0.0702, "effective_rank": 41.5, "alignment": 0.3, "uniformity": -2.5}
    (tmp_path / "pretrain" / "old").mkdir(parents=True)
    describe(tmp_path, "old")
    assert "features" not in made(tmp_path).ids
    for name, lines in ("new", [EPOCHS[0] | measured, EPOCHS[1]]), ("newer", [EPOCHS[0], EPOCHS[1] | measured]):
        (tmp_path / "pretrain" / name).mkdir()
        describe(tmp_path, name, lines)
    cells = re.findall(r"<t[dh]\b[^>]*>([^<]*)", made(tmp_path).part("features"))
    heads = ["run", "epoch", "k-NN", "feature_std", "effective_rank", "alignment", "uniformity"]
    values = ["61.2", "0.0702", "41.5", "0.3", "-2.5"]
    assert cells == [*heads, "new", "1", *values, "newer", "2", *values]


def test_the_search_finds_a_number_by_table_data_set_framework_method_metric_and_state(tmp_path, quick):
    finish(tmp_path, MIXMASK, 57.3, "smoke")
    (number,) = re.findall(rf'data-text="([^"]*)"><a href="#{MIXMASK}"', made(tmp_path).text)
    words = "table4 imagenet moco mixmask linear_sgd_last comparable smoke"
    assert set(words.split()) <= set(re.split(r"[ /()]", number))


def test_each_state_of_the_summary_searches_for_as_many_numbers_as_it_counts(tmp_path, quick):
    for seed, value in enumerate((67.0, 68.0, 69.0)):
        finish(tmp_path, "table5/cifar100/moco/mixmask", value, seed=seed)
    finish(tmp_path, MIXMASK, 57.3, "smoke")
    page = made(tmp_path)
    numbers = re.findall(r'<td class="cell [^>]*data-text="([^"]*)"', page.text)
    states = re.findall(r'<b>(\d+)</b> <a class="badge" href="#\?q=([^"]*)"', page.part("summary"))
    *published, (alone, _) = states
    assert len(published) == 8 and sum(int(count) for count, _ in published) == 6 + 28 and alone == "1"  # in Figure 6
    for count, query in states:
        assert int(count) == sum(all(word in text for word in query.split("%20")) for text in numbers), query


def test_below_a_table_stand_what_was_measured_and_what_its_presets_mean(tmp_path, quick):
    finish(tmp_path, MIXMASK, 57.3, "smoke")
    page = made(tmp_path)
    assert "Metric: <code>linear_sgd_last</code>. Preset smoke: embedded photographs" in page.part("table4")


def test_the_ledger_is_on_the_page_with_an_anchor_for_each_of_its_numbers(tmp_path, quick):
    ledger = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")
    numbered = re.findall(r"^(\d+)\. ", ledger, re.MULTILINE)
    page = made(tmp_path)
    assert {f"fidelity-{n}" for n in numbered} <= set(page.ids) and "<code>mask.block_impl: literal</code>" in page.text


def test_the_table_of_settings_names_each_departure(tmp_path, quick):
    part = made(tmp_path).part("table9")
    assert "<td>0.0001 [" in part and '<div class="notes"><p>[1] ' in part


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a *b* **c `*d*`** e* f", "<p>a <em>b</em> <strong>c <code>*d*</code></strong> e* f</p>"),
        ("two\nlines & <", "<p>two\nlines &amp; &lt;</p>"),
        ("a <b>c</b>", "<p>a &lt;b&gt;c&lt;/b&gt;</p>"),
        ("## T\n3. a\n   b\n4. c", '<h3>T</h3>\n<ol start="3">\n<li id="x-3">a\nb</li>\n<li id="x-4">c</li>\n</ol>'),
        ("- a\n- b\n\nc", "<ul>\n<li>a</li>\n<li>b</li>\n</ul>\n<p>c</p>"),
        ("```\n# <x>\n\ny\n```\nz", "<pre><code># &lt;x&gt;\n\ny\n</code></pre>\n<p>z</p>"),
        ("[a](b.md) [c](#d)", '<p>a <a href="#d">c</a></p>'),
        (
            "| a | b |\n|---|---|\n| 1 | `2` |",
            '<div class="scroll"><table>\n<thead>\n<tr>\n<th>a</th>\n<th>b</th>',
        ),
    ],
)
def test_markdown_of_the_documents_becomes_html(text, expected):
    assert expected in prose.to_html(text, item="x", top=2)


def test_a_curve_keeps_its_last_point_and_stands_a_constant(tmp_path):
    lines = [{"kind": "epoch", "step": e, "epoch": e, "loss": 1.0, "lr": 0.1, "knn_k20": float(e)} for e in range(1000)]
    loss, knn = curve.curves([{"kind": "step", "step": 0, "loss": 9.0}, *lines])
    points = [tuple(map(float, p.split(","))) for p in re.search(r'points="([^"]*)"', knn).group(1).split()]
    assert len(points) < 200 and points[-1] == (curve.WIDTH - 4, curve.TOP) and "knn_k20: 999 at 999" in knn
    assert len({p.split(",")[1] for p in re.search(r'points="([^"]*)"', loss).group(1).split()}) == 1
    assert curve.curves(lines[:1]) == []


def test_a_result_that_cannot_be_read_leaves_its_number_empty_and_is_named_when_the_page_is_written(
    tmp_path, quick, cli
):
    name = finish(tmp_path, MIXMASK, 69.0)
    (tmp_path / "linear" / name / "result.json").write_text("{not JSON")
    status, _, error = cli(make_report.main, "--runs-dir", tmp_path, "--out", tmp_path / "report.html")
    assert status == 1 and f"{name}/result.json is not valid JSON" in error
    assert 'class="cell unreadable"' in Page((tmp_path / "report.html").read_text(encoding="utf-8")).part("table4")

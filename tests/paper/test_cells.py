"""paper/cells: every number of Tables 1 to 7 and every curve of Figures 5 to 7, and the runs that they share."""

import functools
import re
from pathlib import Path

import pytest
import torch

from mixmask import formats
from mixmask.backbones import ResNet
from mixmask.config import ConfigError, flatten, read_yaml
from mixmask.methods import METHODS
from mixmask.objective import objective
from mixmask.randomness import numpy_generator, torch_generator
from mixmask.runs import file_sha256
from mixmask.stages import STAGES
from paper import cells as cells_module
from paper.cells import ROOT, select, tables
from paper.checkpoints import public_checkpoints
from paper.presets import budget, chains, label, metric, missing_file, remark, steps
from pretrain.train import build
from slurm import graph

# cells, and the sum of their printed values
PUBLISHED = {
    "table1": (37, 2266.0),
    "table2": (12, 723.4),
    "table3": (3, 207.3),
    "table4": (6, 419.2),
    "table5": (28, 1773.6),
    "table6": (11, 698.1),
    "table7": (45, 2354.0),
}


@functools.cache
def jobs(target="all", preset="paper"):
    return graph.jobs(select([target]), budget(preset), Path("runs"))


def pretrainings(target="all", preset="paper"):
    """Their identities, whatever the seed."""
    return {job.id.rpartition("-s")[0] for job in jobs(target, preset) if job.stage == "pretrain"}


def test_tables_1_to_7_hold_the_142_printed_numbers():
    values = {
        name: [cell.published for cell in table.cells if cell.published is not None] for name, table in tables().items()
    }
    assert {name: (len(v), round(sum(v), 1)) for name, v in values.items() if v} == PUBLISHED
    assert sum(number for number, _ in PUBLISHED.values()) == 142


@pytest.mark.parametrize(
    ("cell", "published", "origin"),
    [
        ("table1/cifar100/strategy/blocked", 67.8, "own"),
        ("table1/imagenet/grid/48", 68.8, "own"),
        ("table2/tiny_imagenet/byol/different", 53.7, "own"),
        ("table3/imagenet/moco/both/p1", 68.7, "own"),
        ("table4/imagenet/moco/mscn/200", 68.2, "unclear"),
        ("table5/imagenet/moco/unmix", 68.5, "unclear"),
        ("table5/cifar100/simsiam/both", 70.6, "own"),
        ("table6/imagenet/barlow-twins/10percent", 69.7, "cited"),
        ("table7/moco/mixmask/voc/box_AP75", 64.5, "own"),
    ],
)
def test_a_number_stands_where_the_paper_prints_it(cell, published, origin):
    (found,) = select([cell])
    assert (found.published, found.origin) == (published, origin) and bool(found.source) == (origin != "own")


def test_figures_5_6_and_7_are_30_2_and_8_curves_or_points_without_a_printed_number():
    figures = {name: table.cells for name, table in tables().items() if name.startswith("figure")}
    assert {name: len(cells) for name, cells in figures.items()} == {"figure5": 30, "figure6": 2, "figure7": 8}
    assert all(cell.published is None for cells in figures.values() for cell in cells)


def test_the_papers_cells_need_92_distinct_pretrainings_and_ours_another_52():
    assert len(pretrainings()) == 92
    at_scale = [name for name, table in tables().items() if not table.scale]
    assert len(set().union(*map(pretrainings, at_scale))) == 92 + 52
    extra = {cell.id for cell in select(at_scale) if cell.extra}
    assert extra == {
        cell.id for cell in select(["table11", "table[67]/*swav/vanilla*", "table[67]/*barlow_twins/vanilla*"])
    }
    assert not extra & {cell.id for cell in select(["all"])}
    each = {f"table{n}": len(pretrainings(f"table{n}")) for n in range(1, 8)}
    assert each == {"table1": 28, "table2": 12, "table3": 3, "table4": 6, "table5": 28, "table6": 5, "table7": 5}
    assert len(pretrainings("table11")) == 70
    assert [len(pretrainings(f"figure{n}")) for n in (5, 6, 7)] == [30, 2, 8]


def test_seeds_are_three_on_cifar100_and_tiny_imagenet_and_one_on_imagenet():
    datasets = {job.id.rpartition("-s")[0]: job.config.dataset for job in jobs() if job.stage == "pretrain"}
    imagenet = sum(dataset == "imagenet" for dataset in datasets.values())
    assert imagenet == 20 and sum(job.stage == "pretrain" for job in jobs()) == 3 * (92 - imagenet) + imagenet


def test_reduced_cells_are_named_to_be_launched_and_are_no_part_of_the_papers_counts():
    own = [table for table in tables().values() if table.scale]
    assert {table.name for table in own} == {
        "reduced",
        "reduced_bf16",
        "reduced_filling",
        "reduced_frameworks",
        "reduced_long",
        "reduced_masks",
        "reduced_order",
        "reduced_own",
    }
    assert all(table.about for table in own)
    cells = select(["reduced*"])
    assert len(cells) == 141 and {cell.scale for cell in cells} == {"reduced"}
    assert all(cell.published is None and not cell.source for cell in cells)
    assert not {cell.id for cell in cells} & {cell.id for cell in select([])}
    assert len(pretrainings("reduced")) == 5 and len(pretrainings("reduced_masks")) == 7
    assert len(pretrainings("reduced_long")) == 8 and len(pretrainings("reduced_bf16")) == 4
    assert len(pretrainings("reduced_own")) == 6 and len(pretrainings("reduced_order")) == 16
    assert len(pretrainings("reduced_filling")) == 2
    runs = [job for job in jobs("reduced*") if job.stage == "pretrain"]
    assert len(runs) == 110 and {job.config.dataset for job in runs} == {
        "cifar100_reduced",
        "cifar100",
    }
    found = {(job.config.framework, job.config.method) for job in runs}
    frameworks, methods = (set(names) for names in zip(*found, strict=True))
    assert found == {(framework, method) for framework in frameworks for method in methods}
    assert frameworks >= {"moco", "simclr", "byol", "simsiam"} and len(methods) >= 6  # all of the paper's
    linear = [job for job in jobs("reduced*") if job.stage == "linear"]
    assert len(linear) == 70 and {job.config.dataset for job in linear} == {"cifar100_reduced"}
    for table in own:
        for config in (job.config for job in jobs(table.name) if job.stage == "pretrain"):
            assert {str(config.backbone.width), str(config.epochs)} <= set(re.findall(r"\d+", table.about))


def test_a_reduced_recipe_differs_from_the_published_one_only_where_it_says_so():
    names = ("cifar100_moco", "cifar100_reduced_moco")
    published, reduced = (flatten(read_yaml(ROOT / f"pretrain/configs/{name}.yaml")) for name in names)
    text = (ROOT / "pretrain/configs/cifar100_reduced_moco.yaml").read_text()
    said = {line.split(":")[0].strip() for line in text.splitlines() if "# reduced" in line}
    differing = {key for key in published if published[key] != reduced[key]} - {"recipe"}
    assert published.keys() == reduced.keys() and {key.split(".")[-1] for key in differing} == said


def test_reduced_numbers_carry_their_scale_and_a_change_of_it():
    (cell,) = select(["reduced/knn/mixmask"])
    assert label(cell, budget("paper")) == "reduced"
    assert label(cell, budget("paper", ["epochs=3"])) == "reduced, epochs=3"
    assert label(cell, budget("smoke")) == "smoke"
    assert label(select([SHARED.split()[0]])[0], budget("paper")) == "paper"


SHARED = """
table1/cifar100/grid/2 table1/cifar100/strategy/blocked table1/cifar100/ratio/0.5 table1/cifar100/switch/yes \
    table5/cifar100/moco/mixmask figure5/cifar100/moco/mixmask/1000 figure7/cifar100/moco/mixmask
table1/tiny_imagenet/grid/4 table5/tiny_imagenet/moco/mixmask
table1/imagenet/grid/8 table4/imagenet/moco/mixmask/200 table5/imagenet/moco/mixmask figure6/imagenet/moco/mixmask
table2/cifar100/simclr/different table5/cifar100/simclr/both
table3/imagenet/moco/both/p0.5 table5/imagenet/moco/both
table4/imagenet/moco/mscn/200 figure6/imagenet/moco/mscn
table4/imagenet/moco/mixmask/800 table6/imagenet/moco/mixmask/1percent table7/moco/mixmask/voc/box_AP
table5/cifar100/simsiam/vanilla figure5/cifar100/simsiam/vanilla/1000 figure7/cifar100/simsiam/vanilla
"""


@pytest.mark.parametrize("same", [line.split() for line in SHARED.strip().splitlines()], ids=lambda same: same[0])
def test_equal_pretrainings_are_one_whichever_table_asks(same):
    (job,) = (j for j in jobs() if j.stage == "pretrain" and j.config.seed == 0 and same[0] in j.cells)
    assert set(same) <= set(job.cells)


def test_figure5_has_grid_2_where_table5_has_4():
    def config(cell):
        return steps(select([cell])[0], 0, budget("paper"))[0].config

    assert config("figure5/cifar100/simclr/mixmask/1000").mask.grid == 2
    assert config("table5/cifar100/simclr/mixmask").mask.grid == 4
    assert config("table5/cifar100/moco/mixmask").mask.grid == 2


def test_same_is_the_reverse_permutation_and_different_a_random_one():
    cells = select(["table2/cifar100/moco/*"])
    assert [cell.row for cell in cells] == ["Same", "Different"]
    assert [steps(cell, 0, budget("paper"))[0].config.both.permutation for cell in cells] == ["reverse", "random"]


def test_every_cell_resolves_under_every_preset_and_names_the_metric_that_the_papers_budget_measures():
    cells = select(["all", "reduced*"])
    assert len({cell.id for cell in cells}) == len(cells)
    lengths = {"": 1, "linear": 2, "finetune": 2, "detection": 3}
    for cell in cells:
        for preset in ("paper", "smoke"):
            chain = steps(cell, 0, budget(preset))
            assert len(chain) == (lengths[cell.evaluation.partition("/")[0]] if cell.recipe else 0)
            assert [STAGES[step.stage].after for step in chain] == ["", *(step.stage for step in chain)][: len(chain)]
        if cell.recipe:
            assert metric(cell, steps(cell, 0, budget("paper"))) == cell.metric


def test_voc_is_trained_five_times_from_one_pretraining_and_coco_once():
    runs = {cell.column: chains(cell, budget("paper")) for cell in select(["table7/moco/mixmask/*"])}
    assert [len(runs[column]) for column in ("VOC detection: AP", "COCO detection: AP")] == [5, 1]
    voc = runs["VOC detection: AP"]
    assert [chain[-1].config.seed for chain in voc] == [0, 1, 2, 3, 4]
    assert all(chain[:2] == voc[0][:2] for chain in voc)


def test_a_public_checkpoint_takes_the_place_of_the_pretraining_and_its_number_says_so(tmp_path):
    file = tmp_path / "swav_800ep_pretrain.pth.tar"
    file.write_bytes(b"weights")
    (cell,) = select(["table7/swav/coco/mask_AP"])
    given = budget("paper", [f"checkpoints.swav={file}"])
    assert "swav_800ep_pretrain.pth.tar, from https://github.com/" in missing_file(cell, budget("paper"))
    assert not missing_file(cell, given) and given.replicates
    ((convert, detect),) = chains(cell, given)
    assert (convert.stage, convert.source, detect.stage, detect.source) == ("convert", str(file), "detection", "")
    assert convert.config.checkpoint == detect.config.checkpoint == f"swav_800ep_pretrain.pth@{file_sha256(file)[:8]}"


def test_the_authors_two_checkpoints_cost_a_probe_in_place_of_a_pretraining(tmp_path):
    file = tmp_path / "200.pth.tar"
    file.write_bytes(b"weights")
    given = budget("paper", [f"checkpoints.mixmask_200={file}", f"checkpoints.both_200={file}"])
    measured = {cell.id for cell in select(["all"]) if cell.checkpoint in ("mixmask_200", "both_200")}
    numbers = {"table4/imagenet/moco/mixmask/200", "table3/imagenet/moco/both/p0.5", "table5/imagenet/moco/both"}
    assert numbers | {"table1/imagenet/switch/yes", "table7/mixmask-200/voc/box_AP"} <= measured
    for cell in select(sorted(measured)):
        chain = steps(cell, 0, given)
        assert [step.stage for step in chain] == [
            step.stage for step in steps(cell, 0, given) if step.stage != "pretrain"
        ]
        assert chain[0].source == str(file) and "re-measured from the MixMask authors'" in remark(cell, given)
    assert [step.stage for step in steps(select(["table4/imagenet/moco/mixmask/200"])[0], 0, given)] == ["linear"]
    assert steps(select(["table4/imagenet/moco/mixmask/800"])[0], 0, given)[0].stage == "pretrain"


def test_a_checkpoint_as_the_released_code_saves_it_is_read_as_its_rows_expect(tmp_path):
    """kirill-vish/MixMask, main_moco_mixmask.py: DDP's names, MoCo's two encoders with MLP heads, its queue."""
    weights = ResNet("resnet50", "imagenet", 8).state_dict()
    weights = {
        key: torch.rand_like(value) if value.is_floating_point() else value + 1 for key, value in weights.items()
    }
    head = {
        f"fc.{layer}.{kind}": torch.rand(4, 4)[0 if kind == "bias" else ...]
        for layer in (0, 2)
        for kind in ("weight", "bias")
    }
    encoder = {**weights, **head}
    state = {f"module.encoder_{which}.{key}": value for which in "qk" for key, value in encoder.items()}
    state |= {"module.queue": torch.rand(4, 8), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    torch.save({"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": {}}, tmp_path / "200.pth.tar")
    source = formats.read(tmp_path / "200.pth.tar")
    assert source.format == public_checkpoints()["mixmask_200"].format == public_checkpoints()["both_200"].format
    assert all(torch.equal(source.weights[key], value) for key, value in weights.items())


def test_the_public_moco_v2_replaces_only_the_row_that_names_it(tmp_path):
    file = tmp_path / "moco_v2_800ep_pretrain.pth.tar"
    file.write_bytes(b"weights")
    given = budget("paper", [f"checkpoints.moco_v2={file}"])
    vanilla, mixmask = (
        steps(select([f"table6/imagenet/moco/{m}/1percent"])[0], 0, given) for m in ("vanilla", "mixmask")
    )
    assert [step.stage for step in vanilla] == ["finetune"]
    assert [step.stage for step in mixmask] == ["pretrain", "finetune"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("checkpoints.swav=/absent", "no such file: /absent (expected swav_800ep_pretrain.pth.tar, from"),
        ("checkpoints.swaw=/absent", "--set checkpoints.swaw: unknown; did you mean 'swav'?"),
        ("checkpoints.swav=/", "--set checkpoints.swav: a folder: / (expected swav_800ep"),
        ("checkpoints=/absent", "which one? checkpoints.swav, checkpoints.barlow_twins, checkpoints.moco_v2"),
        ("detection.seed=3", "repeated evaluations, as VOC's five, count on from it"),
    ],
)
def test_a_public_checkpoint_that_is_not_there_is_named(setting, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        budget("paper", [setting])


def smoke_configs():
    """One for each recipe, method and backbone of any cell."""
    configs = [job.config for target in ("all", "reduced*") for job in jobs(target, "smoke") if job.stage == "pretrain"]
    return list({(config.recipe, config.method, config.backbone): config for config in configs}.values())


@pytest.mark.parametrize("config", smoke_configs(), ids=lambda c: f"{c.recipe}-{c.method}-{c.backbone.arch}")
def test_every_recipe_and_method_builds_its_model_and_takes_a_step_at_smoke_size(config):
    device = torch.device("cpu")
    framework, optimizer = build(config, device)
    size, crop = config.augment.size, config.mscn.crop_size
    generator = torch.Generator().manual_seed(0)
    x1, x2 = (torch.randn(config.batch_size, 3, size, size, generator=generator) for _ in range(2))
    crops = [torch.randn(config.batch_size, 3, crop, crop, generator=generator)] * config.mscn.crops
    rngs = [numpy_generator(0, "mix", 0, group) for group in range(config.mix_groups)]
    anchors = METHODS[config.method](config, x1, rngs, *(crops if config.method == "mscn" else []))
    loss, _, targets = objective(framework, x1, x2, anchors, torch_generator(device, 0, "shuffle", 0))
    before = next(framework.parameters()).detach().clone()
    loss.backward()
    optimizer.step()
    framework.after_step(targets, 0, 10)
    assert loss.isfinite() and not torch.equal(before, next(framework.parameters()))


# ------------------------------------------------------------------------------------------------- the data's format

TABLE = """
title: "Table 1: x"
common: {seeds: 1, recipe: cifar100_moco, metric: m}
columns: [{id: a, name: A}, {id: b, name: B}]
rows:
  - {id: r, name: R, overrides: {method: mixmask}, published: [1.0, null], except: {a: {origin: cited, source: s}}}
"""


def read(tmp_path, text):
    path = tmp_path / "table1.yaml"
    path.write_text(text)
    return cells_module._read(path)


def test_a_place_that_the_paper_leaves_empty_is_no_cell_and_an_exception_reaches_its_column(tmp_path):
    (cell,) = read(tmp_path, TABLE).cells
    assert (cell.id, cell.row, cell.column, cell.origin) == ("table1/a/r", "R", "A", "cited")


def test_a_cell_of_ours_has_no_published_value_and_neither_has_a_row_without_the_key(tmp_path):
    ours, printed = read(tmp_path, TABLE.replace("[1.0, null]", "[ours, 2.0]")).cells
    assert (ours.published, printed.published) == (None, 2.0)
    assert [cell.published for cell in read(tmp_path, TABLE.replace("published: [1.0, null], ", "")).cells] == [
        None
    ] * 2


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[1.0, null]", "[1.0]", "r: 1 published values for 2 columns"),
        ("except: {a:", "except: {c:", "r: except: no column 'c'"),
        ("seeds: 1", "sedes: 1", "unknown key 'table1/a/r.sedes'; did you mean 'table1/a/r.seeds'"),
        ("origin: cited", "origin: copied", "origin: expected one of own, cited, unclear"),
        ("columns:", "colums:", "missing key 'columns'"),
    ],
)
def test_a_wrong_entry_is_named_with_its_file(tmp_path, old, new, message):
    with pytest.raises(ConfigError) as error:
        read(tmp_path, TABLE.replace(old, new))
    assert "table1.yaml" in str(error.value) and message in str(error.value)

"""Every framework and method: several processes compute what one does, whatever spans them."""

import itertools

import pytest
import yaml

from mixmask import config as configs
from mixmask.registry import METHODS
from mixmask.training.processes import fitting_processes
from tests.conftest import TINY
from tests.stages.test_distributed import distance, in_double, launch, log, losses, model, wait

SECTIONS = {
    "simclr": {"dim": 8, "hidden": 12, "temperature": 0.4},
    "byol": {"dim": 8, "hidden": 12, "momentum": 0.9},
    "simsiam": {"dim": 8, "hidden": 12, "predictor_hidden": 4},
    "moco": {**yaml.safe_load(TINY)["moco"]},
    "barlow_twins": {"dim": 8, "hidden": 12, "off_diagonal": 0.1, "scale": 0.5},
    "vicreg": {"dim": 8, "hidden": 12, "invariance": 5, "variance": 2, "covariance": 0.5},
    "swav": {
        **{"dim": 8, "hidden": 12, "prototypes": 6, "temperature": 0.2, "epsilon": 0.3, "sinkhorn": 3, "frozen": 1},
        **{"queue": 32, "queue_start": 1, "crops": 1, "crop_size": 8, "crop_scale": [0.1, 0.5]},
    },
}
# SimSiam's last BatchNorm shifts what the predictor's BatchNorm centres again: the shift stays 0, but for rounding.
NO_GRADIENT = {"simsiam": {"encoder.head.4.bias"}}
SMALL = ("mix_groups=4", "run.log_every=1", "epochs=1", "mask.ratio=[0.2, 0.8]", "mscn.grid=3", "mscn.crop_size=8")


def tiny(framework: str, *items: str) -> configs.Pretrain:
    values = {key: value for key, value in yaml.safe_load(TINY).items() if key != "moco"}
    values |= {"framework": framework, framework: SECTIONS[framework]}
    return configs.resolve(values, configs.parse_overrides([*SMALL, *items]), configs.Pretrain)


@pytest.mark.parametrize(
    ("framework", "method", "norms", "groups"),
    [
        *((framework, "both", 1, 1) for framework in SECTIONS),
        *((framework, "mixmask", 2, 4) for framework in SECTIONS),
        *(("moco", method, 2, 2) for method in ("unmix", "erase", "mscn", "vanilla")),
        ("swav", "mscn", 4, 4),
        ("vicreg", "vanilla", 4, 1),
        *(
            pytest.param(framework, method, 1, 1, marks=pytest.mark.slow)
            for framework, method in itertools.product(SECTIONS, METHODS)
            if method != "both"
        ),
    ],
)
def test_two_and_four_processes_compute_what_one_computes(tmp_path, framework, method, norms, groups):
    """In float64 what is left, after six steps, is the order of summation. Each mix group has a lambda of its own."""
    config = tiny(
        framework, f"method={method}", f"backbone.bn_groups={norms}", f"mix_groups={groups}", "erase.fill=noise"
    )
    assert fitting_processes(config) == (1, 2, 4, 8)
    several = (2, 4) if method == "both" else (4,)
    for processes in (1, *several):
        assert not any(wait(launch(config, tmp_path / str(processes), processes, in_double)))
    one, alone = model(tmp_path / "1"), log(tmp_path / "1")
    for processes in several:
        shared, lines = model(tmp_path / str(processes)), log(tmp_path / str(processes))
        # SimSiam's losses, 1e-14 apart at first, are 1e-10 after six steps; the others' less. Its are cosines, sums of
        # which cross 0.
        most, floor = (1e-9, 1e-10) if framework == "simsiam" else (1e-10, 1e-12)
        assert distance(losses(tmp_path / str(processes)), losses(tmp_path / "1")) < most
        pairs = {k: (shared[k].double(), one[k].double()) for k in one}
        apart = {k for k, (a, b) in pairs.items() if distance(a, b) >= 1e-8} - NO_GRADIENT.get(framework, set())
        assert not apart and all(shared[k].abs().max() < 1e-12 for k in NO_GRADIENT.get(framework, ()))
        for line, expected in zip(lines, alone, strict=True):
            assert all(line[k] == pytest.approx(v, rel=1e-8, abs=floor) for k, v in expected.items() if k != "kind")


def test_processes_hold_whole_batchnorm_groups_or_equal_parts_of_them():
    fitting = {norms: fitting_processes(tiny("swav", f"backbone.bn_groups={norms}")) for norms in (1, 2, 3, 8)}
    assert fitting == {1: (1, 2, 4, 8), 2: (1, 2, 4, 8), 3: (1,), 8: (1, 2, 4, 8)}

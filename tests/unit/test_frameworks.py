"""Every framework but MoCo: each method's loss and gradients against loops in float64, and what only training shows."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mixmask import config, registry
from mixmask.frameworks import FRAMEWORKS, build_framework
from mixmask.frameworks.byol import BYOL, target_momentum
from mixmask.frameworks.heads import spread
from mixmask.frameworks.simclr import nt_xent
from mixmask.frameworks.simsiam import SimSiam
from mixmask.masks import sample_mask
from mixmask.methods import METHODS, unmix_map
from mixmask.objective import objective
from mixmask.training.optim import build_optimizer, set_learning_rate
from pretrain import train
from tests import reference
from tests.reference import SmallNet, unit, views

ROOT = Path(__file__).parents[2]

RECIPES = ("cifar100_simclr", "cifar100_byol", "cifar100_simsiam", "tiny_imagenet_simclr", "tiny_imagenet_byol")
SMALL = {
    "moco": {"dim": 5, "queue": 24, "momentum": 0.9, "temperature": 0.2, "symmetric": True},
    "simclr": {"dim": 5, "hidden": 7, "temperature": 0.4},
    "byol": {"dim": 5, "hidden": 7, "momentum": 0.9},
    "simsiam": {"dim": 5, "hidden": 7, "predictor_hidden": 4},
    "barlow_twins": {"dim": 5, "hidden": 7, "off_diagonal": 0.2, "scale": 0.5},
    "swav": {
        **{"dim": 5, "hidden": 7, "prototypes": 4, "temperature": 0.2, "epsilon": 0.3, "sinkhorn": 3},
        **{"frozen": 0, "queue": 0, "mixture_codes": True},
    },
    "vicreg": {"dim": 5, "hidden": 7, "invariance": 1, "variance": 0.5, "covariance": 0.04},
}
CASES = {  # name: (method, settings)
    "vanilla": ("vanilla", {}),
    "unmix mixup": ("unmix", {"unmix.prob": 1.0}),
    "unmix cutmix": ("unmix", {"unmix.prob": 0.0}),
    "mixmask": ("mixmask", {}),
    "mixmask ratio": ("mixmask", {"mask.ratio": 0.25}),
    "mixmask random permutation": ("mixmask", {"mask.permutation": "random"}),
    "mixmask no switch": ("mixmask", {"mask.switch": False}),
    "both": ("both", {}),
    "both same": ("both", {"both.permutation": "reverse"}),
    "erase": ("erase", {}),
}


def small(name: str, seed: int = 0, **settings) -> nn.Module:
    """A framework around SmallNet, float64, after a few steps' worth of noise so that targets differ from queries."""
    torch.manual_seed(seed)
    framework = FRAMEWORKS[name](SmallNet(), FRAMEWORKS[name].Settings(**{**SMALL[name], **settings})).double().train()
    with torch.no_grad():
        for parameter in framework.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        if name == "swav":  # as `targets` leaves them
            framework.prototypes.weight.copy_(unit(framework.prototypes.weight))
    return framework


def recipe(case: str) -> config.Pretrain:
    method, settings = CASES[case]
    return config.load(ROOT / "pretrain/configs/cifar100_simclr.yaml", {"method": method, **settings})


def loss_of(framework: nn.Module, case: str, x1: Tensor, x2: Tensor, seed: int) -> Tensor:
    settings = recipe(case)
    anchors = METHODS[settings.method](settings, x1, [np.random.default_rng(seed)])
    return objective(framework, x1, x2, anchors)[0]


# -------------------------------------------------------------------------------------- the reference, in loops


@dataclass
class Term:
    """Images in the order in which they are scored, and a weight for each."""

    images: Tensor
    weights: list[float]


def mixture_terms(x1: Tensor, m: Tensor, partner: list[int], switch: bool = True) -> list[Term]:
    """Eq. 1 and 2: row i of the second term is the mixture whose partner is image i, read off one by one."""
    n, lam = len(x1), reference.pixel_share(m)
    mixed = reference.mix(x1, [m] * n, partner)
    switched = torch.stack([mixed[partner.index(i)] for i in range(n)])
    return [Term(mixed, [lam] * n), Term(switched, [1 - lam] * n)][: 1 + switch]


def terms(case: str, x1: Tensor, seed: int) -> list[Term]:
    """All that a method adds to the clean loss; draws what the method draws."""
    settings, n = recipe(case), len(x1)
    rng = np.random.default_rng(seed)
    size, reverse = x1.shape[-2:], list(range(n - 1, -1, -1))
    found: list[Term] = []
    if settings.method in ("unmix", "both"):
        found += mixture_terms(x1, unmix_map(settings.unmix.prob, *size, rng)[0, 0], reverse)
    if settings.method in ("mixmask", "both", "erase"):
        m = sample_mask(settings.mask, *size, rng)[0, 0]
        if settings.method == "erase":
            return [Term(torch.where(m.bool(), x1, 0.0), [1.0] * n)]
        permutation = settings.both.permutation if settings.method == "both" else settings.mask.permutation
        partner = reverse if permutation == "reverse" else rng.permutation(n).tolist()
        found += mixture_terms(x1, m, partner, settings.mask.switch)
    return found


def simclr_pair(framework: nn.Module, a: Tensor, b: Tensor) -> list[Tensor]:
    """Chen, Kornblith et al. Eq. 1 for each of the 2N views; mean of the two of a pair."""
    backbone, head, t, n = framework.encoder.backbone, framework.encoder.head, framework.settings.temperature, len(a)
    z = unit(head(torch.cat([backbone(a), backbone(b)])))

    def loss(i: int, j: int) -> Tensor:
        others = sum(torch.exp((z[i] * z[k]).sum() / t) for k in range(2 * n) if k != i)
        return -torch.log(torch.exp((z[i] * z[j]).sum() / t) / others)

    return [(loss(i, n + i) + loss(n + i, i)) / 2 for i in range(n)]


def byol_pair(framework: nn.Module, a: Tensor, b: Tensor) -> list[Tensor]:
    """Grill et al. Eq. 2: squared distance of unit vectors, in both directions."""
    pa, pb = (unit(framework.predictor(framework.encoder(x))) for x in (a, b))
    with torch.no_grad():
        ta, tb = (unit(framework.target_encoder(x)) for x in (a, b))
    return [((pa[i] - tb[i]) ** 2).sum() + ((pb[i] - ta[i]) ** 2).sum() for i in range(len(a))]


def simsiam_pair(framework: nn.Module, a: Tensor, b: Tensor) -> list[Tensor]:
    """Chen and He, Algorithm 1."""
    za, zb = framework.encoder(a), framework.encoder(b)
    pa, pb = unit(framework.predictor(za)), unit(framework.predictor(zb))
    za, zb = unit(za.detach()), unit(zb.detach())
    return [-(pa[i] * zb[i]).sum() / 2 - (pb[i] * za[i]).sum() / 2 for i in range(len(a))]


def barlow_pair(framework: nn.Module, a: Tensor, b: Tensor) -> list[Tensor]:
    """Zbontar et al. Eq. 1 and 2, the batch's loss for each of its rows."""
    n, s = len(a), framework.settings
    za, zb = ((z - z.mean(0)) / torch.sqrt(z.var(0, correction=0) + 1e-5) for z in map(framework.encoder, (a, b)))
    loss = 0
    for i in range(s.dim):
        for j in range(s.dim):
            c = sum(za[k, i] * zb[k, j] for k in range(n)) / n
            loss = loss + ((1 - c) ** 2 if i == j else s.off_diagonal * c**2)
    return [s.scale * loss] * n


def swav_pair(framework: nn.Module, a: Tensor, b: Tensor) -> list[Tensor]:
    """Caron et al. Eq. 1 to 5: each view's softmax over the prototypes against the other's code."""
    s, n, w = framework.settings, len(a), framework.prototypes.weight
    scores = [unit(framework.encoder(x)) @ w.T for x in (a, b)]
    codes = [reference.sinkhorn(score.detach(), s.epsilon, s.sinkhorn) for score in scores]

    def entropy(score: Tensor, code: Tensor) -> Tensor:
        return -sum(code[k] * torch.log(torch.exp(score[k] / s.temperature) / total(score)) for k in range(len(w)))

    def total(score: Tensor) -> Tensor:
        return sum(torch.exp(score[k] / s.temperature) for k in range(len(w)))

    return [(entropy(scores[0][i], codes[1][i]) + entropy(scores[1][i], codes[0][i])) / 2 for i in range(n)]


def vicreg_pair(framework: nn.Module, a: Tensor, b: Tensor) -> list[Tensor]:
    """Bardes et al. Eq. 1 to 6, the batch's loss for each of its rows."""
    n, s = len(a), framework.settings
    za, zb = framework.encoder(a), framework.encoder(b)
    loss = s.invariance * sum((za[k, i] - zb[k, i]) ** 2 for k in range(n) for i in range(s.dim)) / (n * s.dim)
    for z in (za, zb):
        z = z - z.mean(0)
        for i in range(s.dim):
            c = [sum(z[k, i] * z[k, j] for k in range(n)) / (n - 1) for j in range(s.dim)]
            loss = loss + s.variance * torch.clamp(1 - torch.sqrt(c[i] + 1e-4), min=0) / s.dim
            loss = loss + s.covariance * sum(c[j] ** 2 for j in range(s.dim) if j != i) / s.dim
    return [loss] * n


PAIRS = {
    "simclr": simclr_pair,
    "byol": byol_pair,
    "simsiam": simsiam_pair,
    "barlow_twins": barlow_pair,
    "swav": swav_pair,
    "vicreg": vicreg_pair,
}


def naive_loss(name: str, framework: nn.Module, case: str, x1: Tensor, x2: Tensor, seed: int) -> Tensor:
    """Un-Mix's core code: the pair loss of (x1, x2), and the weighted one of each mixture's order with x2."""
    n = len(x1)
    loss = sum(PAIRS[name](framework, x1, x2)) / n
    for term in terms(case, x1, seed):
        pairs = PAIRS[name](framework, term.images, x2)
        loss = loss + sum(weight * pair for weight, pair in zip(term.weights, pairs, strict=True)) / n
    return loss


# --------------------------------------------------------------------------------------------- loss and gradient


@pytest.mark.parametrize(("n", "seed"), [(4, 0), (5, 1), (8, 2)])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", PAIRS)
def test_loss_and_gradients_equal_the_loops(name: str, case: str, n: int, seed: int):
    framework = small(name, seed)
    other = copy.deepcopy(framework)
    x1, x2 = views(n, seed)
    loss, expected = loss_of(framework, case, x1, x2, seed), naive_loss(name, other, case, x1, x2, seed)
    mixup = case.startswith(("unmix mixup", "both"))  # its lambda is a float32 mean over pixels
    assert loss.item() == pytest.approx(expected.item(), rel=1e-7 if mixup else 1e-12)
    loss.backward()
    expected.backward()
    for (key, mine), theirs in zip(framework.named_parameters(), other.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), key
        if mine.grad is not None:
            close = {"rtol": 1e-6, "atol": 1e-7} if mixup else {"rtol": 1e-9, "atol": 1e-12}
            torch.testing.assert_close(mine.grad, theirs.grad, **close, msg=key)


@pytest.mark.parametrize("name", [name for name in PAIRS if name not in ("barlow_twins", "vicreg")])
def test_each_row_of_a_score_is_the_loss_of_its_own_pair(name: str):
    """With more than one mix group the rows have different weights, so their order counts."""
    framework = small(name)
    other = copy.deepcopy(framework)
    x1, x2 = views(6, 0)
    targets = framework.targets(x1, x2)
    (embedding,) = framework.embed([x1], targets)
    rows = framework.score(embedding, targets, clean=True).tolist()
    assert rows == pytest.approx([pair.item() for pair in PAIRS[name](other, x1, x2)], rel=1e-9)
    assert min(abs(a - b) for i, a in enumerate(rows) for b in rows[:i]) > 1e-4


@pytest.mark.parametrize("name", ["byol", "simsiam"])
def test_a_mixture_in_one_direction_only_predicts_x2(name: str):
    framework = small(name, symmetric_mixture=False)
    x1, x2 = views(6, 0)
    x2.requires_grad_()
    targets = framework.targets(x1, x2)
    rows = framework.score(*framework.embed([x1], targets), targets, clean=False)
    rows.mean().backward()
    assert x2.grad is None  # x2 is nothing but a target here
    p = unit(framework.predictor(framework.encoder(x1)))
    cos = [(p[i] * unit(targets.projection)[i]).sum().item() for i in range(6)]
    expected = [-c for c in cos] if name == "simsiam" else [2 - 2 * c for c in cos]
    assert rows.tolist() == pytest.approx(expected)
    clean = []
    for each in (framework, small(name)):
        targets = each.targets(x1, x2)
        clean.append(each.score(*each.embed([x1], targets), targets, clean=True).tolist())
    assert clean[0] == pytest.approx(clean[1])


@pytest.mark.parametrize(("n", "t"), [(2, 0.5), (5, 0.1)])
def test_nt_xent_has_2n_minus_2_negatives(n: int, t: float):
    z = torch.eye(n, dtype=torch.float64).repeat(2, 1)  # pairs agree, all else is orthogonal
    expected = math.log(math.exp(1 / t) + 2 * n - 2) - 1 / t
    assert nt_xent(z, t).tolist() == pytest.approx([expected] * n)


def test_nt_xent_logits_are_float32_under_bfloat16():
    z = torch.nn.functional.normalize(torch.randn(16, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = nt_xent(z, 0.1)
    torch.testing.assert_close(loss, nt_xent(z, 0.1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", PAIRS)
def test_losses_stay_in_float32_under_bfloat16(name: str):
    framework = small(name).float()
    x1, x2 = (x.float() for x in views(8, 0))
    exact = loss_of(framework, "both", x1, x2, 0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(framework, "both", x1, x2, 0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), abs=0.1)


# ------------------------------------------------------------------------------------------------ forward passes


@pytest.mark.parametrize(
    ("case", "batches"), [("vanilla", 2), ("unmix mixup", 3), ("mixmask", 3), ("both", 4), ("erase", 3)]
)
@pytest.mark.parametrize("name", PAIRS)
def test_the_switch_term_costs_no_forward_pass(name: str, case: str, batches: int):
    framework, passes = small(name), []
    framework.encoder.backbone.register_forward_hook(lambda *_: passes.append("encoder"))
    if name == "byol":
        framework.target_encoder.backbone.register_forward_hook(lambda *_: passes.append("target"))
    loss_of(framework, case, *views(6, 0), 0)
    assert passes.count("encoder") == batches
    assert passes.count("target") == (batches if name == "byol" else 0)


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_the_registry_s_passes_are_those_that_a_step_makes(name: str):
    """With and without gradient, for each training image: of the clean pair, and what each method adds."""

    def passes(case: str, **settings) -> tuple[int, int]:
        framework, counts = small(name, **settings), {True: 0, False: 0}

        def count(network: nn.Module, inputs: tuple[Tensor]) -> None:
            counts[torch.is_grad_enabled()] += len(inputs[0])

        for module in framework.modules():
            if isinstance(module, SmallNet):
                module.register_forward_pre_hook(count)
        loss_of(framework, case, *views(6, 0), 0)
        return counts[True] // 6, counts[False] // 6

    facts = registry.FRAMEWORKS[name]
    assert passes("vanilla") == facts.passes(SMALL[name])
    if facts.symmetric:
        assert passes("vanilla", symmetric=False) == facts.passes({}) == (facts.gradient, facts.forward)
    for case in ("unmix mixup", "mixmask", "both", "erase"):
        added = passes(case)[0] - passes("vanilla")[0]
        assert added == registry.METHODS[recipe(case).method].added


def test_simclr_runs_the_head_on_both_views_of_each_pair():
    framework, sizes = small("simclr"), []
    framework.encoder.head.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    loss_of(framework, "both", *views(6, 0), 0)
    assert sizes == [12] * 5


# --------------------------------------------------------------------------------------------------------- BYOL


def state(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def test_byol_target_follows_the_online_network_after_the_step():
    framework = small("byol")
    optimizer = torch.optim.SGD(framework.encoder.parameters(), lr=0.5)
    x1, x2 = views(6, 0)
    before = state(framework.target_encoder)
    anchors = METHODS["vanilla"](recipe("vanilla"), x1, [])
    loss, _, targets = objective(framework, x1, x2, anchors)
    names = dict(framework.encoder.named_parameters())
    assert all(torch.equal(framework.target_encoder.state_dict()[key], before[key]) for key in names)
    loss.backward()
    optimizer.step()
    seen = state(framework.target_encoder)
    framework.after_step(targets, 3, 10)
    tau = 1 - 0.1 * (math.cos(0.3 * math.pi) + 1) / 2
    after = framework.target_encoder.state_dict()
    for key in after:
        if key in names:
            torch.testing.assert_close(
                after[key], tau * before[key] + (1 - tau) * names[key].detach(), rtol=1e-12, atol=0
            )
        else:
            assert torch.equal(after[key], seen[key]), key  # BatchNorm's statistics are its own


def test_byol_momentum_rises_from_its_base_to_one():
    taus = [target_momentum(0.99, step, 1000) for step in range(1001)]
    assert taus[0] == pytest.approx(0.99) and taus[500] == pytest.approx(0.995) and taus[1000] == 1
    assert taus == sorted(set(taus))


def test_byol_target_normalises_by_the_batch_and_starts_as_a_copy():
    torch.manual_seed(0)
    framework = BYOL(SmallNet(), BYOL.Settings(**SMALL["byol"])).train()
    for mine, theirs in zip(framework.encoder.parameters(), framework.target_encoder.parameters(), strict=True):
        assert torch.equal(mine, theirs) and mine is not theirs and not theirs.requires_grad
    x = torch.randn(6, 3, 8, 8)
    targets = framework.targets(x, x)
    (_, z), (_, again) = framework.embed([x, torch.cat([x[:3], 2 * x[3:]])], targets)
    assert not torch.allclose(z[:3], again[:3])


# ------------------------------------------------------------------------------------------------ stop-gradients


def test_no_gradient_reaches_a_target():
    x1, x2 = views(6, 0)
    for name in ("byol", "simsiam"):
        framework = small(name)
        targets = framework.targets(x1, x2)
        ((_, projection),) = framework.embed([x1], targets)
        assert not projection.requires_grad and not targets.projection.requires_grad
        loss_of(framework, "both", x1, x2, 0).backward()
        for key, parameter in framework.named_parameters():
            assert (parameter.grad is None) == key.startswith("target_encoder."), key


# ------------------------------------------------------------------------------------- SimSiam's predictor's rate


def test_simsiam_predictor_keeps_the_base_rate_through_warm_up_and_after_resuming():
    settings = config.load(ROOT / "pretrain/configs/cifar100_simsiam.yaml").optimizer
    framework = small("simsiam")
    optimizer = build_optimizer(settings, framework.parameters(), framework.fixed_lr_parameters())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(framework.parameters()))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = state(framework)
    set_learning_rate(optimizer, 0.0)  # the first iteration of the warm-up
    loss_of(framework, "mixmask", *views(6, 0), 0).backward()
    optimizer.step()
    moved = {
        key for key, _ in framework.named_parameters() if not torch.equal(framework.state_dict()[key], before[key])
    }
    assert moved == {
        key for key in before if key.startswith("predictor.") and key in dict(framework.named_parameters())
    }
    assert sorted(group["lr"] for group in optimizer.param_groups) == [0.0, 0.06]


def test_simsiam_predictor_follows_the_schedule_if_told_to():
    framework = small("simsiam", predictor_constant_lr=False)
    settings = config.load(ROOT / "pretrain/configs/cifar100_simsiam.yaml").optimizer
    optimizer = build_optimizer(settings, framework.parameters(), framework.fixed_lr_parameters())
    set_learning_rate(optimizer, 0.01)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01]


# --------------------------------------------------------------------------------------------------- what is logged


@pytest.mark.parametrize("name", PAIRS)
def test_metrics_are_those_of_the_clean_pair(name: str):
    framework = small(name)
    x1, x2 = views(6, 0)
    anchors = METHODS["both"](recipe("both"), x1, [np.random.default_rng(0)])
    _, _, targets = objective(framework, x1, x2, anchors)
    metrics = framework.metrics(targets)
    clean = objective(framework, x1, x2, METHODS["vanilla"](recipe("vanilla"), x1, []))[2]
    for key, value in framework.metrics(clean).items():
        assert not value.requires_grad and metrics[key].item() == pytest.approx(value.item())
    assert -1 <= metrics["positive_similarity"].item() <= 1
    erased = METHODS["erase"](recipe("erase"), x1, [np.random.default_rng(0)])[1:]
    assert framework.metrics(objective(framework, x1, x2, erased)[2]) == {}


def test_spread_is_zero_for_collapse_and_one_for_isotropy():
    assert spread(torch.ones(100, 16)).item() == pytest.approx(0, abs=1e-6)
    assert spread(torch.randn(2000, 16, generator=torch.Generator().manual_seed(0))).item() == pytest.approx(
        1, abs=0.02
    )


# ------------------------------------------------------------------------------------------------------ recipes


def test_table8_values_of_the_recipes():
    """Table 8, columns 2 and 3."""
    for name in RECIPES:
        r = config.load(ROOT / f"pretrain/configs/{name}.yaml")
        assert (r.recipe, r.epochs, r.batch_size, r.backbone.arch, r.backbone.bn_groups) == (
            name,
            1000,
            512,
            "resnet18",
            1,
        )
        assert (r.mask.grid, r.mask.ratio, r.mask.type, r.unmix.prob) == (4, 0.5, "block", 0.5)
        tiny = r.dataset == "tiny_imagenet"
        assert (r.augment.size, r.backbone.stem) == ((64, "tiny") if tiny else (32, "cifar"))
        if r.framework == "simsiam":
            assert (r.optimizer.name, r.optimizer.lr, r.optimizer.weight_decay) == ("sgd", 0.06, 5e-4)
            assert r.settings["dim"] == 128 and r.schedule.warmup_epochs == 10
        else:
            assert (r.optimizer.name, r.optimizer.weight_decay) == ("adam", 1e-6)
            assert (r.optimizer.lr, r.settings["dim"]) == ((2e-3, 128) if tiny else (3e-3, 64))
            assert r.settings["hidden"] == 1024
            assert r.augment.order == ("jitter", "grayscale", "crop", "flip")


HEADS = {  # Table 8 and its sources; the backbone has 16 features here
    "cifar100_simclr": ("16-1024 BN1024 ReLU 1024-64 BN64", ""),
    "tiny_imagenet_simclr": ("16-1024 BN1024 ReLU 1024-128 BN128", ""),
    "cifar100_byol": ("16-1024 BN1024 ReLU 1024-64", "64-1024 BN1024 ReLU 1024-64"),
    "tiny_imagenet_byol": ("16-1024 BN1024 ReLU 1024-128", "128-1024 BN1024 ReLU 1024-128"),
    "cifar100_simsiam": ("16-2048 BN2048 ReLU 2048-128 BN128", "128-512 BN512 ReLU 512-128"),
}


def layers(module: nn.Module) -> str:
    """Linear layers as in-out, BatchNorm with its width."""
    names = {
        nn.Linear: lambda m: f"{m.in_features}-{m.out_features}",
        nn.BatchNorm1d: lambda m: f"BN{m.num_features}",
        nn.ReLU: lambda m: "ReLU",
    }
    return " ".join(name(m) for m in module.modules() for kind, name in names.items() if isinstance(m, kind))


@pytest.mark.parametrize("name", RECIPES)
def test_table8_heads_and_predictors(name: str):
    framework = build_framework(config.load(ROOT / f"pretrain/configs/{name}.yaml", {"backbone.width": 2}))
    predictor = getattr(framework, "predictor", nn.Identity())
    assert (layers(framework.encoder.head), layers(predictor)) == HEADS[name]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains_at_a_tiny_width(name: str, tmp_path: Path):
    tiny = {
        "method": "both",
        "dataset": "photos",
        "epochs": 1,
        "batch_size": 500,
        "backbone.width": 2,
        "augment.size": 8,
        "knn.k": 20,
        "knn.every": 0,
        "run.device": "cpu",
        "run.log_every": 1,
    }
    result = train.train(config.load(ROOT / f"pretrain/configs/{name}.yaml", tiny), tmp_path / "run")
    assert result["steps"] == 4 and math.isfinite(result["metrics"]["loss"])
    protocol = "t0.1" if name.endswith("simsiam") else "euclidean"  # PatrickHua's and htdt's k-NN
    assert f"knn_k20_{protocol}_backbone16_last" in result["metrics"]


# -------------------------------------------------------------------------------------------------- seeded curves


CURVES = {  # of the losses that the loops above confirm
    "moco": [8.458725763, 10.77550829, 13.94144591, 16.8562557, 18.3292111],
    "simclr": [6.225147312, 5.552808376, 5.486644298, 6.11070105, 5.666856444],
    "byol": [16.90859103, 9.822029385, 4.587640162, 2.683118613, 2.451937277],
    "simsiam": [0.313236296, 0.01682429126, -0.4236654398, -0.5822803539, -1.120652564],
    "barlow_twins": [6.6511016, 2.786834179, 4.07812631, 3.440528894, 5.41706438],
    "swav": [6.711812879, 5.200729467, 8.895742221, 7.276644115, 6.781433706],
    "vicreg": [2.443717821, 1.961290531, 1.979474152, 1.706140795, 1.96587536],
}


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_seeded_loss_curve_is_pinned(name: str):
    assert loss_curve(name) == pytest.approx(CURVES[name], rel=1e-7)


def loss_curve(name: str) -> list[float]:
    """Five steps of SGD with MixMask and Un-Mix, float64."""
    framework = small(name)
    optimizer = torch.optim.SGD(framework.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step in range(5):
        x1, x2 = views(8, step)
        anchors = METHODS["both"](recipe("both"), x1, [np.random.default_rng(step)])
        loss, _, targets = objective(framework, x1, x2, anchors, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        framework.after_step(targets, step, 5)
        losses.append(loss.item())
    return losses


def test_a_framework_is_found_by_its_name():
    assert FRAMEWORKS["simsiam"] is SimSiam and FRAMEWORKS["byol"] is BYOL

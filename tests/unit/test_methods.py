"""Methods: Eq. 1, Eq. 2 and Algorithm 1, pixel by pixel, and what each row of a mixture holds."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor

from mixmask import methods
from mixmask.config import ConfigError, Erase, Mask, UnMix
from mixmask.masks import sample_mask
from mixmask.methods import METHODS, Anchor, cutmix_box, mixmask, mixture, partners, unmix, unmix_map, vanilla
from tests import reference

MASK = Mask("block", "repaired", 4, 0.25)


def rngs(groups: int = 1, seed: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng([seed, g]) for g in range(groups)]


def ordered(anchor: Anchor) -> Tensor:
    """The images in the row order in which they are scored."""
    return anchor.images if anchor.order is None else anchor.images[anchor.order]


def coloured(n: int, side: int = 8) -> Tensor:
    """Image i is one in channel i and zero elsewhere: a mixture's channel means say which images it holds."""
    return torch.eye(n)[:, :, None, None].expand(n, n, side, side).clone()


def content(anchor: Anchor) -> Tensor:
    """(N, N): the share of image j in the row that is scored as image i."""
    return ordered(anchor).mean(dim=(2, 3))


# ---------------------------------------------------------------------------------------------- Eq. 1 and 2


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75, (0.0, 1.0)])
@pytest.mark.parametrize("kind", ["block", "discrete"])
def test_eq1_and_eq2_pixel_by_pixel(kind: str, ratio):
    mask = Mask(kind, "repaired", 4, ratio)
    x = torch.randn(5, 2, 8, 8, dtype=torch.float64)
    normal, switch = mixmask(x, mask, rngs())
    m = sample_mask(mask, 8, 8, rngs()[0])[0, 0]
    reverse = [4, 3, 2, 1, 0]
    assert torch.equal(normal.images, reference.mix(x, [m] * 5, reverse))
    assert torch.equal(ordered(switch), reference.mix(x, [1 - m] * 5, reverse))  # Eq. 2: the mask is turned around
    lam = reference.pixel_share(m)
    assert normal.weight.tolist() == pytest.approx([lam] * 5)
    assert switch.weight.tolist() == pytest.approx([1 - lam] * 5)


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.75, 0.9])
def test_eq2_in_reverse_order_is_the_flipped_mixture(ratio: float):
    x = torch.randn(6, 3, 8, 8)
    normal, switch = mixmask(x, Mask("block", "repaired", 8, ratio), rngs())
    assert switch.images is normal.images  # one forward pass
    assert torch.equal(ordered(switch), normal.images.flip(0))


def test_fractional_maps_mix_in_proportion():
    x, m = torch.randn(4, 2, 3, 5, dtype=torch.float64), torch.rand(1, 1, 3, 5, dtype=torch.float64)
    normal, switch = mixture("any", x, m, torch.tensor([2, 0, 3, 1]))
    expected = reference.mix(x, [m[0, 0]] * 4, [2, 0, 3, 1])
    assert torch.allclose(normal.images, expected, rtol=0, atol=1e-15)
    assert torch.allclose(ordered(switch), expected[[1, 3, 0, 2]], rtol=0, atol=1e-15)
    assert float(normal.weight[0]) == pytest.approx(reference.pixel_share(m[0, 0]))


def test_switch_no_leaves_the_first_term_with_its_weight():
    (only,) = mixmask(torch.randn(4, 3, 8, 8), Mask("block", "repaired", 4, 0.25, switch=False), rngs())
    assert only.order is None and only.weight.tolist() == [0.25] * 4


# ----------------------------------------------------------------------------- random permutation, Algorithm 1


@pytest.mark.parametrize("n", [3, 8, 9])
def test_random_permutation_is_undone_so_that_row_i_holds_image_i(n: int):
    x = coloured(n)
    for seed in range(20):
        normal, switch = mixmask(x, MASK, rngs(seed=seed), permutation="random")
        partner = partners_of(normal)
        for i in range(n):
            lone = partner[i] == i
            assert float(content(normal)[i, i]) == pytest.approx(1.0 if lone else float(normal.weight[i]))
            assert float(content(switch)[i, i]) == pytest.approx(1.0 if lone else float(switch.weight[i]))
            assert switch.order[partner[i]] == i  # the inverse permutation
        assert switch.weight.tolist() == [0.75] * n


def partners_of(normal: Anchor) -> list[int]:
    """The partner of each image, read off a mixture of coloured images."""
    shares = content(normal).clone()
    shares.fill_diagonal_(0)
    return [int(row.argmax()) if row.any() else i for i, row in enumerate(shares)]


def test_indexing_with_the_permutation_itself_would_lose_image_i():
    for seed in range(20):
        normal, switch = mixmask(coloured(8), MASK, rngs(seed=seed), permutation="random")
        partner = partners_of(normal)
        if sorted(partner) == list(range(8)) and any(partner[partner[i]] != i for i in range(8)):
            wrong = content(Anchor("wrong", normal.images, order=torch.tensor(partner)))
            assert (wrong.diagonal() == 0).any()
            assert (content(switch).diagonal() > 0).all()
            return
    pytest.fail("no permutation that differs from its inverse")


def test_random_permutations_are_uniform():
    rng = np.random.default_rng(0)
    drawn = torch.stack([partners(5, [rng], "random") for _ in range(4_000)])
    for i in range(5):
        counts = torch.bincount(drawn[:, i], minlength=5)
        assert ((counts - 800).abs() < 4 * (800 * 0.8) ** 0.5).all()


def test_derangements_are_uniform_and_leave_nobody_in_place():
    rng = np.random.default_rng(0)
    counts = Counter(tuple(partners(4, [rng], "derangement").tolist()) for _ in range(4_500))
    assert set(counts) == {p for p in permutations(range(4)) if all(p[i] != i for i in range(4))}  # nine
    assert max(abs(count - 500) for count in counts.values()) < 4 * (500 * 8 / 9) ** 0.5


@pytest.mark.parametrize("method", ["mixmask", "both"])
def test_a_derangement_mixes_every_image_with_another(method: str):
    options = {"mask__permutation": "derangement", "both__permutation": "derangement", "mask__grid": 4}
    settings = reference.recipe(method=method, mask__ratio=0.25, **options)
    for seed in range(20):
        *_, normal, switch = METHODS[method](settings, coloured(4), rngs(2, seed))
        assert all(partner != i for i, partner in enumerate(partners_of(normal)))
        assert torch.allclose(content(normal).diagonal(), normal.weight)
        assert torch.allclose(content(switch).diagonal(), switch.weight)


def test_reverse_pairs_i_with_n_minus_1_minus_i():
    assert partners(5, rngs(), "reverse").tolist() == [4, 3, 2, 1, 0]
    assert partners(6, rngs(2), "reverse").tolist() == [2, 1, 0, 5, 4, 3]


# -------------------------------------------------------------------------------------------------- mix groups


@pytest.mark.parametrize("permutation", ["reverse", "random"])
def test_mix_groups_pair_within_and_have_their_own_mask_and_lambda(permutation: str):
    n, groups = 12, 3
    mask = Mask("discrete", "repaired", 4, (0.0, 1.0))
    normal, switch = mixmask(coloured(n), mask, rngs(groups, seed=1), permutation)
    group = torch.arange(n) // 4
    for anchor in (normal, switch):
        assert (content(anchor)[group[:, None] != group] == 0).all()
        assert torch.allclose(content(anchor).sum(1), torch.ones(n))
    expected = [reference.pixel_share(sample_mask(mask, 8, 8, rng)[0, 0]) for rng in rngs(groups, seed=1)]
    assert len(set(expected)) == groups
    assert normal.weight.tolist() == pytest.approx(np.repeat(expected, 4).tolist())
    assert switch.weight.tolist() == pytest.approx((1 - np.repeat(expected, 4)).tolist())


def test_mix_groups_draw_their_own_permutation():
    drawn = partners(40, rngs(2), "random").reshape(2, 20)
    assert sorted(drawn[0].tolist()) == list(range(20)) and sorted(drawn[1].tolist()) == list(range(20, 40))
    assert (drawn[0] != drawn[1] - 20).any()


@pytest.mark.parametrize("per_image", [False, True])
def test_a_group_is_mixed_as_if_it_were_the_batch(per_image: bool):
    x = torch.randn(8, 3, 8, 8)
    for method in METHODS:
        settings = reference.recipe(method=method, mask__grid=4, mask__per_image=per_image, erase__fill="noise")
        whole = METHODS[method](settings, x, rngs(2))
        for g in range(2):
            part = METHODS[method](settings, x[4 * g : 4 * g + 4], [rngs(2)[g]])
            for a, b in zip(whole, part, strict=True):
                assert torch.equal(ordered(a)[4 * g : 4 * g + 4], ordered(b))
                assert torch.equal(
                    torch.as_tensor(a.weight).expand(8)[4 * g : 4 * g + 4], torch.as_tensor(b.weight).expand(4)
                )


# --------------------------------------------------------------------------------------------- masks per image


@pytest.mark.parametrize("permutation", ["reverse", "random", "derangement"])
@pytest.mark.parametrize("kind, ratio", [("block", 0.25), ("block", (0.0, 1.0)), ("discrete", 0.5)])
def test_eq1_and_eq2_with_a_mask_for_each_image(kind: str, ratio, permutation: str):
    n, groups = 8, 2
    mask = Mask(kind, "repaired", 4, ratio, permutation=permutation, per_image=True)
    x = torch.randn(n, 2, 8, 8, dtype=torch.float64)
    normal, switch = mixmask(x, mask, rngs(groups))
    masks, partner = [], []
    for g, rng in enumerate(rngs(groups)):  # a group draws the masks of its images, then its permutation
        masks += [sample_mask(mask, 8, 8, rng)[0, 0] for _ in range(n // groups)]
        partner += [int(p) + g * n // groups for p in partners(n // groups, [rng], permutation)]
    lam = [reference.pixel_share(m) for m in masks]
    mixed = reference.mix(x, masks, partner)
    assert torch.equal(normal.images, mixed) and switch.images is normal.images  # one forward pass
    assert normal.weight.tolist() == pytest.approx(lam)
    for i in range(n):
        j = partner.index(i)  # the mixture whose filling is image i, by the mask of image j
        assert torch.equal(ordered(switch)[i], mixed[j])
        assert switch.weight[i].item() == pytest.approx(1 - lam[j])
    assert len({tuple(m.ravel().tolist()) for m in masks}) > 2


def test_switch_weights_of_masks_per_image_are_the_shares_of_the_images():
    for permutation in ("reverse", "random", "derangement"):
        mask = Mask("discrete", "repaired", 8, (0.0, 1.0), permutation=permutation, per_image=True)
        normal, switch = mixmask(coloured(8), mask, rngs(seed=3))
        lone = torch.tensor([partner == i for i, partner in enumerate(partners_of(normal))])
        assert len(normal.weight.unique()) > 4
        for anchor in (normal, switch):
            held = content(anchor).diagonal()
            assert torch.allclose(held, torch.where(lone, 1.0, anchor.weight)) and not lone.all()


# ------------------------------------------------------------------------------------------------------ Un-Mix


def test_algorithm1_line_3_prob_is_the_probability_of_mixup():
    rng = np.random.default_rng(0)
    for prob in (0.0, 0.3, 1.0):
        share = np.mean([len(set(unmix_map(prob, 8, 8, rng).ravel().tolist()) - {0.0, 1.0}) > 0 for _ in range(2_000)])
        assert share == pytest.approx(prob, abs=4 * (prob * (1 - prob) / 2_000) ** 0.5)


def test_mixup_lambda_is_beta_1_1_and_constant_over_the_image():
    rng, lams = np.random.default_rng(0), []
    for _ in range(2_000):
        values = unmix_map(1.0, 4, 4, rng).unique()
        assert len(values) == 1
        lams.append(values.item())
    assert np.mean(lams) == pytest.approx(0.5, abs=4 * 0.289 / 2_000**0.5)
    assert np.quantile(lams, [0.1, 0.25, 0.75, 0.9]) == pytest.approx([0.1, 0.25, 0.75, 0.9], abs=0.04)


def test_mixup_pixel_by_pixel():
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    normal, switch = unmix(x, UnMix(1.0), rngs())
    lam = float(unmix_map(1.0, 8, 8, rngs()[0])[0, 0, 0, 0])
    assert torch.allclose(normal.images, lam * x + (1 - lam) * x.flip(0), rtol=0, atol=1e-7)
    assert torch.equal(ordered(switch), normal.images.flip(0))
    assert normal.weight.tolist() == pytest.approx([lam] * 4, abs=1e-6)
    assert switch.weight.tolist() == pytest.approx([1 - lam] * 4, abs=1e-6)


def test_cutmix_pastes_a_box_of_the_flipped_batch_and_lambda_is_the_area_outside():
    x = torch.randn(4, 3, 12, 8)
    for seed in range(50):
        normal, _ = unmix(x, UnMix(0.0), rngs(seed=seed))
        own = (normal.images == x).all(dim=(0, 1))
        pasted = (normal.images == x.flip(0)).all(dim=(0, 1))
        assert torch.equal(own, ~pasted)
        rows, columns = pasted.any(1), pasted.any(0)
        assert torch.equal(pasted, rows[:, None] & columns)  # a rectangle ...
        assert all(int((line.int().diff() == 1).sum()) <= 1 for line in (rows.int(), columns.int()))  # ... in one piece
        assert normal.weight.tolist() == pytest.approx([own.float().mean().item()] * 4)


def test_cutmix_box_has_sides_sqrt_1_minus_lambda_and_a_uniform_centre():
    rng = np.random.default_rng(0)
    boxes = np.array([cutmix_box(0.75, 32, 16, rng) for _ in range(4_000)])
    top, bottom, left, right = boxes.T
    assert (top.min(), bottom.max(), left.min(), right.max()) == (0, 32, 0, 16)
    assert set((bottom - top)[(top > 0) & (bottom < 32)]) == {16} and set(
        (right - left)[(left > 0) & (right < 16)]
    ) == {8}
    centre = bottom[bottom < 32] - 8  # rows 0 to 23
    counts = np.bincount(centre, minlength=24)
    assert len(counts) == 24 and (abs(counts - 125) < 4 * 125**0.5).all()


# --------------------------------------------------------------------------------------------- Algorithm 1: both


def test_algorithm1_has_five_terms_of_three_batches():
    anchors = METHODS["both"](reference.recipe(mask__grid=4), torch.randn(8, 3, 8, 8), rngs())
    assert [a.name for a in anchors] == ["clean", "unmix", "unmix_switch", "mixmask", "mixmask_switch"]
    assert len({id(a.images) for a in anchors}) == 3
    for normal, switch in (anchors[1:3], anchors[3:5]):
        assert torch.allclose(normal.weight + switch.weight[torch.argsort(switch.order)], torch.ones(8))


def test_algorithm1_line_13_pairs_the_two_branches_differently():
    for permutation, equal in (("reverse", True), ("random", False)):
        settings = reference.recipe(mask__grid=4, both__permutation=permutation)
        _, _, unmixed, _, masked = METHODS["both"](settings, torch.randn(8, 3, 8, 8), rngs())
        assert unmixed.order.tolist() == list(range(7, -1, -1))
        assert (masked.order.tolist() == unmixed.order.tolist()) is equal


def test_algorithm1_draws_a_fresh_permutation_every_iteration():
    settings, x = reference.recipe(mask__grid=4), torch.randn(16, 3, 8, 8)
    orders = [METHODS["both"](settings, x, rngs(seed=step))[-1].order.tolist() for step in range(5)]
    assert len({tuple(order) for order in orders}) == 5


# --------------------------------------------------------------------------------------------- vanilla and erase


def test_vanilla_is_the_view_itself():
    x = torch.randn(2, 3, 8, 8)
    (anchor,) = vanilla(x)
    assert anchor.images is x and anchor.clean and anchor.order is None and anchor.weight == 1


@pytest.mark.parametrize("fill", ["zero", "noise"])
def test_erase_keeps_the_masked_cells_and_fills_the_others(fill: str):
    x = torch.randn(32, 3, 16, 16) + 5
    (anchor,) = methods.erase(x, MASK, Erase(fill), rngs())
    shown = sample_mask(MASK, 16, 16, rngs()[0])[0, 0].bool()
    assert torch.equal(anchor.images[..., shown], x[..., shown])
    filling = anchor.images[..., ~shown]
    if fill == "zero":
        assert (filling == 0).all()
    else:
        assert filling.mean().item() == pytest.approx(0, abs=0.03) and filling.std().item() == pytest.approx(
            1, abs=0.03
        )
    assert anchor.weight == 1 and anchor.order is None and not anchor.clean


def test_erase_noise_of_a_mix_group_is_its_own():
    x = torch.zeros(6, 3, 8, 8)
    (anchor,) = methods.erase(x, Mask("block", "repaired", 4, 0.25), Erase("noise"), rngs(2))
    (first,) = methods.erase(x[:3], MASK, Erase("noise"), rngs(1))
    (second,) = methods.erase(x[3:], MASK, Erase("noise"), [rngs(2)[1]])
    assert torch.equal(anchor.images, torch.cat([first.images, second.images]))
    assert not torch.equal(first.images, second.images)
    assert len({tuple(image.ravel().tolist()) for image in anchor.images}) == 6


# ------------------------------------------------------------------------------------------------- determinism


@pytest.mark.parametrize("method", METHODS)
def test_anchors_repeat_from_their_generators_and_leave_the_view_alone(method: str):
    settings = reference.recipe(method=method, mask__grid=8, erase__fill="noise")
    x = torch.randn(8, 3, 16, 16)
    before = x.clone()
    first, again, other = (METHODS[method](settings, x, rngs(2, seed)) for seed in (0, 0, 1))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(ordered(a), ordered(b))
        assert torch.equal(torch.as_tensor(a.weight), torch.as_tensor(b.weight))
    if method != "vanilla":
        assert not torch.equal(first[-1].images, other[-1].images)
    assert torch.equal(x, before)


@pytest.mark.parametrize("method", METHODS)
def test_global_random_state_is_neither_read_nor_moved(method: str):
    settings, x = reference.recipe(method=method, erase__fill="noise"), torch.randn(4, 3, 8, 8)
    before = torch.get_rng_state()
    METHODS[method](settings, x, rngs())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: Mask("blok", "repaired", grid=2, ratio=0.5),
            r"Mask\.type: expected one of block, discrete, none; found 'blok'",
        ),
        (lambda: Mask("block", "repaired", grid=2, ratio=1.5), r"Mask\.ratio: expected between 0 and 1, found 1\.5"),
        (lambda: UnMix(prob=-1), r"UnMix\.prob: expected between 0 and 1"),
        (lambda: Erase("grey"), r"Erase\.fill: expected one of zero, noise; found 'grey'"),
        (lambda: methods.partners(4, rngs(1), "revers"), "permutation: unknown 'revers'; did you mean 'reverse'"),
        (lambda: methods.partners(5, rngs(2), "reverse"), "5 images cannot be split into 2 equal mix groups"),
        (lambda: methods.partners(2, rngs(2), "derangement"), "expected mix groups of two images or more, found 1"),
    ],
)
def test_what_another_program_can_do_wrong_is_named(make, text):
    with pytest.raises(ConfigError, match=text):
        make()


@pytest.mark.parametrize("method", ["mixmask", "unmix", "erase"])
def test_a_batch_that_its_mix_groups_do_not_divide_is_refused(method):
    settings = [Mask("block", "repaired", grid=2, ratio=0.5)] if method != "unmix" else [UnMix(0.5)]
    with pytest.raises(ConfigError, match="a batch of 5 images cannot be split into 2 equal mix groups"):
        getattr(methods, method)(torch.zeros(5, 3, 8, 8), *settings, *([Erase("zero")] * (method == "erase")), rngs(2))

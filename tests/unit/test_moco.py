"""MoCo: queue, momentum encoder, shuffle-BN, the loss at step 0, and several steps against a naive loop."""

import copy

import pytest
import torch
from torch.nn import functional as F

from mixmask.batchnorm import SplitBatchNorm2d
from mixmask.config import ConfigError, Mask
from mixmask.frameworks import build_framework
from mixmask.frameworks.moco import MoCo, Settings
from mixmask.methods import METHODS, mixmask, vanilla
from mixmask.objective import objective
from mixmask.randomness import numpy_generator
from tests import reference
from tests.reference import SmallNet, views


def build(queue: int = 16, groups: int = 1, seed: int = 0, **changes) -> MoCo:
    settings = {"dim": 4, "queue": queue, "momentum": 0.9, "temperature": 0.1} | changes
    torch.manual_seed(seed)
    norm = SplitBatchNorm2d(SmallNet.features, groups) if groups > 1 else None
    return MoCo(SmallNet(norm=norm), Settings(**settings)).double().train()


def queries(moco: MoCo, images: torch.Tensor) -> torch.Tensor:
    return moco.embed([images], moco.targets(images, images))[0][0]


def perturb(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))


# ------------------------------------------------------------------------------------------------------- queue


@pytest.mark.parametrize("sizes", [[4] * 9, [3, 5, 7, 3, 6, 1], [8, 8, 3], [11, 2, 30, 9], [1] * 19])
def test_queue_is_a_ring_buffer_for_any_batch_size(sizes: list[int]):
    moco = build(queue=8)
    naive, pointer = [row.clone() for row in moco.queue], 0
    for size in sizes:
        keys = F.normalize(torch.randn(size, 4, dtype=torch.float64), dim=1)
        moco.enqueue(keys)
        for key in keys:
            naive[pointer] = key
            pointer = (pointer + 1) % 8
        assert torch.equal(moco.queue, torch.stack(naive))
        assert int(moco.pointer) == pointer


def test_queue_starts_on_the_unit_sphere_and_stays_there():
    moco = build(queue=32)
    assert torch.allclose(moco.queue.norm(dim=1), torch.ones(32, dtype=torch.float64))
    assert moco.queue.mean(0).abs().max() < 0.5
    x1, x2 = views(6, 0)
    *_, targets = objective(moco, x1, x2, vanilla(x1))
    moco.after_step(targets, 0, 1)
    assert torch.allclose(moco.queue.norm(dim=1), torch.ones(32, dtype=torch.float64))


@pytest.mark.parametrize("symmetric", [False, True])
def test_keys_are_enqueued_once_after_both_directions(symmetric: bool):
    moco = build(queue=20, symmetric=symmetric)
    x1, x2 = views(7, 0)
    before = moco.queue.clone()
    loss, _, targets = objective(moco, x1, x2, vanilla(x1))
    loss.backward()
    assert torch.equal(moco.queue, before) and int(moco.pointer) == 0  # no positive among its own negatives
    moco.after_step(targets, 0, 1)
    enqueued = [targets.k1, targets.k2] if symmetric else [targets.k2]
    count = 7 * len(enqueued)
    assert torch.equal(moco.queue[:count], torch.cat(enqueued))
    assert torch.equal(moco.queue[count:], before[count:]) and int(moco.pointer) == count
    assert not moco.queue.requires_grad


def test_queue_larger_than_the_data_set_is_an_error():
    moco = build(queue=100)
    moco.check_data(100)
    with pytest.raises(ConfigError, match=r"moco\.queue: 100 keys.*99 images"):
        moco.check_data(99)


def test_queue_and_pointer_are_part_of_the_state():
    assert {"queue", "pointer"} <= build().state_dict().keys()


# ------------------------------------------------------------------------------------------- momentum encoder


def test_key_encoder_starts_equal_and_without_gradient():
    moco = build()
    for k, q in zip(moco.key_encoder.parameters(), moco.encoder.parameters(), strict=True):
        assert torch.equal(k, q) and k is not q and not k.requires_grad and q.requires_grad


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.99, 0.999, 1.0])
def test_momentum_update_moves_parameters_and_no_buffers(momentum: float):
    moco = build(momentum=momentum)
    perturb(moco.encoder)
    moco.encoder(views(5, 0)[0])  # moves the running statistics of the encoder
    queries = copy.deepcopy(moco.encoder.state_dict())
    buffers = {name: value.clone() for name, value in moco.key_encoder.named_buffers()}
    expected = reference.moved(moco.key_encoder, moco.encoder, momentum)
    moco.move_key_encoder()
    for (name, found), wanted in zip(moco.key_encoder.named_parameters(), expected.parameters(), strict=True):
        assert torch.allclose(found, wanted, rtol=0, atol=1e-15), name
    for name, value in moco.key_encoder.named_buffers():
        assert torch.equal(value, buffers[name]), name
    assert all(torch.equal(queries[name], value) for name, value in moco.encoder.state_dict().items())


def test_key_encoder_moves_once_before_the_keys_are_made():
    moco = build(momentum=0.9, symmetric=True)
    perturb(moco.encoder)
    x1, x2 = views(5, 0)
    expected = reference.moved(moco.key_encoder, moco.encoder, 0.9)
    targets = moco.targets(x1, x2, torch.Generator())
    assert torch.allclose(targets.k2, reference.unit(expected(x2)))
    assert torch.allclose(targets.k1, reference.unit(expected(x1)))
    for found, wanted in zip(moco.key_encoder.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(found, wanted)
    assert not targets.k2.requires_grad and not targets.k1.requires_grad


def test_one_direction_makes_no_keys_of_the_first_view():
    moco = build(symmetric=False)
    assert moco.targets(*views(5, 0)).k1 is None


# -------------------------------------------------------------------------------------------------- shuffle-BN


def test_shuffled_keys_return_to_their_rows():
    moco, plain = build(groups=4), build(groups=4, shuffle_bn=False)
    x = views(12, 0)[0]
    moco.key_encoder.eval(), plain.key_encoder.eval()  # fixed statistics: a key depends on its own image alone
    for seed in range(5):
        (keys,) = moco.keys([x], torch.Generator().manual_seed(seed))
        assert torch.allclose(keys, *plain.keys([x]), rtol=0, atol=1e-12)


def test_shuffling_changes_the_batchnorm_groups():
    x = views(12, 0)[0]
    (plain,) = build(groups=4, shuffle_bn=False).keys([x], torch.Generator().manual_seed(0))
    assert torch.allclose(plain, queries(build(groups=4), x))  # the two encoders are equal, and so are the groups
    shuffled = [build(groups=4).keys([x], torch.Generator().manual_seed(seed))[0] for seed in (0, 1)]
    assert not torch.allclose(shuffled[0], plain) and not torch.allclose(shuffled[0], shuffled[1])
    moco, order = build(groups=4), torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()
    expected = torch.empty_like(plain)
    for g in range(4):
        members = order[3 * g : 3 * g + 3]
        alone = copy.deepcopy(moco.key_encoder)
        alone.backbone.norm.groups = 1
        expected[members] = reference.unit(alone(x[members]))
    assert torch.allclose(shuffled[0], expected)


def test_the_two_views_are_shuffled_differently():
    moco = build(groups=4, symmetric=True)
    x = views(12, 0)[0]
    targets = moco.targets(x, x, torch.Generator().manual_seed(0))
    assert not torch.allclose(targets.k1, targets.k2)


def test_queries_are_not_shuffled():
    moco = build(groups=4)
    x = views(12, 0)[0]
    q = queries(moco, x)
    alone = copy.deepcopy(moco.encoder)
    alone.backbone.norm.groups = 1
    assert torch.allclose(q, torch.cat([reference.unit(alone(part)) for part in x.split(3)]))


# ---------------------------------------------------------------------------------------------- loss at step 0


@pytest.mark.parametrize("symmetric", [False, True])
def test_loss_at_step_0_follows_from_the_measured_similarities(symmetric: bool):
    overrides = {"backbone__width": 4, "backbone__bn_groups": 2, "moco__queue": 64, "moco__symmetric": symmetric}
    torch.manual_seed(0)
    moco = build_framework(reference.recipe(**overrides)).train()
    x1, x2 = (x.float() for x in views(8, 0, side=16))
    loss, _, targets = objective(moco, x1, x2, vanilla(x1), torch.Generator().manual_seed(0))

    expected, directions = 0.0, [(x1, targets.k2)] + ([(x2, targets.k1)] if symmetric else [])
    for x, keys in directions:
        q = F.normalize(moco.encoder(x).detach(), dim=1).double()
        s, u = (q * keys).sum(1), q @ moco.queue.double().T
        expected += ((s / 0.1).exp() + (u / 0.1).exp().sum(1)).log().sub(s / 0.1).mean().item()
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    q = F.normalize(moco.encoder(x1).detach(), dim=1)
    measured = moco.metrics(targets)["positive_similarity"].item()
    assert measured == pytest.approx((q * targets.k2).sum(1).mean().item(), abs=1e-4)


def test_logits_far_apart_do_not_overflow():
    moco = build(temperature=1e-4)
    q = F.normalize(torch.randn(3, 4, dtype=torch.float64), dim=1)
    loss = moco.infonce((q, torch.logsumexp(q @ moco.queue.T / 1e-4, dim=1)), -q)
    assert torch.isfinite(loss).all() and (loss > 1e3).all()


@pytest.mark.parametrize("own_view", [False, True])
def test_a_mask_of_nothing_scores_x1_again_against_the_key_of_x2_and_of_its_own_view(own_view: bool):
    moco = build(symmetric=True, own_view=own_view)
    x1, x2 = views(6, 0)
    mask = Mask(type="none", block_impl="repaired", grid=2, ratio=0.5)
    anchors = vanilla(x1) + mixmask(x1, mask, [numpy_generator("mix", 0)])
    _, parts, targets = objective(moco, x1, x2, anchors)
    q1 = moco.embed([x1], targets)[0][0]
    expected = 0.0
    for keys in [targets.k2, targets.k1] if own_view else [targets.k2]:
        logits = torch.cat(((q1 * keys).sum(1, keepdim=True), q1 @ moco.queue.T), dim=1) / 0.1
        expected += F.cross_entropy(logits, torch.zeros(6, dtype=torch.long))
    torch.testing.assert_close(parts["mixmask"], expected.detach())
    assert parts["mixmask_switch"] == 0


# ------------------------------------------------------------------------------------------------ several steps


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", ["vanilla", "both"])
def test_four_steps_of_sgd_against_a_naive_loop(method: str, symmetric: bool):
    """Queue order, pointer, momentum and the order of the updates: an error in any shows from the second step on."""
    n, rate = 5, 0.3
    recipe = reference.recipe(method=method, mask__grid=4, both__permutation="reverse", unmix__prob=0.0)
    moco = build(queue=13, symmetric=symmetric)
    naive = copy.deepcopy(moco)
    queue, oldest = [row.clone() for row in naive.queue], 0
    optimizer = torch.optim.SGD(moco.encoder.parameters(), rate)
    for step in range(4):
        x1, x2 = views(n, step)
        anchors = METHODS[method](recipe, x1, [numpy_generator("mix", step)])
        mixtures = [
            reference.Mixture(a.images, a.weight.tolist(), list(range(n))[::-1]) for a in anchors[1::2]
        ]  # Eq. 1 has its own test
        expected, keys = reference.moco_loss(naive, naive.encoder, x1, x2, mixtures, queue)
        naive.key_encoder = reference.moved(naive.key_encoder, naive.encoder, 0.9)
        gradients = torch.autograd.grad(expected, list(naive.encoder.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(naive.encoder.parameters(), gradients, strict=True):
                parameter -= rate * gradient
        for key in keys:
            queue[oldest] = key
            oldest = (oldest + 1) % 13

        loss, _, targets = objective(moco, x1, x2, anchors, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        moco.after_step(targets, step, 4)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6), step
        assert torch.allclose(moco.queue, torch.stack(queue), atol=1e-7)


def test_parameters_that_the_optimiser_sees_leave_out_the_key_encoder():
    moco = build()
    trained = {id(p) for p in moco.parameters() if p.requires_grad}
    assert trained == {id(p) for p in moco.encoder.parameters()}


def test_v2_head_is_linear_relu_linear_as_wide_as_the_features():
    first, _, last = head = build(mlp=True).encoder.head
    assert (first.weight.shape, last.weight.shape) == ((6, 6), (4, 6))
    x = torch.randn(5, 6, dtype=torch.float64)
    assert torch.allclose(head(x), last(first(x).clamp(min=0)))


def test_v1_head_is_one_linear_layer():
    head = build().encoder.head
    assert isinstance(head, torch.nn.Linear) and head.weight.shape == (4, 6)


def test_logits_are_float32_under_autocast():
    moco = build().float()
    images = torch.randn(8, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        ((q, negatives),) = moco.embed([images], moco.targets(images, images))
    assert q.dtype == negatives.dtype == torch.float32
    torch.testing.assert_close(negatives, torch.logsumexp(q @ moco.queue.T / moco.settings.temperature, dim=1))

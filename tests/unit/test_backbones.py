"""Backbones: split BatchNorm is several BatchNorms, and the ResNets are torchvision's but for the stem."""

import contextlib
import copy

import pytest
import torch
import torchvision
from torch import nn

from mixmask import batchnorm
from mixmask.backbones import Encoder, ResNet, build_backbone, views
from mixmask.batchnorm import GroupsAsChannels, SplitBatchNorm, SplitBatchNorm2d, Tile, split_batch_norm
from mixmask.config import Backbone
from mixmask.paths import as_on_a_gpu


def split_and_separate(groups: int, channels: int = 5) -> tuple[SplitBatchNorm2d, list[nn.BatchNorm2d]]:
    """A split BatchNorm, and one plain BatchNorm per group, all with the same weights and running statistics."""
    torch.manual_seed(groups)
    split = SplitBatchNorm2d(channels, groups).double()
    nn.init.uniform_(split.weight), nn.init.normal_(split.bias)
    nn.init.normal_(split.running_mean), nn.init.uniform_(split.running_var, 0.5, 2)
    separate = [nn.BatchNorm2d(channels).double() for _ in range(groups)]
    for bn in separate:
        bn.load_state_dict(split.state_dict())
    return split, separate


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_split_batchnorm_is_separate_batchnorms(groups: int, layout: torch.memory_format):
    split, separate = split_and_separate(groups)
    for _ in range(2):  # the second time from the averaged running statistics
        x = (3 * torch.randn(8, 5, 4, 3, dtype=torch.float64) + 1).contiguous(memory_format=layout).requires_grad_()
        y = x.detach().clone().requires_grad_()
        found = split(x)
        expected = torch.cat([bn(part) for bn, part in zip(separate, y.chunk(groups), strict=True)])
        assert torch.allclose(found, expected)
        weights = torch.randn_like(expected)
        split.zero_grad()
        (found * weights).sum().backward()
        for bn in separate:
            bn.zero_grad()
        (expected * weights).sum().backward()
        assert torch.allclose(x.grad, y.grad)
        assert torch.allclose(split.weight.grad, sum(bn.weight.grad for bn in separate))
        assert torch.allclose(split.bias.grad, sum(bn.bias.grad for bn in separate))
        for name in ("running_mean", "running_var"):
            mean = torch.stack([getattr(bn, name) for bn in separate]).mean(0)
            assert torch.allclose(getattr(split, name), mean), name
            for bn in separate:
                getattr(bn, name).copy_(mean)
    assert int(split.num_batches_tracked) == 2


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("parts", [1, 3])
def test_groups_as_channels_is_a_kernel_for_each_part(parts: int, layout: torch.memory_format):
    torch.manual_seed(parts)
    x = (3 * torch.randn(12, 5, 4, 3, dtype=torch.float64) + 1).contiguous(memory_format=layout).requires_grad_()
    weight, bias = (torch.randn(5, dtype=torch.float64).requires_grad_() for _ in range(2))
    tiles = [*Tile.apply(parts, weight, bias), *torch.zeros(2, 5 * parts, dtype=torch.float64)]
    results = []
    for y, mean, var in (
        SplitBatchNorm.apply(x, weight, bias, parts, 1e-5),
        GroupsAsChannels.apply(x, *tiles, parts, 1e-5),
    ):
        assert y.is_contiguous(memory_format=layout)
        results.append((y, mean, var, *torch.autograd.grad((y**3).sum(), (x, weight, bias))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_tiles_repeat_and_their_gradients_add_up():
    a, b = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)
    tiles = Tile.apply(3, a, b)
    assert [tile.tolist() for tile in tiles] == [[1.0, 2.0] * 3, [3.0] * 3]
    (tiles[0] * torch.arange(6)).sum().backward()  # nothing flows into the other
    assert a.grad.tolist() == [0 + 2 + 4, 1 + 3 + 5] and b.grad.tolist() == [0]


def test_split_batchnorm_is_plain_batchnorm_in_evaluation():
    split, (plain, *_) = split_and_separate(4)
    split.eval(), plain.eval()
    before = copy.deepcopy(split.state_dict())
    x = torch.randn(3, 5, 4, 4, dtype=torch.float64)  # a size that four groups do not divide
    assert torch.equal(split(x), plain(x))
    assert all(torch.equal(before[name], value) for name, value in split.state_dict().items())


def test_split_batchnorm_has_the_state_of_batchnorm():
    assert SplitBatchNorm2d(5, 4).state_dict().keys() == nn.BatchNorm2d(5).state_dict().keys()


def test_update_bn_averages_over_all_passes_as_with_plain_batchnorm():
    batches = [torch.randn(8, 5, 4, 4, dtype=torch.float64) * scale for scale in (1, 2, 3, 4)]
    plain = nn.BatchNorm2d(5).double()
    torch.optim.swa_utils.update_bn(batches, plain)
    for per_pass in (1, 2):  # batch by batch, and two views in one pass
        split = SplitBatchNorm2d(5).double()
        split.views = per_pass
        torch.optim.swa_utils.update_bn(torch.stack(batches).unflatten(0, (-1, per_pass)).flatten(1, 2), split)
        assert torch.allclose(split.running_mean, plain.running_mean, rtol=1e-12)
        assert torch.allclose(split.running_var, plain.running_var, rtol=1e-12)
        assert split.num_batches_tracked == 4


def test_split_batchnorm_refuses_a_batch_that_its_groups_do_not_divide():
    with pytest.raises(ValueError, match="10 images cannot be split into 4"):
        SplitBatchNorm2d(5, 4)(torch.randn(10, 5, 2, 2))


@pytest.mark.parametrize("as_gpu", [False, True])
@pytest.mark.parametrize("shape, groups", [((1, 5, 1, 1), 1), ((8, 5, 1, 1), 8), ((8, 5, 1, 1), 4)])
def test_a_group_with_one_value_of_a_channel_is_refused_as_torch_does(shape, groups: int, as_gpu: bool):
    split, plain = SplitBatchNorm2d(5, groups), nn.BatchNorm2d(5)
    x = torch.randn(shape)
    with as_on_a_gpu() if as_gpu else contextlib.nullcontext():
        if groups == 4:
            assert split(x).isfinite().all()
        else:
            for norm, batch in ((split, x), (plain, x[:1])):
                with pytest.raises(ValueError, match="more than 1 value per channel when training"):
                    norm(batch)
    assert all(value.isfinite().all() for value in split.state_dict().values())


def test_a_pass_that_fails_leaves_the_batchnorms_ready_for_the_next():
    net = build_backbone(Backbone("resnet18", "cifar", 4, 4))
    with pytest.raises(ValueError, match="cannot be split"):
        views(net, [torch.randn(6, 3, 8, 8)] * 3)
    assert net(torch.randn(4, 3, 16, 16)).shape == (4, 32) and int(net.bn1.num_batches_tracked) == 1


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_width_64_with_the_imagenet_stem_is_torchvision(arch: str):
    theirs = getattr(torchvision.models, arch)(num_classes=1)
    theirs.fc = nn.Identity()
    ours = ResNet(arch, "imagenet")
    expected = theirs.state_dict()
    assert list(ours.state_dict()) == list(expected)
    assert all(ours.state_dict()[name].shape == value.shape for name, value in expected.items())
    ours.load_state_dict(expected)
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        for mode in (True, False):
            assert torch.allclose(ours.train(mode)(x), theirs.train(mode)(x), atol=1e-5)
    assert ours.features == {"resnet18": 512, "resnet50": 2048}[arch]


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_initialisation_is_torchvisions(arch: str):
    torch.manual_seed(0)
    ours = ResNet(arch, "imagenet").state_dict()
    for name, theirs in getattr(torchvision.models, arch)().state_dict().items():
        if name.startswith("fc"):
            continue
        if theirs.ndim == 4:
            assert ours[name].std().item() == pytest.approx(theirs.std().item(), rel=0.05), name
        else:
            assert torch.equal(ours[name], theirs), name


@pytest.mark.parametrize(("init", "std"), [("default", (1 / 27) ** 0.5 / 3**0.5), ("kaiming", (2 / (64 * 9)) ** 0.5)])
def test_a_small_stem_is_initialised_by_pytorch_or_as_all_other_convolutions(init: str, std: float):
    """PatrickHua/SimSiam's stem is Kaiming's with the rest; elsewhere conv1 is replaced after the fact."""
    torch.manual_seed(0)
    stem = build_backbone(Backbone("resnet18", "cifar", 64, 1, init)).conv1.weight
    assert stem.std().item() == pytest.approx(std, rel=0.06)


@pytest.mark.parametrize(
    "stem, side, first, stages", [("cifar", 32, 32, 32), ("tiny", 64, 64, 32), ("imagenet", 64, 32, 16)]
)
def test_stem_and_stage_resolutions(stem: str, side: int, first: int, stages: int):
    net, sides = build_backbone(Backbone("resnet18", stem, 8, 2)), {}
    for name in ("conv1", "layer1", "layer2", "layer3", "layer4"):
        getattr(net, name).register_forward_hook(
            lambda m, i, out, name=name: sides.update({name: tuple(out.shape[1:])})
        )
    features = net(torch.randn(4, 3, side, side))
    assert sides["conv1"] == (8, first, first)
    assert [sides[f"layer{i + 1}"] for i in range(4)] == [(8 * 2**i, stages // 2**i, stages // 2**i) for i in range(4)]
    assert features.shape == (4, 64) and net.features == 64
    assert net.conv1.bias is None and net.conv1.kernel_size == ((7, 7) if stem == "imagenet" else (3, 3))


def test_bn_groups_reach_every_batchnorm():
    norms = [m for m in build_backbone(Backbone("resnet50", "cifar", 4, 8)).modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 53 and all(isinstance(m, SplitBatchNorm2d) and m.groups == 8 for m in norms)
    plain = build_backbone(Backbone("resnet18", "cifar", 4, 1))
    assert all(m.groups == 1 for m in plain.modules() if isinstance(m, nn.BatchNorm2d))


def test_features_are_the_spatial_mean_of_the_last_stage():
    net = build_backbone(Backbone("resnet18", "cifar", 4, 1)).eval()
    kept = []
    net.layer4.register_forward_hook(lambda m, i, out: kept.append(out))
    x = torch.randn(2, 3, 16, 16)
    assert torch.allclose(net(x), kept[0].flatten(2).mean(2))
    head = nn.Linear(net.features, 3)
    assert torch.allclose(Encoder(net, head)(x), head(net(x)))


# ------------------------------------------------------------------------------------------- several views in one pass


def net_and_views(groups: int, sides: tuple[int, ...] = (16, 16, 16)) -> tuple[nn.Module, list[torch.Tensor]]:
    """A narrow ResNet-18 in float64, in training, and as many batches of 8 images as `sides`, which take gradients."""
    torch.manual_seed(groups)
    net = build_backbone(Backbone("resnet18", "tiny", 4, groups)).double().train()
    return net, [torch.randn(8, 3, side, side, dtype=torch.float64).requires_grad_() for side in sides]


@pytest.mark.parametrize("as_gpu", [False, True])
@pytest.mark.parametrize("sides", [(16, 16, 16), (16, 8, 8), (16, 8, 16)])
@pytest.mark.parametrize("groups", [1, 4])
def test_views_in_one_pass_equal_separate_passes(groups: int, sides: tuple[int, ...], as_gpu: bool):
    net, batches = net_and_views(groups, sides)
    separate, passes = copy.deepcopy(net), []
    net.register_forward_hook(lambda m, inputs, out: passes.append(len(out)))
    expected = [separate(images) for images in batches]
    with as_on_a_gpu() if as_gpu else contextlib.nullcontext():
        found = views(net, batches)
    weights = [torch.randn_like(features) for features in expected]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    inputs = [*batches, *net.parameters()], [*batches, *separate.parameters()]
    mine, theirs = (
        torch.autograd.grad(sum((f * w).sum() for f, w in zip(features, weights, strict=True)), of)
        for features, of in zip((found, expected), inputs, strict=True)
    )
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    for name, value in separate.state_dict().items():  # running statistics too, in the same order
        torch.testing.assert_close(net.state_dict()[name], value, rtol=1e-12, atol=1e-14, msg=name)
    assert passes == {(16, 16, 16): [24], (16, 8, 8): [8, 16], (16, 8, 16): [8, 8, 8]}[sides]


def test_a_foreign_batchnorm_keeps_views_in_separate_passes():
    net, passes = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Flatten()), []
    net.register_forward_hook(lambda m, inputs, out: passes.append(len(out)))
    x, y = torch.randn(2, 4, 3, 8, 8)
    separate = copy.deepcopy(net)
    torch.testing.assert_close(views(net, [x, y]), [separate(x), separate(y)])
    assert passes[:2] == [4, 4]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_formula_for_compilers_is_split_batchnorm(dtype: torch.dtype):
    torch.manual_seed(0)
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    x = torch.randn(12, 5, 4, 3, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias = (torch.randn(5, dtype=dtype).requires_grad_() for _ in range(2))
    results = []
    for function in (split_batch_norm, SplitBatchNorm.apply):
        y, mean, var = function(x, weight, bias, 3, 1e-5)
        results.append((y, mean, var, *torch.autograd.grad((y**3).sum(), (x, weight, bias))))
    for formula, kernel in zip(*results, strict=True):
        torch.testing.assert_close(formula, kernel, **tolerance)


def test_split_batchnorm_keeps_statistics_in_float32_under_bf16():
    torch.manual_seed(0)
    split = SplitBatchNorm2d(5, 2)
    x = 100 + torch.randn(8, 5, 6, 6)
    y = split(x.bfloat16())
    assert y.dtype == torch.bfloat16 and split.running_mean.dtype == torch.float32
    wanted = torch.stack([part.bfloat16().float().mean((0, 2, 3)) for part in x.chunk(2)]).mean(0)
    torch.testing.assert_close(split.running_mean, 0.1 * wanted, rtol=1e-5, atol=1e-5)


def test_processes_that_share_a_group_share_its_unbiased_variance(monkeypatch):
    """Two processes hold three images each of one group: what each computes is its half of the whole's."""
    x, weight, bias = torch.randn(6, 3, 2, 2, dtype=torch.float64), torch.rand(3).double(), torch.rand(3).double()
    y, mean, var = split_batch_norm(x, weight, bias, 1, 1e-5)
    whole = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    monkeypatch.setattr(batchnorm, "shared_statistics", lambda *_: (whole[1][None], whole[0][None]))
    for half, expected in zip(x.chunk(2), y.chunk(2), strict=True):
        found, *statistics = split_batch_norm(half, weight, bias, 1, 1e-5, span=2)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(statistics, [mean, var])
    torch.testing.assert_close(var[0], x.var(dim=(0, 2, 3)))

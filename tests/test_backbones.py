"""Backbones: split BatchNorm is several BatchNorms, and the ResNets are torchvision's but for the stem."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from mixmask.backbones import Encoder, ResNet, SplitBatchNorm2d, build_backbone
from mixmask.config import Backbone


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


def test_split_batchnorm_is_plain_batchnorm_in_evaluation():
    split, (plain, *_) = split_and_separate(4)
    split.eval(), plain.eval()
    before = copy.deepcopy(split.state_dict())
    x = torch.randn(3, 5, 4, 4, dtype=torch.float64)  # a size that four groups do not divide
    assert torch.equal(split(x), plain(x))
    assert all(torch.equal(before[name], value) for name, value in split.state_dict().items())


def test_split_batchnorm_has_the_state_of_batchnorm():
    assert SplitBatchNorm2d(5, 4).state_dict().keys() == nn.BatchNorm2d(5).state_dict().keys()


def test_split_batchnorm_refuses_a_batch_that_its_groups_do_not_divide():
    with pytest.raises(ValueError, match="10 images cannot be split into 4"):
        SplitBatchNorm2d(5, 4)(torch.randn(10, 5, 2, 2))


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

"""Networks of others as backbones: names, widths, groups of BatchNorm, and steps of every framework on each."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from mixmask import checkpoint, config, networks
from mixmask.backbones import Encoder, build_backbone, views
from mixmask.batchnorm import SplitBatchNorm2d
from mixmask.config import Backbone, ConfigError
from mixmask.frameworks import FRAMEWORKS, build_framework
from mixmask.frameworks.moco import MoCo
from mixmask.metrics import pretraining_metric
from mixmask.networks import feature_width
from mixmask.training.state import TrainState
from paper.cost import forward_gflop
from pretrain import train
from tests.unit.test_frameworks import SMALL

timm = pytest.importorskip("timm")
WIDTHS = {  # published widths of the pooled features
    "torchvision/resnet34": 512,
    "timm/resnet50d": 2048,
    "timm/convnext_atto": 320,
    "timm/regnety_002": 368,
    "timm/efficientnet_b0": 1280,
}
QUICK = ("timm/regnety_002", "moco")


def backbone(arch: str, groups: int = 1, stem: str = "imagenet") -> Backbone:
    return Backbone(arch, stem, 64, groups)


@pytest.mark.parametrize("arch, width", WIDTHS.items())
def test_the_width_is_found_and_the_names_stay(arch, width):
    net = build_backbone(backbone(arch))
    assert feature_width(net) == networks.features(backbone(arch)) == width
    library, _, name = arch.partition("/")
    whole = timm.create_model(name) if library == "timm" else torchvision.models.get_model(name)
    classifier = {key for key in whole.state_dict() if key not in net.state_dict()}
    assert len(classifier) == 2 and net.state_dict().keys() < whole.state_dict().keys()


def test_dropout_in_front_of_the_classifier_goes_with_it():
    net = build_backbone(backbone("torchvision/mobilenet_v3_small")).train()
    assert feature_width(net) == 1024 and not any(isinstance(module, nn.Dropout) for module in net.modules())


def steps() -> list:
    """Each network in each framework; without `-m slow` one network in all of them, and all in one of them."""
    return [
        pytest.param(arch, name, marks=[] if arch == QUICK[0] or name == QUICK[1] else [pytest.mark.slow])
        for arch in WIDTHS
        for name in FRAMEWORKS
    ]


@pytest.mark.parametrize("arch, framework", steps())
def test_a_few_steps(arch, framework):
    values = config.read_yaml("cifar100_moco")
    del values["moco"]
    values |= {"framework": framework, framework: SMALL[framework], "method": "mixmask", "batch_size": 8, "epochs": 3}
    values["backbone"] = {"arch": arch, "stem": "imagenet", "width": 64, "bn_groups": 1 if "convnext" in arch else 2}
    recipe = config.resolve(values, {"run.device": "cpu", "augment.size": 32}, config.Pretrain)
    model, optimizer = train.build(recipe, torch.device("cpu"))
    state, before = TrainState(model, optimizer, 3, 2), {k: v.clone() for k, v in model.state_dict().items()}
    for step in range(2):
        x1, x2 = torch.randn(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        values, _ = train.iterate(recipe, state, [x1, x2])
        assert torch.isfinite(values["loss"])
    moved = [k for k, v in model.state_dict().items() if k.startswith("encoder.backbone") and not v.equal(before[k])]
    assert len(moved) > 0.9 * sum(k.startswith("encoder.backbone") for k in before)


@pytest.mark.parametrize("arch", ["torchvision/resnet34", "timm/regnety_002", "timm/efficientnet_b0"])
def test_groups_and_views_are_passes_of_their_own(arch):
    torch.manual_seed(0)
    plain = networks._timm(arch[5:]) if "timm" in arch else networks._torchvision(arch[12:])
    split = build_backbone(backbone(arch, groups=2))
    split.load_state_dict(plain.state_dict())
    plain, split = plain.double().train(), split.double().train()
    batches = [torch.randn(8, 3, 32, 32, dtype=torch.float64) for _ in range(2)]
    ours = views(split, batches)
    theirs = [torch.cat([plain(half) for half in batch.chunk(2)]) for batch in batches]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    for outputs in (ours, theirs):
        sum(output.square().mean() for output in outputs).backward()
    for one, other in zip(split.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-9)


def test_a_small_stem_keeps_the_resolution():
    shapes = {}
    for stem in ("imagenet", "tiny", "cifar"):
        net = build_backbone(backbone("torchvision/resnet34", stem=stem))
        net.layer1.register_forward_hook(lambda _, __, out, stem=stem: shapes.update({stem: out.shape[-1]}))
        net.eval()(torch.zeros(1, 3, 32, 32))
    assert shapes == {"imagenet": 8, "tiny": 16, "cifar": 32}


REFUSED = {
    "resnet34": "backbone.arch: expected resnet18, resnet50, timm/NAME, .*; found 'resnet34'; torchvision/resnet34, or",
    "timm/resnet43": "timm has no network 'resnet43'; did you mean timm/resnet",
    "timm/qqq": r"timm has no network 'qqq'; timm.list_models\(\) lists all",
    "torchvision/resnet": "torchvision has no network 'resnet'",
    "torchvision/fasterrcnn_resnet50_fpn": "torchvision has no network 'fasterrcnn",
    "torchvision/squeezenet1_0": "does not end in a linear layer",
    "timm/resnet34.a1_in1k": "names weights, which are not loaded here; expected timm/resnet34",
    "hf-hub:a/b": "backbone.arch: expected resnet18",
    "os:abort": "os:abort is Python's own",
    "no_such_module:make": "no module 'no_such_module' here",
    "mixmask.backbones:nothing": "module 'mixmask.backbones' has no function 'nothing'",
    "mixmask.checkpoint:random_states": "gives a dict; expected a torch.nn.Module",
    "": "backbone.arch: expected",
}


@pytest.mark.parametrize("arch, message", REFUSED.items())
def test_what_is_no_network_is_refused_in_one_line(arch, message):
    with pytest.raises(ConfigError, match=message) as error:
        build_backbone(backbone(arch))
    assert "\n" not in str(error.value)


def test_settings_that_a_network_cannot_have_are_refused():
    with pytest.raises(ConfigError, match=r"backbone.bn_groups: timm/convnext_atto has no BatchNorm, .* found 8"):
        build_backbone(backbone("timm/convnext_atto", groups=8))
    with pytest.raises(ConfigError, match=r"backbone.bn_groups: timm/vit_tiny_patch16_224 has no BatchNorm"):
        build_backbone(backbone("timm/vit_tiny_patch16_224", groups=8))
    with pytest.raises(ConfigError, match=r"backbone.stem: timm/resnet50d does not begin as a ResNet does"):
        build_backbone(backbone("timm/resnet50d", stem="tiny"))
    with pytest.raises(ConfigError, match=r"backbone.width: timm/resnet34 has a fixed width; expected 64, found 8"):
        Backbone("timm/resnet34", "imagenet", 8, 1)
    with pytest.raises(ConfigError, match="does not take images of 64 pixels: Input height"):
        feature_width(build_backbone(backbone("timm/vit_tiny_patch16_224")), 64)


def test_timm_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match="timm/resnet34 needs timm, which is not installed; pip install timm"):
        build_backbone(backbone("timm/resnet34"))


def test_without_torch_width_and_cost_are_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "mixmask.networks", None)
    monkeypatch.delattr("mixmask.networks", raising=False)
    with pytest.raises(ConfigError, match="the width and cost of timm/convnext_pico come from the"):
        forward_gflop(backbone("timm/convnext_pico"), 64)


# -------------------------------------------------------------------------------------------------- one's own


class Maps(nn.Module):
    """A network that does not pool, or gives more than its features."""

    def __init__(self, gives: str):
        super().__init__()
        self.conv, self.gives = nn.Conv2d(3, 4, 3), gives

    def forward(self, x):
        maps = self.conv(x)
        if self.gives == "one vector":
            return maps.mean(dim=(0, 2, 3))
        return {"maps": maps, "tuple": (maps.mean((2, 3)), maps), "dict": {"out": maps}}[self.gives]


@pytest.mark.parametrize(
    "gives, message",
    {
        "maps": r"a Maps, returns \(N, 4, 222, 222\) for N images; expected features \(N, D\); pool it",
        "tuple": "a Maps, returns a tuple; expected a tensor",
        "dict": "a Maps, returns a dict",
        "one vector": r"a Maps, returns \(N\) for N images",
    }.items(),
)
def test_what_gives_no_features_is_refused(gives, message):
    settings = MoCo.Settings(dim=4, queue=8, momentum=0.9, temperature=0.1)
    with pytest.raises(ConfigError, match=message):
        MoCo(Maps(gives), settings)


def test_a_network_that_gives_more_in_training_is_refused_there():
    net = torchvision.models.googlenet(init_weights=False, num_classes=4)
    encoder = Encoder(net, nn.Linear(feature_width(net, 64), 2))
    with pytest.raises(ConfigError, match="a GoogLeNet, returns a GoogLeNetOutputs; expected features"):
        encoder.train().views([torch.randn(2, 3, 64, 64)])


class Uncommon(nn.Module):
    """It asks for values, which a tensor without memory does not have, and takes images of one size."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * 28 * 28, 5)

    def forward(self, x):
        return self.linear(x.flatten(1)) * (1.0 if x.sum().item() == 0 else 2.0)


def test_any_module_will_do_and_stays_in_its_mode():
    net = nn.Sequential(Uncommon(), nn.Dropout(0.5))
    net[0].eval()
    state = torch.get_rng_state()
    moco = MoCo(net, MoCo.Settings(dim=4, queue=8, momentum=0.9, temperature=0.1, shuffle_bn=False))
    assert moco.encoder.head.in_features == 5 and net.training and not net[0].training
    assert feature_width(net, 28) == 5 and state.equal(state)
    before = torch.get_rng_state()
    feature_width(net)
    assert torch.get_rng_state().equal(before)


def test_plain_batch_norms_of_a_network_of_ones_own_see_each_view_alone():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    encoder = Encoder(net, nn.Identity()).train()
    batches = [torch.randn(4, 3, 9, 9, dtype=torch.float64) + i for i in range(2)]
    assert all(a.equal(net(b)) for a, b in zip(encoder.views(batches), batches, strict=True))


OWN = """
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def broken():
    return undefined
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the working directory, which is not on Python's path."""
    (tmp_path / "my_networks.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield "my_networks"
    sys.modules.pop("my_networks", None)


def test_a_function_of_ones_own_is_found_where_the_command_runs(own, tiny):
    recipe = tiny(f"backbone.arch={own}:make", "backbone.width=64", "backbone.stem=imagenet", "knn.features=backbone")
    framework = build_framework(recipe)
    assert framework.encoder.head.in_features == 8
    assert [m.groups for m in framework.encoder.modules() if isinstance(m, SplitBatchNorm2d)] == [2]
    assert pretraining_metric(recipe) == "knn_k5_t0.1_backbone8"
    assert forward_gflop(recipe.backbone, 12) == 2 * 3 * 9 * 8 * 25 / 1e9  # multiply-adds of one convolution, 5 x 5
    with pytest.raises(NameError):  # an error in somebody's own code is shown as it is
        build_backbone(backbone(f"{own}:broken"))


def test_a_checkpoint_of_another_network_is_refused(own, tmp_path):
    net = build_backbone(backbone(f"{own}:make"))
    with pytest.raises(checkpoint.CheckpointError, match="of another architecture"):
        checkpoint.load_weights(net, build_backbone(backbone("timm/convnext_atto")).state_dict(), "x.pt")


def test_the_flops_of_a_resnet_are_those_that_are_counted_without_torch():
    theirs, ours = backbone("torchvision/resnet18"), Backbone("resnet18", "imagenet", 64, 1)
    assert forward_gflop(theirs, 64) == pytest.approx(forward_gflop(ours, 64), rel=1e-9)

"""Two-view augmentation: equal to torchvision and Pillow for equal parameters, and in distribution."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import skimage.data
import torch
from PIL import Image, ImageFilter
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from mixmask import augment as aug
from mixmask.config import Augment, ConfigError
from mixmask.paths import as_on_a_gpu

ROOT = Path(__file__).parents[2]

MOCO_V1 = Augment(
    order=("crop", "flip", "jitter", "grayscale"),
    size=32,
    crop_scale=(0.08, 1.0),
    flip_prob=0.5,
    jitter=(0.4, 0.4, 0.4, 0.1),
    jitter_prob=0.8,
    grayscale_prob=0.2,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2023, 0.1994, 0.2010),
)
MOCO_V2 = dataclasses.replace(MOCO_V1, order=("crop", "jitter", "grayscale", "blur", "flip"), blur_prob=0.5)
SIMCLR = dataclasses.replace(MOCO_V1, order=("jitter", "grayscale", "crop", "flip"), interpolation="bicubic")
RECIPES = {"MoCo v1": MOCO_V1, "MoCo v2": MOCO_V2, "SimCLR and BYOL": SIMCLR}


def reference(augment: Augment, image: Image.Image, parameters: aug.Parameters) -> torch.Tensor:
    """`aug.apply` by torchvision and Pillow, of one image and `parameters[i]`: float32 (3, size, size)."""
    p = aug.Parameters(**{f.name: getattr(parameters, f.name).tolist() for f in dataclasses.fields(parameters)})
    adjust = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue]

    def jitter(image):
        for operation in p.order:
            if augment.jitter[operation] > 0:
                image = adjust[operation](image, p.factors[operation])
        return image

    box, mode = (p.top, p.left, p.height, p.width), InterpolationMode(augment.interpolation)
    operations = {
        "crop": lambda x: F.resized_crop(x, *box, [augment.size] * 2, mode),
        "flip": lambda x: F.hflip(x) if p.flip else x,
        "jitter": lambda x: jitter(x) if p.jitter else x,
        "grayscale": lambda x: F.to_grayscale(x, 3) if p.grayscale else x,
        "blur": lambda x: x.filter(ImageFilter.GaussianBlur(p.sigma)) if p.blur else x,
    }
    for name in augment.order:
        image = operations[name](image)
    return F.normalize(F.to_tensor(image), augment.mean, augment.std)


def photographs(height: int, width: int, n: int) -> torch.Tensor:
    """(n, 3, height, width): random regions of colour photographs, at full and at reduced resolution."""
    sources = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea(), skimage.data.rocket()]
    random = numpy.random.default_rng(0)
    regions = []
    for i in range(n):
        image = sources[i % 4]
        step = int(random.integers(1, max(2, min(image.shape[0] // height, image.shape[1] // width) + 1)))
        image = image[::step, ::step]
        top, left = random.integers(image.shape[0] - height + 1), random.integers(image.shape[1] - width + 1)
        regions.append(image[top : top + height, left : left + width])
    return torch.from_numpy(numpy.stack(regions)).permute(0, 3, 1, 2).contiguous()


def to_pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def largest_difference(values: torch.Tensor, images: list[Image.Image]) -> float:
    """In units of 1/255."""
    return (values - torch.stack([F.pil_to_tensor(image) for image in images])).abs().max().item()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform(n: int, low: float, high: float) -> torch.Tensor:
    return low + (high - low) * torch.rand(n, generator=generator(5))


# ---------------------------------------------------------------------------- equal parameters, operation by operation


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape, size, n", [((32, 32), 32, 256), ((64, 64), 64, 64), ((300, 400), 224, 12)])
def test_resized_crop_equals_pillow(interpolation: str, shape: tuple[int, int], size: int, n: int) -> None:
    images = photographs(*shape, n)
    p = aug.sample(MOCO_V1, n, *shape, generator(), "cpu")
    ours = aug.resized_crop(images.float(), (p.top, p.left, p.height, p.width), size, interpolation, p.flip)
    theirs = []
    for i in range(n):
        box, mode = (int(p.top[i]), int(p.left[i]), int(p.height[i]), int(p.width[i])), InterpolationMode(interpolation)
        crop = F.resized_crop(to_pil(images[i]), *box, [size, size], mode)
        theirs.append(F.hflip(crop) if p.flip[i] else crop)
    assert largest_difference(ours, theirs) <= 1  # 0 with Pillow 13; older ones never resize the height first


OPERATIONS = {
    "brightness": (aug.adjust_brightness_, F.adjust_brightness, 0.6, 1.4),
    "contrast": (aug.adjust_contrast_, F.adjust_contrast, 0.6, 1.4),
    "saturation": (aug.adjust_saturation_, F.adjust_saturation, 0.6, 1.4),
    "hue": (aug.adjust_hue_, F.adjust_hue, -0.5, 0.5),
    "strong brightness": (aug.adjust_brightness_, F.adjust_brightness, 0.0, 3.0),
    "strong contrast": (aug.adjust_contrast_, F.adjust_contrast, 0.0, 3.0),
    "strong saturation": (aug.adjust_saturation_, F.adjust_saturation, 0.0, 3.0),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("size, n", [(32, 128), (64, 32), (224, 4)])
def test_colour_operation_equals_pillow(name: str, size: int, n: int) -> None:
    ours, theirs, low, high = OPERATIONS[name]
    images, factors = photographs(size, size, n), uniform(n, low, high)
    expected = [theirs(to_pil(image), factor) for image, factor in zip(images, factors.tolist(), strict=True)]
    assert largest_difference(ours(images.float(), factors), expected) <= 1


def test_hsv_equals_pillow_for_every_hue_and_saturation() -> None:
    """Hue depends on two ratios: all are met with one channel at 255; all saturations with two equal channels."""
    a, b = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    top = torch.full_like(a, 255)
    least = torch.minimum(a, b)
    colours = torch.stack([torch.stack(c) for c in [(top, a, b), (a, top, b), (a, b, top), (a, least, least)]]).byte()
    ours = torch.stack(aug.rgb_to_hsv(colours.float()), dim=1)
    ours[:, 0] *= ours[:, 1] > 0  # the hue of a grey is arbitrary
    assert largest_difference(ours, [to_pil(image).convert("HSV") for image in colours]) == 0
    expected = [Image.merge("HSV", to_pil(image).split()).convert("RGB") for image in colours]
    assert largest_difference(aug.hsv_to_rgb(*colours.float().unbind(1), torch.empty(colours.shape)), expected) <= 1


def test_grayscale_equals_pillow() -> None:
    images, chosen = photographs(32, 32, 64), torch.arange(64) % 2 == 0
    expected = [F.to_grayscale(to_pil(i), 3) if c else to_pil(i) for i, c in zip(images, chosen, strict=True)]
    assert largest_difference(aug.grayscale(images.float(), chosen), expected) == 0


@pytest.mark.parametrize("size, n, largest", [(32, 64, 2.0), (64, 32, 2.0), (224, 4, 2.0), (32, 32, 5.0)])
def test_gaussian_blur_equals_pillow(size: int, n: int, largest: float) -> None:
    images, sigma, chosen = photographs(size, size, n), uniform(n, 0.1, largest), torch.arange(n) % 4 != 0
    ours = aug.gaussian_blur(images.float(), sigma, chosen, largest)
    expected = [
        to_pil(image).filter(ImageFilter.GaussianBlur(s)) if c else to_pil(image)
        for image, s, c in zip(images, sigma.tolist(), chosen, strict=True)
    ]
    assert largest_difference(ours, expected) <= 2


def test_flip_mirrors_the_chosen() -> None:
    images, chosen = photographs(32, 32, 8), torch.arange(8) % 2 == 0
    expected = [F.hflip(to_pil(i)) if c else to_pil(i) for i, c in zip(images, chosen, strict=True)]
    assert largest_difference(aug.flip(images, chosen), expected) == 0


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1)])
def test_colour_jitter_follows_each_order(order: tuple[int, ...]) -> None:
    n = 32
    images = photographs(32, 32, n)
    p = dataclasses.replace(aug.sample(MOCO_V1, n, 32, 32, generator(), "cpu"), order=torch.tensor(order).repeat(n, 1))
    ours = aug.colour_jitter(images.float(), p.order, p.factors, p.jitter)
    adjust = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue]
    expected = []
    for i in range(n):
        image = to_pil(images[i])
        for operation in order if p.jitter[i] else ():
            image = adjust[operation](image, p.factors[i, operation].item())
        expected.append(image)
    assert largest_difference(ours, expected) <= 2


# ------------------------------------------------------------------------------------------------- whole pipelines


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("shape, size, n", [((32, 32), 32, 200), ((64, 64), 64, 64), ((300, 400), 224, 8)])
def test_view_equals_the_reference_path(recipe: str, shape: tuple[int, int], size: int, n: int) -> None:
    augment, images = dataclasses.replace(RECIPES[recipe], size=size), photographs(*shape, n)
    parameters = aug.sample(augment, n, *shape, generator(1), "cpu")
    ours = aug.apply(augment, images, parameters)
    theirs = torch.stack([reference(augment, to_pil(images[i]), parameters[i]) for i in range(n)])
    difference = ((ours - theirs) * torch.tensor(augment.std)[:, None, None] * 255).abs()
    assert ours.dtype == torch.float32 and ours.shape == (n, 3, size, size)
    assert difference.max() <= 2.01


SIDES = [((60, 80), 32, 36), ((80, 60), 32, 36), ((37, 50), 32, None), ((49, 49), 64, 64), ((49, 98), 64, 64)]
SIDES += [((35, 39), 32, None), ((40, 51), 24, 32), ((51, 40), 24, 32)]  # halves and other fractions of a pixel


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape, size, resize", SIDES)
def test_test_view_equals_torchvision(shape, size: int, resize: int | None, interpolation: str) -> None:
    images, mode = photographs(*shape, 8), InterpolationMode(interpolation)
    steps = [transforms.Resize(resize, mode)] if resize else []
    steps += [transforms.CenterCrop(size), transforms.ToTensor(), transforms.Normalize(MOCO_V1.mean, MOCO_V1.std)]
    theirs = torch.stack([transforms.Compose(steps)(to_pil(image)) for image in images])
    ours = aug.test_view(images, size, resize, MOCO_V1.mean, MOCO_V1.std, interpolation)
    assert (ours - theirs).abs().max() <= 1.01 / 255 / min(MOCO_V1.std)


def test_test_view_refuses_a_crop_larger_than_the_image() -> None:
    with pytest.raises(ConfigError, match="64"):
        aug.test_view(photographs(32, 32, 1), 64, None, MOCO_V1.mean, MOCO_V1.std)


# --------------------------------------------------------------------------------------------------- distributions

N = 4000


def two_sample_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Kolmogorov-Smirnov distance between two samples, over its critical value at a probability of 1e-4."""
    points = torch.cat([a, b]).unique()
    cumulative = [(torch.searchsorted(x.sort().values, points, right=True) / len(x)) for x in (a, b)]
    distance = (cumulative[0] - cumulative[1]).abs().max().item()
    return distance / (math.sqrt(-0.5 * math.log(1e-4 / 2)) * math.sqrt((len(a) + len(b)) / (len(a) * len(b))))


@pytest.mark.parametrize("shape, scale", [((32, 32), (0.08, 1.0)), ((64, 64), (0.2, 1.0)), ((40, 160), (0.08, 1.0))])
def test_crops_are_distributed_as_torchvision_draws_them(shape: tuple[int, int], scale: tuple[float, float]) -> None:
    augment = dataclasses.replace(MOCO_V1, crop_scale=scale)
    p = aug.sample(augment, N, *shape, generator(2), "cpu")
    ours = torch.stack([p.top, p.left, p.height, p.width], dim=1).float()
    torch.manual_seed(3)
    blank, ratio = Image.new("RGB", shape[::-1]), list(augment.crop_ratio)
    draw = transforms.RandomResizedCrop.get_params
    theirs = torch.tensor([draw(blank, list(scale), ratio) for _ in range(N)]).float()
    for measure in (
        lambda box: box[:, 2] * box[:, 3],  # area
        lambda box: box[:, 3] / box[:, 2],  # aspect ratio
        lambda box: box[:, 0],
        lambda box: box[:, 1],
        lambda box: box[:, 0] + box[:, 2] / 2,
    ):
        assert two_sample_distance(measure(ours), measure(theirs)) < 1


def test_crop_falls_back_to_the_central_box() -> None:
    """A 10 x 100 image holds no crop of at least 0.9 of its area with an aspect ratio of at most 4/3."""
    augment = dataclasses.replace(MOCO_V1, crop_scale=(0.9, 1.0))
    for height, width in [(10, 100), (100, 10)]:
        p = aug.sample(augment, 5, height, width, generator(), "cpu")
        box = torch.stack([p.top, p.left, p.height, p.width], dim=1)
        blank = Image.new("RGB", (width, height))
        expected = transforms.RandomResizedCrop.get_params(blank, [0.9, 1.0], list(augment.crop_ratio))
        assert box.tolist() == [list(expected)] * 5


def test_jitter_factors_are_distributed_as_torchvision_draws_them() -> None:
    ours = aug.sample(MOCO_V1, N, 32, 32, generator(4), "cpu").factors
    jitter = transforms.ColorJitter(*MOCO_V1.jitter)
    ranges = jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
    torch.manual_seed(5)
    theirs = torch.tensor([jitter.get_params(*ranges)[1:] for _ in range(N)])
    for operation in range(4):
        assert two_sample_distance(ours[:, operation], theirs[:, operation]) < 1


def test_orders_of_the_jitter_are_uniform_over_all_24() -> None:
    order = aug.sample(MOCO_V1, 24000, 32, 32, generator(6), "cpu").order
    assert torch.equal(order.sort(dim=1).values, torch.arange(4).expand(24000, 4))
    counts = (order * torch.tensor([64, 16, 4, 1])).sum(dim=1).unique(return_counts=True)[1]
    chi_squared = ((counts - 1000.0) ** 2 / 1000).sum().item()
    assert len(counts) == 24 and chi_squared < 58.6  # 23 degrees of freedom, probability 6e-5


def test_probabilities_and_sigma() -> None:
    p = aug.sample(MOCO_V2, 10000, 32, 32, generator(7), "cpu")
    for mask, probability in [(p.flip, 0.5), (p.jitter, 0.8), (p.grayscale, 0.2), (p.blur, 0.5)]:
        deviation = math.sqrt(probability * (1 - probability) / 10000)
        assert abs(mask.float().mean().item() - probability) < 4 * deviation
    assert 0.1 <= p.sigma.min() < 0.11 and 1.99 < p.sigma.max() <= 2.0
    assert two_sample_distance(p.sigma, uniform(10000, 0.1, 2.0)) < 1


# ---------------------------------------------------------------------------- what is fast equals what is plain


@pytest.mark.parametrize("with_hue", [True, False])
def test_jitter_by_group_equals_jitter_by_selection(with_hue: bool) -> None:
    images = photographs(32, 32, 200).float()
    p = aug.sample(MOCO_V1, 200, 32, 32, generator(8), "cpu")
    grouped, selected = (
        jitter(images, p.order, p.factors, p.jitter, with_hue)
        for jitter in (aug.jitter_by_group, aug.jitter_by_selection)
    )
    assert torch.equal(grouped, selected) and not torch.equal(grouped, images)


@pytest.mark.parametrize("size, extent", [(8, 8), (32, 32), (64, 64), (128, 17)])
def test_enlarging_weights_equal_resize_weights_for_every_box(size: int, extent: int) -> None:
    start, length = (values.flatten() for values in torch.meshgrid(*[torch.arange(extent)] * 2, indexing="ij"))
    inside = start + length < extent
    box = start[inside], length[inside] + 1
    flipped = torch.arange(len(box[0])) % 2 == 0
    assert aug.enlarges_exactly((extent, extent), size, "bilinear")
    exact = aug.resize_weights(*box, extent, size, "bilinear", flipped)  # float64
    weights = aug.enlarging_weights(*box, extent, size, "bilinear", flipped)
    assert torch.equal(weights.double(), exact)
    assert torch.equal(weights.bfloat16().double(), exact)  # 8 bits suffice: no device's precision matters


@pytest.mark.parametrize("shape, size", [((33, 32), 32), ((32, 32), 28), ((224, 224), 256)])
def test_other_crops_are_computed_in_float64(shape: tuple[int, int], size: int) -> None:
    assert not aug.enlarges_exactly(shape, size, "bilinear")
    assert not aug.enlarges_exactly((32, 32), 32, "bicubic")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_path_of_gpus_and_compiled_graphs_equals_the_cpus(recipe: str) -> None:
    augment, images = RECIPES[recipe], photographs(32, 32, 64)
    parameters = aug.sample(augment, 64, 32, 32, generator(9), "cpu")
    here = aug.apply(augment, images, parameters)
    with as_on_a_gpu():
        assert torch.equal(aug.apply(augment, images, parameters), here)


GRAPH = """
import sys, torch
from mixmask import augment as aug, config
from mixmask.paths import as_on_a_gpu
augment = config.load(sys.argv[1]).augment
images = torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
def draw(compiled):
    generator = torch.Generator().manual_seed(1)
    return aug.augment_views([augment] * 2, [images] * 2, generator, 32, slice(16, 32), compiled)
expected = draw(False)
with as_on_a_gpu("eager"):
    print(all(map(torch.equal, draw(True), expected)))
"""


def test_a_view_compiles_to_one_graph_that_computes_the_same() -> None:
    """`fullgraph` refuses what would wait for a device. The graph is run as it is: nothing here needs a compiler.

    In a process of its own: what compiles starts threads, and a process that has had some cannot be forked safely.
    """
    command = [sys.executable, "-c", GRAPH, str(ROOT / "pretrain/configs/imagenet_moco.yaml")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "True"


@pytest.mark.parametrize("recipe", RECIPES)
def test_chunks_change_no_bit(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    augment, images = RECIPES[recipe], photographs(32, 32, 50)
    parameters = aug.sample(augment, 50, 32, 32, generator(10), "cpu")
    whole = aug.apply(augment, images, parameters)
    monkeypatch.setattr(aug.pipeline, "CPU_PIXELS", 7 * 32 * 32)
    assert torch.equal(aug.apply(augment, images, parameters), whole)


THREADS = """
import sys, torch
from mixmask import augment as aug, config
images = torch.randint(256, (50, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
together = aug.pipeline.CPU_PIXELS
for augment in (config.load(path).augment for path in sys.argv[1:]):
    aug.pipeline.CPU_PIXELS = together
    parameters = aug.sample(augment, 50, 32, 32, torch.Generator().manual_seed(1), "cpu")
    torch.set_num_threads(1)
    alone = aug.apply(augment, images, parameters)
    aug.pipeline.CPU_PIXELS = 7 * 32 * 32
    torch.set_num_threads(3)
    print(torch.equal(aug.apply(augment, images, parameters), alone), torch.get_num_threads())
"""


def test_threads_change_no_bit() -> None:
    """In a process of its own: one that has had threads cannot be forked safely, as other tests do."""
    recipes = [ROOT / f"pretrain/configs/{name}.yaml" for name in ("cifar100_moco", "cifar100_simclr", "imagenet_moco")]
    done = subprocess.run([sys.executable, "-c", THREADS, *recipes], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "3"] * 3


# ---------------------------------------------------------------------------------------------------- independence


def test_equal_generators_give_equal_views() -> None:
    images = photographs(32, 32, 16)
    views = [aug.augment_view(MOCO_V2, images, generator(seed)) for seed in (0, 0, 1)]
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])


def test_views_in_one_pass_are_the_views_one_by_one() -> None:
    images, small = photographs(32, 32, 12), dataclasses.replace(MOCO_V1, size=16)
    augments, together, alone = [MOCO_V1, MOCO_V1, small], generator(3), generator(3)
    views = aug.augment_views(augments, [images, images.flip(0), images], together)
    for augment, pixels, view in zip(augments, (images, images.flip(0), images), views, strict=True):
        assert torch.equal(view, aug.augment_view(augment, pixels, alone))
    assert torch.equal(torch.rand(3, generator=together), torch.rand(3, generator=alone))


def test_global_random_state_is_neither_used_nor_changed() -> None:
    state = torch.get_rng_state()
    aug.augment_view(MOCO_V2, photographs(32, 32, 4), generator())
    assert torch.equal(state, torch.get_rng_state())


def test_number_of_draws_does_not_depend_on_the_images() -> None:
    generators = generator(), generator()
    aug.sample(MOCO_V1, 7, 32, 32, generators[0], "cpu")
    aug.sample(dataclasses.replace(MOCO_V1, jitter_prob=0.0, crop_scale=(0.9, 1.0)), 7, 16, 200, generators[1], "cpu")
    assert torch.equal(*(torch.rand(3, generator=g) for g in generators))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_view_does_not_depend_on_the_rest_of_the_batch(recipe: str) -> None:
    chunk = aug.pipeline.CPU_PIXELS // 32**2
    images = photographs(32, 32, chunk + 12)
    parameters = aug.sample(RECIPES[recipe], len(images), 32, 32, generator(), "cpu")
    together = aug.apply(RECIPES[recipe], images, parameters)
    for i in (0, 5, chunk, len(images) - 1):
        alone = aug.apply(RECIPES[recipe], images[i : i + 1], parameters[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-6)


def test_images_are_left_as_they_were() -> None:
    images = photographs(32, 32, 8)
    before = images.clone()
    aug.augment_view(MOCO_V2, images, generator())
    floats, p = images.float(), aug.sample(MOCO_V2, 8, 32, 32, generator(), "cpu")
    aug.colour_jitter(floats, p.order, p.factors, p.jitter)
    aug.grayscale(floats, p.grayscale)
    aug.gaussian_blur(floats, p.sigma, p.blur, 2.0)
    assert torch.equal(images, before) and torch.equal(floats, before.float())


@pytest.mark.parametrize("order", [("flip", "crop"), ("flip",), ()])
def test_a_flip_ahead_of_the_crop_and_views_without_crop(order: tuple[str, ...]) -> None:
    augment, images = dataclasses.replace(MOCO_V1, order=order), photographs(32, 32, 32)
    parameters = aug.sample(augment, 32, 32, 32, generator(), "cpu")
    theirs = torch.stack([reference(augment, to_pil(images[i]), parameters[i]) for i in range(32)])
    assert (aug.apply(augment, images, parameters) - theirs).abs().max() <= 1.01 / 255 / min(augment.std)

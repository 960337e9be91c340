"""The embedded default: patches of the photographs inside scikit-image's wheel, the photograph as class.

The first part of a photograph's longer side is for training, the rest for testing, and a patch lies wholly in one of
them: no pixel is seen both in training and in testing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mixmask.datasets.base import DataError, Expected, Resident
from mixmask.randomness import numpy_generator

PHOTOS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "cell.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
PATCH = 48  # pixels of the photograph along a patch's side, shrunk to the side that is expected
PARTS = {"train": (0.0, 0.7), "test": (0.7, 1.0)}  # shares of the longer side


def read(split: str, expected: Expected) -> Resident:
    """125 patches of each photograph for training, 50 for testing, always the same."""
    per_class = expected.images(split) // len(PHOTOS)
    patches = []
    for index, name in enumerate(PHOTOS):
        picture = photo(name)
        for x, y in photo_corners(picture.size, index, split, per_class):
            patch = picture.crop((x, y, x + PATCH, y + PATCH))  # cropped first: resizing sees no pixel outside
            patches.append(np.asarray(patch.resize((expected.side, expected.side), Image.Resampling.BILINEAR)))
    images = torch.from_numpy(np.stack(patches)).permute(0, 3, 1, 2).contiguous()  # (N, 3, 32, 32)
    labels = torch.arange(len(PHOTOS)).repeat_interleave(per_class)
    return Resident(images, labels, tuple(Path(name).stem for name in PHOTOS), "photos")


def photo_corners(size: tuple[int, int], index: int, split: str, count: int) -> np.ndarray:
    """Top-left corners (count, 2) as (x, y) of the patches of photograph `index` of `size` (width, height)."""
    low, high = np.zeros(2, dtype=np.int64), np.array(size)
    longer = int(size[1] > size[0])
    low[longer], high[longer] = (round(share * size[longer]) for share in PARTS[split])
    return numpy_generator("photos", index, split).integers(low, high - PATCH + 1, (count, 2))


def photo(name: str) -> Image.Image:
    """A photograph as RGB, read as a file of the installed package: no download, no cache."""
    import skimage

    path = Path(skimage.__file__).parent / "data" / name
    try:
        return Image.open(path).convert("RGB")
    except OSError as error:
        raise DataError(f"scikit-image {skimage.__version__} lacks {path} ({error}); install the locked one") from None

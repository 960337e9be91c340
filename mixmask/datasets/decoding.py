"""Image files as RGB bytes."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image, read_file

from mixmask.datasets.base import DataError, one_line


def read_image(path: str) -> Tensor:
    """An image file as RGB uint8 (3, H, W): torchvision's decoder, then Pillow for what that one refuses.

    Raises DataError naming a file that is missing, truncated or no image.
    """
    try:
        return decode_image(read_file(path), mode=ImageReadMode.RGB)
    except RuntimeError:
        return _read_with_pillow(path)


def _read_with_pillow(path: str) -> Tensor:
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"image file {path} is missing, truncated or no image: {one_line(error)}") from None

"""Two-view augmentation in batches, on the device of the images, with parameters drawn per sample.

`sample` draws what torchvision's transforms would draw, `apply` computes what Pillow would compute: the same
weights, the same truncation to whole numbers after each operation. Images are (N, 3, H, W) with values 0..255, float32
holding whole numbers from the first operation to the last; a column is a per-sample number of shape (N, 1, 1, 1).
Sources: torchvision.transforms (v1) and Pillow, which all public recipes of the paper's baselines use.
"""

from mixmask.augment.blur import gaussian_blur
from mixmask.augment.colour import (
    adjust_brightness_,
    adjust_contrast_,
    adjust_hue_,
    adjust_saturation_,
    colour_jitter,
    grayscale,
    hsv_to_rgb,
    jitter_by_group,
    jitter_by_selection,
    normalise,
    rgb_to_hsv,
    solarize,
)
from mixmask.augment.pipeline import apply, augment_view, augment_views, test_view
from mixmask.augment.resampling import (
    center_crop,
    enlarges_exactly,
    enlarging_weights,
    flip,
    resize_weights,
    resized,
    resized_crop,
)
from mixmask.augment.sampling import CROP_TRIES, Parameters, central_crop, crop_sides, draw, parameters_of, sample

__all__ = [
    "CROP_TRIES",
    "Parameters",
    "adjust_brightness_",
    "adjust_contrast_",
    "adjust_hue_",
    "adjust_saturation_",
    "apply",
    "augment_view",
    "augment_views",
    "center_crop",
    "central_crop",
    "colour_jitter",
    "crop_sides",
    "draw",
    "enlarges_exactly",
    "enlarging_weights",
    "flip",
    "gaussian_blur",
    "grayscale",
    "hsv_to_rgb",
    "jitter_by_group",
    "jitter_by_selection",
    "normalise",
    "parameters_of",
    "resize_weights",
    "resized",
    "resized_crop",
    "rgb_to_hsv",
    "sample",
    "solarize",
    "test_view",
]

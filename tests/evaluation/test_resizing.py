"""Resizing on the device: clean-fid's own resizers as the oracle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deme_cli.evaluation.features import load_extractor
from deme_cli.evaluation.networks import full_float32, to_input
from deme_cli.evaluation.resizing import (
    inception_batch_resizer,
    inception_resizer,
    resize_all,
    resize_clean,
    resize_legacy_pytorch,
)

ON_DEVICE = {"clean": resize_clean, "legacy_pytorch": resize_legacy_pytorch}
LARGEST = 2e-5  # of 255; the promise is 1e-3


def random_images(height: int, width: int, channels: int = 3) -> np.ndarray:
    shape = (2, height, width, channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def smooth_images(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = np.stack([np.sin(7 * x + k) * np.cos(5 * y - k) for k in range(3)], axis=-1)
    return (127.5 + 127.5 * np.stack([waves, -waves])).astype(np.uint8)


@pytest.mark.parametrize("mode", sorted(ON_DEVICE))
@pytest.mark.parametrize(
    ("height", "width"), [(32, 32), (256, 256), (299, 299), (512, 512), (40, 350)]
)
def test_a_batch_is_resized_as_clean_fid_does(mode: str, height: int, width: int) -> None:
    resizer = inception_resizer(mode)
    for images in (random_images(height, width), smooth_images(height, width)):
        wanted = resize_all(images, resizer)
        found = ON_DEVICE[mode](to_input(images, torch.device("cpu")))
        apart = np.abs(found.permute(0, 2, 3, 1).numpy() - wanted) / 255
        assert apart.max() <= LARGEST
        assert apart.mean() <= LARGEST / 10


def test_processors_keep_the_exact_resizer() -> None:
    assert inception_batch_resizer("clean", torch.device("cpu")) is None
    assert inception_batch_resizer("clean", torch.device("cuda")) is resize_clean
    assert inception_batch_resizer("legacy_tensorflow", torch.device("cuda")) is None


@pytest.mark.parametrize("channels", [1, 3])
def test_features_of_batches_resized_on_the_device_are_the_same(
    stand_in: Path, channels: int
) -> None:
    extractor = load_extractor("inception", weights=stand_in)
    images = random_images(32, 24, channels)
    on_device = replace(extractor, resize_batch=resize_clean)
    np.testing.assert_allclose(
        on_device.features(images), extractor.features(images), rtol=0, atol=1e-5
    )


def test_no_autocast_reaches_the_networks(stand_in: Path) -> None:
    extractor = load_extractor("inception", weights=stand_in)
    images = random_images(16, 16)
    wanted = extractor.features(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert np.array_equal(extractor.features(images), wanted)


@pytest.mark.gpu
def test_a_gpu_resizes_and_sees_as_the_cpu_does(stand_in: Path) -> None:
    images = random_images(256, 256)
    device = torch.device("cuda")
    for mode, resize in ON_DEVICE.items():
        wanted = resize_all(images, inception_resizer(mode))
        found = resize(to_input(images, device)).permute(0, 2, 3, 1).cpu().numpy()
        assert np.abs(found - wanted).max() <= 1e-3 * 255
    with full_float32(device):
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32
    features = [
        load_extractor("inception", weights=stand_in, device=name).features(images)
        for name in ("cpu", "cuda")
    ]
    np.testing.assert_allclose(features[1], features[0], rtol=0, atol=1e-4)

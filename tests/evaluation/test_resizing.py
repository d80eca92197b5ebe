"""Resizing on the device: the resizers of clean-fid, torchvision and Pillow as the oracle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from deme_cli.evaluation.features import load_extractor
from deme_cli.evaluation.networks import full_float32, to_input
from deme_cli.evaluation.resizing import (
    clip_batch_resizer,
    clip_resizer,
    inception_batch_resizer,
    inception_resizer,
    resize_all,
    resize_as_pillow,
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


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [[224], [32], [378, 384]], ids=str)  # squash is of two
@pytest.mark.parametrize(
    ("height", "width"),
    [(8, 8), (28, 28), (32, 32), (64, 64), (224, 224), (299, 299), (512, 512),
     (48, 80), (37, 41), (201, 333), (300, 200), (640, 200)],
)  # fmt: skip
def test_a_batch_has_the_very_levels_of_pillow_and_torchvision(
    height: int, width: int, size: list[int], interpolation: str
) -> None:
    def resize_one(image: np.ndarray) -> np.ndarray:
        shown = Image.fromarray(image)
        shown = transforms.resize(shown, size, InterpolationMode(interpolation))
        return np.asarray(transforms.center_crop(shown, size))

    for images in (random_images(height, width), smooth_images(height, width)):
        wanted = resize_all(images, resize_one)
        found = resize_as_pillow(to_input(images, torch.device("cpu")), size, interpolation)
        assert np.array_equal(found.permute(0, 2, 3, 1).numpy(), wanted)


@pytest.mark.parametrize("width", [20, 50, 90])
@pytest.mark.parametrize("height", [30, 79, 80, 81, 101, 120])
def test_batches_take_the_axis_first_that_pillow_takes(height: int, width: int) -> None:
    images = random_images(100, 60)
    wanted = resize_all(images, lambda image: np.asarray(
        Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    ))  # fmt: skip
    found = resize_as_pillow(to_input(images, torch.device("cpu")), [height, width])
    assert np.array_equal(found.permute(0, 2, 3, 1).numpy(), wanted)


def test_batches_of_any_length_are_resized_alike() -> None:
    images = torch.from_numpy(np.repeat(random_images(12, 9), 20, axis=0)).float().mT
    one_by_one = [resize_as_pillow(image[None], [16]) for image in images]
    assert torch.equal(resize_as_pillow(images, [16]), torch.cat(one_by_one))


def test_processors_keep_the_exact_resizer() -> None:
    assert clip_batch_resizer(torch.device("cpu")) is None
    assert clip_batch_resizer(torch.device("mps")) is None
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


@pytest.mark.parametrize("channels", [1, 3])
def test_clip_sees_the_same_pixels_resized_on_the_device(stand_in: Path, channels: int) -> None:
    extractor = load_extractor("inception", weights=stand_in)
    one_by_one = replace(extractor, network=lambda x: x, resize_image=clip_resizer())
    on_device = replace(one_by_one, resize_batch=clip_batch_resizer(torch.device("cuda")))
    for images in (random_images(40, 65, channels), random_images(299, 256, channels)):
        pixels = on_device.features(images)
        assert pixels.shape == (2, 3 * 224 * 224)
        assert np.array_equal(pixels, one_by_one.features(images))


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
    for shape in ((256, 256), (201, 333), (900, 300)):
        x = to_input(random_images(*shape), torch.device("cpu"))
        for size in ([224], [378, 384]):
            on_cpu = resize_as_pillow(x, size)
            assert torch.equal(resize_as_pillow(x.to(device), size).cpu(), on_cpu)
    with full_float32(device):
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32
    features = [
        load_extractor("inception", weights=stand_in, device=name).features(images)
        for name in ("cpu", "cuda")
    ]
    np.testing.assert_allclose(features[1], features[0], rtol=0, atol=1e-4)

"""From images to features: Inception as clean-fid runs it, CLIP, DINOv2, any TorchScript.

B batch, C channels (1 or 3), H x W pixels, d features. Images come as uint8 (B, H, W, C); grey
ones are repeated to three channels; each is resized as clean-fid resizes, by Pillow or torch.
Features go out as float64 (B, d), computed in float32. clean-fid prints, downloads and warns on its
own: here it is kept from all three, and its networks read the files that we chose. Nothing is
unpickled but tensors.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from deme_cli.console import Progress, Step, silent
from deme_cli.data.images import ImageData
from deme_cli.diffusion.denoiser import choose_device
from deme_cli.distributed import ALONE, World
from deme_cli.errors import ArtifactError, is_out_of_memory
from deme_cli.evaluation.frechet import RunningStatistics
from deme_cli.evaluation.references import FeatureWeights, find_weights
from deme_cli.sampling.sampler import Shares

CLIP_MODEL = "ViT-B-32-quickgelu"  # OpenAI trained with QuickGELU
_SIZE = 224  # of the images that CLIP and DINOv2 take
Network = Callable[[Tensor], Tensor]  # float32 (B, 3, H, W) in [0, 255] -> (B, d)
Resizer = Callable[[np.ndarray], np.ndarray]  # uint8 (B, H, W, C) -> (B, C, H', W')
INCEPTION_SIZE = (299, 299)


@dataclass(frozen=True)
class Extractor:
    """A loaded feature network, and what brings images to its size: None where they go as is."""

    weights: FeatureWeights
    network: Network
    resize: Resizer | None
    device: torch.device
    batch_size: int = 128

    def features(self, images: np.ndarray) -> np.ndarray:
        """uint8 (B, H, W, C) -> float64 (B, d).

        Raises ArtifactError where the network does not take images of this size.
        """
        starts = range(0, len(images), self.batch_size)
        return np.concatenate([self._forward(images[s : s + self.batch_size]) for s in starts])

    def num_features(self, shape: tuple[int, int, int]) -> int:
        """d for images of `shape` (C, H, W), found by trying a black one."""
        channels, height, width = shape
        return self.features(np.zeros((1, height, width, channels), np.uint8)).shape[1]

    @torch.inference_mode()
    def _forward(self, images: np.ndarray) -> np.ndarray:
        resized = self.resize(images) if self.resize else images.transpose(0, 3, 1, 2)
        x = torch.from_numpy(np.require(resized, requirements=["C", "W"])).to(self.device)
        x = x.float().expand(-1, 3, -1, -1).contiguous()
        try:
            with full_float32(self.device):
                features = self.network(x)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            height, width = x.shape[2:]
            raise ArtifactError(
                f"{self.weights.path}: the network fails on {width}x{height} images "
                f"({last_line(error)}); choose another --features"
            ) from error
        if not isinstance(features, Tensor) or len(features) != len(x):
            raise ArtifactError(f"{self.weights.path}: expected one row per image")
        return features.flatten(1).cpu().double().numpy()


def look_at(
    data: ImageData, extractor: Extractor, label: str, world: World = ALONE,
    progress: Progress = silent, *, keep: bool = False,
) -> tuple[RunningStatistics, list[np.ndarray]]:  # fmt: skip
    """Mean and covariance of the features of a set, and, with `keep`, themselves in float32.

    Processes of `world` share the batches, and the first one gets all features, in the set's order.
    Raises ConfigError where they have other images.
    """
    source, running, kept = data.source, RunningStatistics(), list[np.ndarray]()
    world.require_same(
        {f"images in {source}": len(data), f"fingerprint of {source}": data.fingerprint[:12]}
    )
    shares = Shares(len(data), extractor.batch_size, world=world)
    for done, _, parts in shares.gather(
        shares.own, lambda span: extractor.features(data.batch(span).permute(0, 2, 3, 1).numpy())
    ):
        for features in parts:
            running.add(features)
            if keep:
                kept.append(features.astype(np.float32))
        progress(Step(done, len(data), label, "image"))
    return running, kept


def load_extractor(
    name: str, *, resize: str = "clean", weights: Path | None = None, device: str = "cpu"
) -> Extractor:
    """The feature network called inception, clip or digits, or in the TorchScript file `name`.

    Raises what `find_weights` raises, and ArtifactError for a file that holds no such network.
    """
    return open_extractor(find_weights(name, resize, weights), device=device)


def open_extractor(
    weights: FeatureWeights, *, device: str = "cpu", batch_size: int = 128
) -> Extractor:
    """The network behind weights that have been found.

    Inception goes to its last pooling, with the normalisation of clean-fid's resize mode.
    """
    place, path = choose_device(device), weights.path
    network: Network
    resize: Resizer | None = None
    if weights.family == "inception" and weights.resize != "legacy_tensorflow":
        resize = resize_clean if weights.resize == "clean" else resize_bilinear
    if weights.family == "clip":
        network, resize = _load_clip(path, device)
    elif weights.family == "dinov2":
        network = _load_dinov2(path, place)
    elif weights.resize == "legacy_pytorch":
        inception = _load_pytorch_inception(path).to(place)
        network = lambda x: inception(x / 255)[0]  # noqa: E731
    else:
        script = network = load_script(path, place)
        if weights.resize == "legacy_tensorflow":  # resizes and normalises within
            network = partial(script, return_features=True)
        elif weights.family == "inception":
            if not hasattr(script, "layers"):
                raise ArtifactError(
                    f"{path}: not of Inception's interface (no submodule `layers`); a TorchScript "
                    f"of images to features goes with --features FILE"
                )
            network = lambda x: script.layers((x - 128) / 128)  # noqa: E731
    return Extractor(weights, network, resize, place, batch_size)


def _load_pytorch_inception(path: Path) -> nn.Module:
    """clean-fid's port of pytorch-fid's Inception, with a state dict from a file we chose."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ArtifactError(f"{path}: not a readable file of weights; fetch it again") from error
    with quiet_clean_fid():
        from cleanfid import inception_pytorch

        try:
            with patch.object(inception_pytorch, "load_state_dict_from_url", return_value=state):
                return inception_pytorch.InceptionV3(output_blocks=[3], resize_input=False).eval()
        except (RuntimeError, AttributeError) as error:
            raise ArtifactError(
                f"{path}: not the weights of pytorch-fid's Inception ({last_line(error)})"
            ) from error


def _load_clip(path: Path, device: str) -> tuple[Network, Resizer]:
    """The visual tower of CLIP ViT-B/32, and short side to 224 (bicubic) and centre crop before it,
    as in clean-fid's `clip_features`."""
    import open_clip
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    from deme_cli.evaluation.clip_score import ClipWeights, open_clip_scorer, quick_gelu_of

    if quick_gelu_of(path) is False:
        raise ArtifactError(
            f"{path}: trained with another activation than OpenAI's CLIP ViT-B/32, whose features "
            f"are asked for; give OpenAI's file"
        )
    weights = ClipWeights(CLIP_MODEL, CLIP_MODEL, path.name, path, "")
    tower = open_clip_scorer(weights, device=device).model.visual
    usual = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    mean, std = torch.tensor(usual, device=choose_device(device)).view(2, 3, 1, 1)
    steps = Compose([Resize(_SIZE, InterpolationMode.BICUBIC), CenterCrop(_SIZE)])

    def resize(images: np.ndarray) -> np.ndarray:
        coloured = np.broadcast_to(images, (*images.shape[:3], 3))
        resized = map_images(lambda image: np.asarray(steps(Image.fromarray(image))), coloured)
        return resized.transpose(0, 3, 1, 2)

    return lambda x: tower((x / 255 - mean) / std), resize


def _load_dinov2(path: Path, device: torch.device) -> Network:
    """The class token of DINOv2, of images resized as in EDM2's FD-DINOv2 (Karras et al. 2024).

    Its config is the one beside the file, as transformers saves it, else that of ViT-L/14.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518,
        patch_size=14,
    )  # fmt: skip
    if (beside := path.with_name("config.json")).exists():
        config = Dinov2Config.from_json_file(beside)
    wrong, advice = f"{path}: not the weights of DINOv2", "give those of facebook/dinov2-large"
    loading: Any = Dinov2Model.from_pretrained  # which knows the names of old versions
    try:
        state = load_file(path)
        network, told = loading(None, config=config, state_dict=state, output_loading_info=True)
    except (SafetensorError, RuntimeError) as error:
        raise ArtifactError(f"{wrong} ({last_line(error)}); {advice}") from error
    if lacking := sorted(told["missing_keys"]):
        raise ArtifactError(f"{wrong} (it lacks {lacking[0]}); {advice}")
    network.to(device).eval()
    of_imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    mean, std = torch.tensor(of_imagenet, device=device).view(2, 3, 1, 1)

    def features(x: Tensor) -> Tensor:
        x = nn.functional.interpolate(x, (_SIZE, _SIZE), mode="bicubic", antialias=True)
        return network((x / 255 - mean) / std).pooler_output

    return features


def resize_clean(images: np.ndarray) -> np.ndarray:
    """Bicubic with antialiasing, each channel in float32: clean-fid's `clean` (Parmar et al. 2022).

    Straight into one array, where clean-fid copies each image four times.
    """
    resized = np.empty((len(images), images.shape[3], *INCEPTION_SIZE), np.float32)

    def fill(place: tuple[int, ...]) -> None:
        index, channel = place
        plane = Image.fromarray(images[index, :, :, channel].astype(np.float32))
        resized[place] = np.asarray(plane.resize(INCEPTION_SIZE, Image.Resampling.BICUBIC))

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(fill, np.ndindex(*resized.shape[:2])))
    return resized.clip(0, 255, out=resized)


def resize_bilinear(images: np.ndarray) -> np.ndarray:
    """Bilinear without antialiasing, as pytorch-fid and clean-fid's `legacy_pytorch`."""
    x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float()
    x = nn.functional.interpolate(x, INCEPTION_SIZE, mode="bilinear", align_corners=False)
    return x.numpy()


def map_images(change: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> np.ndarray:
    """`change` of each image, in threads (Pillow and torch let go of the lock)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Pillow's Image.fromarray(mode=)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return np.stack(list(pool.map(change, images)))


def load_script(path: Path, device: torch.device) -> torch.jit.ScriptModule:
    """A TorchScript module in evaluation mode."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch.jit is on its way out
            return torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise ArtifactError(
            f"{path}: not a readable TorchScript file ({last_line(error)}); fetch it again"
        ) from error


@contextlib.contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """While entered, float32 on `device` is float32: no autocast, and no TF32.

    Convolutions on GPUs take TF32 by default, which keeps 10 of 23 bits; a distance is a small
    difference of large sums.
    """
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        before = cudnn.allow_tf32, matmul.allow_tf32
        cudnn.allow_tf32 = matmul.allow_tf32 = False
        try:
            yield
        finally:
            cudnn.allow_tf32, matmul.allow_tf32 = before


@contextlib.contextmanager
def quiet_clean_fid() -> Iterator[None]:
    """Swallow what clean-fid prints, and undo what it does to the warning filters."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__

"""The CLIP score: how well images fit their prompts, as BK-SDM measures it (Kim et al. 2023).

    100 * mean_i  I_i . T_i / (|I_i| |T_i|)

of the features I of image i and T of its prompt, with open_clip's own preprocessing and tokenizer,
in float32; cosines and their mean are float64. A prompt of more tokens than CLIP's context (77)
loses its end, so such prompts are counted. On CUDA devices images are preprocessed in batches where
they lie, to the same levels, unless open_clip resizes in a way of its own.
B batch, H x W pixels, d features, L context length.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional

from deme_cli.diffusion.denoiser import choose_device
from deme_cli.errors import ArtifactError, MissingError, is_out_of_memory
from deme_cli.evaluation.clip_weights import ClipWeights
from deme_cli.evaluation.networks import full_float32, last_line, to_input
from deme_cli.evaluation.resizing import BatchResizer, resize_all, resize_as_pillow
from deme_cli.fetch import offline_reason, stay_offline

Tokenizer = Callable[..., Tensor]  # prompts, context_length -> int64 (B, L)


class Clip(Protocol):
    """A model of open_clip."""

    def encode_image(self, image: Tensor, /) -> Tensor: ...
    def encode_text(self, text: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Pairs:
    """Images and their prompts, compared: cosines (B,), and which prompts were cut short (B,)."""

    cosines: np.ndarray
    truncated: np.ndarray


@dataclass(frozen=True)
class ClipScorer:
    """A loaded CLIP with its preprocessing and tokenizer.

    `preprocess_batch` works on the device and comes first.
    """

    weights: ClipWeights
    model: Clip
    preprocess: Callable[[Image.Image], Tensor]
    tokenizer: Tokenizer
    device: torch.device
    batch_size: int = 128
    preprocess_batch: BatchResizer | None = None

    def compare(self, images: np.ndarray, prompts: Sequence[str]) -> Pairs:
        """The cosine of each image and its own prompt.  images: uint8 (B, H, W, C), C of 1 or 3"""
        cosines, truncated = [], []
        for start in range(0, len(images), self.batch_size):
            chosen = slice(start, start + self.batch_size)
            text, is_cut = self._text_features(prompts[chosen])
            cosines.append((self._image_features(images[chosen]) * text).sum(dim=-1).numpy())
            truncated.append(is_cut.numpy())
        return Pairs(np.concatenate(cosines), np.concatenate(truncated))

    @torch.inference_mode()
    def _image_features(self, images: np.ndarray) -> Tensor:
        """Unit vectors (B, d) float64."""
        if self.preprocess_batch is None:
            x = torch.from_numpy(resize_all(images, self._prepare)).to(self.device)
        else:
            x = self.preprocess_batch(to_input(images, self.device))
        with full_float32(self.device):
            return _unit(self.model.encode_image(x))

    def _prepare(self, image: np.ndarray) -> np.ndarray:
        shown = image[..., 0] if image.shape[-1] == 1 else image
        return self.preprocess(Image.fromarray(shown)).numpy()

    @torch.inference_mode()
    def _text_features(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Unit vectors (B, d) float64, and whether each prompt was cut (B,); equal ones at once."""
        unique = list(dict.fromkeys(prompts))
        tokens = self.tokenizer(unique)
        with full_float32(self.device):
            features = _unit(self.model.encode_text(tokens.to(self.device)))
        place = {prompt: index for index, prompt in enumerate(unique)}
        chosen = torch.tensor([place[prompt] for prompt in prompts])
        return features[chosen], cut_short(self.tokenizer, unique, tokens)[chosen]


def _unit(features: Tensor) -> Tensor:
    """Features divided by their length.  (B, d) -> (B, d) float64 on the CPU"""
    return functional.normalize(features.cpu().double(), dim=-1)


def cut_short(tokenizer: Tokenizer, prompts: Sequence[str], tokens: Tensor) -> Tensor:
    """Which prompts have more tokens than the context takes: bool (B,).  tokens: (B, L)

    With room for one more token their beginning is another: at its end stands a word, not the mark
    of the end.
    """
    longer = tokenizer(list(prompts), context_length=tokens.shape[1] + 1)
    return (longer[:, :-1] != tokens).any(dim=1)


def open_clip_scorer(
    weights: ClipWeights, *, device: str = "cpu", batch_size: int = 128
) -> ClipScorer:
    """The CLIP behind weights that have been found.

    Raises ArtifactError for a file that holds no such network, MissingError for a tokenizer that
    is neither here nor within reach.
    """
    import open_clip

    place = choose_device(device)
    is_local = weights.architecture != weights.model
    with _quiet_logging():
        try:
            _expect_hub(open_clip.get_model_config(weights.architecture))
            model, _, preprocess = open_clip.create_model_and_transforms(
                weights.architecture,
                pretrained=None if is_local else str(weights.path),
                device=place,
                **_overrides(weights.preprocessing),
            )
            tokenizer = open_clip.get_tokenizer(weights.architecture)
        except OSError as error:  # the hub's libraries, of a tokenizer or text encoder's config
            raise MissingError(
                f"{weights.model}: its text encoder needs files of the hub: {last_line(error)}; "
                f"connect to the network, or give --clip-weights local-dir:FOLDER"
            ) from error
        except _UNREADABLE as error:
            if is_out_of_memory(error):
                raise
            raise ArtifactError(
                f"{weights.path}: not the weights of CLIP {weights.model} ({last_line(error)})"
            ) from error
    model.eval().requires_grad_(False)
    in_batches = batch_preprocess(preprocess, place)
    return ClipScorer(weights, model, preprocess, tokenizer, place, batch_size, in_batches)


def batch_preprocess(preprocess: Any, device: torch.device) -> BatchResizer | None:
    """open_clip's preprocessing for batches on `device`; None where that itself is to do it.

    It is a torchvision `Compose`: a resizer, perhaps a centre crop to its size, conversion to a
    tensor of three channels in [0, 1], and mean and std at the end. Where it fits the long side,
    or a size that is no square, the resizer is open_clip's own.
    """
    from torchvision.transforms import Resize
    from torchvision.transforms.functional import normalize

    resize, *_, scale = preprocess.transforms
    if device.type != "cuda" or not isinstance(resize, Resize):
        return None
    size = [resize.size] if isinstance(resize.size, int) else resize.size
    interpolation = resize.interpolation.value

    def in_batches(images: Tensor) -> Tensor:
        levels = resize_as_pillow(images, size, interpolation)
        return normalize(levels / 255, scale.mean, scale.std)

    return in_batches


def _expect_hub(config: dict[str, Any]) -> None:
    """Where parts of a model come from the hub, have them looked for in its cache if it is silent.

    Its libraries would ask for half a minute.
    """
    if any(name.startswith("hf_") for name in config.get("text_cfg", {})) and offline_reason():
        stay_offline()


_UNREADABLE = (
    RuntimeError, ValueError, KeyError, TypeError, AttributeError, EOFError, StopIteration,
    pickle.UnpicklingError, SafetensorError,
)  # fmt: skip


def _overrides(preprocessing: dict[str, Any]) -> dict[str, Any]:
    """What a tag says of its images, as `create_model_and_transforms` takes it."""
    names = {"mean": "image_mean", "std": "image_std", "interpolation": "image_interpolation",
             "resize_mode": "image_resize_mode"}  # fmt: skip
    return {names[name]: value for name, value in preprocessing.items()}


@contextmanager
def _quiet_logging() -> Iterator[None]:
    """Keep open_clip's remarks, which go to the root logger, off the terminal."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)

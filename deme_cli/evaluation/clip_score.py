"""The CLIP score: how well images fit their prompts, as BK-SDM measures it (Kim et al. 2023).

    100 * mean_i  I_i . T_i / (|I_i| |T_i|)

of the features I of image i and T of its prompt, with open_clip's own preprocessing and tokenizer,
in float32; cosines and their mean are float64. A prompt of more tokens than CLIP's context (77)
loses its end, so such prompts are counted.

Weights are one of open_clip's tags, a file, or `local-dir:FOLDER` as open_clip writes it, whose
config then names the architecture. A tag's file is looked for in DEME_CACHE, then in the hub's
cache, then fetched. The activation that weights were trained with decides the figure, so it is
checked wherever something tells it.
B batch, H x W pixels, d features, L context length.
"""

from __future__ import annotations

import difflib
import logging
import pickle
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional

from deme_cli import console
from deme_cli.diffusion.denoiser import choose_device
from deme_cli.diffusion.model_files import read_json
from deme_cli.errors import ArtifactError, ConfigError, MissingError, is_out_of_memory
from deme_cli.evaluation.features import full_float32, last_line, load_script, map_images
from deme_cli.evaluation.references import CLIP_FILES, clip_asset, hub_cache
from deme_cli.fetch import offline_reason, sha256_of, stay_offline
from deme_cli.files import pickled_names, read_header

LOCAL = "local-dir:"
CONFIG_NAME = "open_clip_config.json"
# What a tag may say of its images, and how `create_model_and_transforms` takes it.
_PREPROCESSING = {
    "mean": "image_mean", "std": "image_std", "interpolation": "image_interpolation",
    "resize_mode": "image_resize_mode",
}  # fmt: skip
_OPENAI = {"input_resolution", "context_length", "vocab_size"}  # beside the weights in its files
_UNREADABLE = (
    RuntimeError, ValueError, KeyError, TypeError, AttributeError, EOFError, StopIteration,
    pickle.UnpicklingError, SafetensorError,
)  # fmt: skip


@dataclass(frozen=True)
class ClipWeights:
    """A CLIP by its file. `architecture` is as open_clip takes it, `model` and `name` as people do.

    `preprocessing` holds what a tag says of its images, as open_clip takes it.
    """

    architecture: str
    model: str
    name: str
    path: Path
    sha256: str
    preprocessing: dict[str, Any] = field(default_factory=dict)

    @property
    def card(self) -> dict[str, str]:
        """As the protocol card and the figures tell it."""
        return {"model": self.model, "weights": self.name, "sha256": self.sha256}


def find_clip(model: str, weights: str) -> ClipWeights:
    """The CLIP that `--clip-model` and `--clip-weights` name, fetched if need be.

    Raises ConfigError for names that open_clip does not know, MissingError for a file that is
    neither here nor within reach, ArtifactError for a folder that is none of open_clip's.
    """
    if weights.startswith(LOCAL):
        folder = Path(weights.removeprefix(LOCAL)).expanduser()
        if not folder.is_dir():
            raise MissingError(f"--clip-weights {weights}: no such folder")
        if not (folder / CONFIG_NAME).is_file():
            raise ArtifactError(
                f"{folder}: no {CONFIG_NAME}; a file of weights alone goes with --clip-weights "
                f"FILE and --clip-model"
            )
        path = next((folder / name for name in CLIP_FILES if (folder / name).is_file()), None)
        if path is None:
            raise MissingError(f"{folder}: no weights of open_clip; expected {CLIP_FILES[0]}")
        name = folder.resolve().name
        return ClipWeights(f"{LOCAL}{folder}", name, path.name, path, sha256_of(path))
    _require_known(model, open_clip.list_models(), "--clip-model", "open_clip architecture")
    path = Path(weights).expanduser()
    if path.is_file():
        _require_activation(model, str(path), quick_gelu_of(path))
        return ClipWeights(model, model, path.name, path, sha256_of(path))
    if path.suffix or len(path.parts) > 1:
        raise MissingError(f"{weights}: no such file of CLIP weights")
    return _find_tag(model, weights)


def _find_tag(model: str, tag: str) -> ClipWeights:
    """The weights of a tag of open_clip, with what it says of its images."""
    from huggingface_hub.utils import disable_progress_bars

    published = open_clip.get_pretrained_cfg(model, tag)
    if not published:
        tags = open_clip.list_pretrained_tags_by_model(model)
        _require_known(tag, tags, f"--clip-weights for {model}", "tag")
    _require_activation(model, tag, bool(published.get("quick_gelu")))
    repository = "/".join(published["hf_hub"].split("/")[:2])  # a file name may follow
    asset = clip_asset(f"{model}/{tag}", repository)
    if (path := asset.find()) is None:
        if reason := offline_reason():
            raise MissingError(
                f"{asset.name}: the {asset.what} are not on this machine, and {reason}; connect to "
                f"the network, put the files of {asset.url} into {asset.copies[0].parent} "
                f"(DEME_CACHE chooses another folder), or give --clip-weights FILE or {LOCAL}FOLDER"
            )
        console.note(f"fetching {asset.url}, for the CLIP score")
        disable_progress_bars()
        try:
            path = Path(open_clip.download_pretrained(published, cache_dir=str(hub_cache())))
        except OSError as error:
            raise MissingError(f"{asset.url}: could not be fetched: {error}") from error
    told = {ours: published[name] for name, ours in _PREPROCESSING.items() if name in published}
    return ClipWeights(model, model, tag, path, sha256_of(path), told)


def _require_known(word: str, known: list[str], option: str, what: str) -> None:
    if word not in known:
        near = difflib.get_close_matches(word, known, n=3, cutoff=0.5) or known
        raise ConfigError(f"{option} {word}: no such {what}; as in {', '.join(near[:8])}")


def _require_activation(model: str, weights: str, quick: bool | None) -> None:
    """Check that the architecture has the activation that the weights were trained with.

    Where nothing tells (None), a warning says which one is taken.
    """
    plain = model.removesuffix("-quickgelu")
    other = f"{plain}-quickgelu" if plain == model else plain  # differs in nothing else
    is_quick = bool(open_clip.get_model_config(model).get("quick_gelu"))
    if other not in open_clip.list_models() or is_quick == quick:
        return
    if quick is not None:
        raise ConfigError(
            f"--clip-model {model}: the weights {weights} were trained with another activation; "
            f"give --clip-model {other}"
        )
    console.warn(
        f"{weights}: does not tell the activation it was trained with; computed as {model} does "
        f"(--clip-model {other} for the other)"
    )


def quick_gelu_of(path: Path) -> bool | None:
    """Whether a file's weights were trained with QuickGELU; None where nothing tells.

    OpenAI's own files tell by their code or their names of tensors, files of open_clip's folders by
    the config beside them.
    """
    if code := _script_code(path):
        return b"1.702" in code  # QuickGELU(x) = x sigmoid(1.702 x)
    is_safe = path.suffix == ".safetensors"
    if set(read_header(path).tensors if is_safe else pickled_names(path)) >= _OPENAI:
        return True
    beside = path.parent / CONFIG_NAME
    if path.name in CLIP_FILES and beside.is_file():
        return bool(read_json(beside).get("model_cfg", {}).get("quick_gelu"))
    return None


def _script_code(path: Path) -> bytes:
    """The source in a TorchScript archive; nothing for any other file."""
    if not zipfile.is_zipfile(path):
        return b""
    with zipfile.ZipFile(path) as archive:
        return b"".join(archive.read(name) for name in archive.namelist() if name.endswith(".py"))


@dataclass(frozen=True)
class ClipScorer:
    """A loaded CLIP of open_clip with its preprocessing and tokenizer."""

    weights: ClipWeights
    model: Any
    preprocess: Callable[[Image.Image], Tensor]
    tokenizer: Callable[..., Tensor]  # prompts, context_length -> int64 (B, L)
    device: torch.device
    batch_size: int = 128

    def compare(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Cosine of each image and its prompt, and whether that was cut (1 or 0): float64 (B, 2).

        images: uint8 (B, H, W, C), C of 1 or 3
        """
        pairs = []
        for start in range(0, len(images), self.batch_size):
            chosen = slice(start, start + self.batch_size)
            text, is_cut = self._text_features(prompts[chosen])
            cosines = (self._image_features(images[chosen]) * text).sum(dim=-1)
            pairs.append(torch.stack([cosines, is_cut.double()], dim=1).numpy())
        return np.concatenate(pairs)

    @torch.inference_mode()
    def _image_features(self, images: np.ndarray) -> Tensor:
        """Unit vectors (B, d) float64."""
        shown = images[..., 0] if images.shape[-1] == 1 else images
        prepared = map_images(lambda one: self.preprocess(Image.fromarray(one)).numpy(), shown)
        with full_float32(self.device):
            features = self.model.encode_image(torch.from_numpy(prepared).to(self.device))
        return functional.normalize(features.cpu().double(), dim=-1)

    @torch.inference_mode()
    def _text_features(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Unit vectors (B, d) float64, and whether each prompt was cut (B,); equal ones at once."""
        unique = list(dict.fromkeys(prompts))
        tokens = self.tokenizer(unique)
        with full_float32(self.device):
            features = self.model.encode_text(tokens.to(self.device)).cpu().double()
        chosen = torch.tensor([unique.index(prompt) for prompt in prompts])
        # with room for one more token, one that was cut has a word where the mark of the end stood
        longer = self.tokenizer(unique, context_length=tokens.shape[1] + 1)
        is_cut = (longer[:, :-1] != tokens).any(dim=1)
        return functional.normalize(features, dim=-1)[chosen], is_cut[chosen]


def open_clip_scorer(
    weights: ClipWeights, *, device: str = "cpu", batch_size: int = 128
) -> ClipScorer:
    """The CLIP behind weights that have been found.

    Raises ArtifactError for a file that holds no such network, MissingError for a tokenizer that
    is neither here nor within reach.
    """
    place = choose_device(device)
    is_local = weights.architecture != weights.model
    script = _script_code(weights.path)  # OpenAI's own, which open_clip does not read from a file
    logging.disable(logging.CRITICAL)  # open_clip's remarks go to the root logger
    try:
        text = open_clip.get_model_config(weights.architecture).get("text_cfg", {})
        if any(name.startswith("hf_") for name in text) and offline_reason():
            stay_offline()  # the hub's libraries would ask for half a minute
        model, _, preprocess = open_clip.create_model_and_transforms(
            weights.architecture, None if is_local or script else str(weights.path),
            device=place, **weights.preprocessing,
        )  # fmt: skip
        if script:
            state = load_script(weights.path, place).state_dict()
            model.load_state_dict({n: tensor for n, tensor in state.items() if n not in _OPENAI})
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
    finally:
        logging.disable(logging.NOTSET)
    model.eval().requires_grad_(False)
    return ClipScorer(weights, model, preprocess, tokenizer, place, batch_size)

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
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
from deme_cli.evaluation.features import full_float32, last_line, map_images, script_code
from deme_cli.evaluation.references import hub_cache
from deme_cli.fetch import cache_folder, offline_reason, sha256_of, stay_offline
from deme_cli.files import pickled_names, read_header

LOCAL = "local-dir:"
CONFIG_NAME = "open_clip_config.json"
# The files that open_clip takes from a repository or folder, in its order.
FILE_NAMES = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth",
    "model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth",
)  # fmt: skip
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


@dataclass(frozen=True)
class ClipTag:
    """Published weights of an architecture: open_clip's tag, and the hub repository it names."""

    architecture: str
    tag: str
    repository: str
    preprocessing: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Where in DEME_CACHE the files of the repository are looked for."""
        return cache_folder() / self.repository.split("/")[-1]

    def find(self) -> Path | None:
        """The file on this machine, if it is here."""
        from huggingface_hub import try_to_load_from_cache

        own = [self.folder / name for name in FILE_NAMES]
        cached = (
            try_to_load_from_cache(self.repository, name, cache_dir=hub_cache())
            for name in FILE_NAMES
        )
        known = (*own, *(Path(path) for path in cached if isinstance(path, str)))
        return next((path for path in known if path.is_file()), None)

    def fetch(self) -> Path:
        """The file in the hub's cache. Raises MissingError, within seconds where nobody answers."""
        from huggingface_hub.utils import disable_progress_bars

        if reason := offline_reason():
            raise MissingError(
                f"{self.architecture}/{self.tag}: the CLIP score's weights are not on this "
                f"machine, and {reason}; connect to the network, put the files of the hub's "
                f"{self.repository} into {self.folder} (DEME_CACHE chooses another folder), or "
                f"give --clip-weights FILE or {LOCAL}FOLDER"
            )
        console.note(f"fetching {self.repository} from the hub, for the CLIP score")
        disable_progress_bars()
        published = open_clip.get_pretrained_cfg(self.architecture, self.tag)
        try:
            return Path(open_clip.download_pretrained(published, cache_dir=str(hub_cache())))
        except OSError as error:
            raise MissingError(
                f"{self.repository}: could not be fetched from the hub: {error}"
            ) from error


def find_clip(model: str, weights: str) -> ClipWeights:
    """The CLIP that `--clip-model` and `--clip-weights` name, fetched if need be.

    Raises ConfigError for names that open_clip does not know, MissingError for a file that is
    neither here nor within reach, ArtifactError for a folder that is none of open_clip's.
    """
    if weights.startswith(LOCAL):
        return _local(Path(weights.removeprefix(LOCAL)).expanduser())
    _require_known(model, open_clip.list_models(), "--clip-model", "open_clip architecture")
    path = Path(weights).expanduser()
    if path.is_file():
        quick = quick_gelu_of(path, model)
        if quick is not None:
            _require_activation(model, path.name, quick)
        elif other := _other_activation(model):
            own = "QuickGELU" if _has_quick_gelu(model) else "GELU"
            console.warn(
                f"{path}: does not tell the activation it was trained with; computed with {own}, "
                f"as {model} does (--clip-model {other} for the other)"
            )
        return ClipWeights(model, model, path.name, path, sha256_of(path))
    if path.suffix or len(path.parts) > 1:
        raise MissingError(f"{weights}: no such file of CLIP weights")
    tag = published_clip(model, weights)
    path = tag.find() or tag.fetch()
    return ClipWeights(model, model, weights, path, sha256_of(path), tag.preprocessing)


def published_clip(model: str, tag: str) -> ClipTag:
    """A tag of an architecture. Raises ConfigError where open_clip has none of this name."""
    published = open_clip.get_pretrained_cfg(model, tag)
    if not published:
        tags = open_clip.list_pretrained_tags_by_model(model)
        _require_known(tag, tags, f"--clip-weights for {model}", "tag")
    _require_activation(model, tag, bool(published.get("quick_gelu")))
    repository = "/".join(published["hf_hub"].split("/")[:2])  # a file name may follow
    told = {ours: published[name] for name, ours in _PREPROCESSING.items() if name in published}
    return ClipTag(model, tag, repository, told)


def _local(folder: Path) -> ClipWeights:
    """A folder with open_clip's config and the weights of one model."""
    if not folder.is_dir():
        raise MissingError(f"--clip-weights {LOCAL}{folder}: no such folder")
    if not (folder / CONFIG_NAME).is_file():
        raise ArtifactError(
            f"{folder}: no {CONFIG_NAME}; a file of weights alone goes with --clip-weights FILE "
            f"and --clip-model"
        )
    path = next((folder / name for name in FILE_NAMES if (folder / name).is_file()), None)
    if path is None:
        raise MissingError(f"{folder}: no weights of open_clip; expected {FILE_NAMES[0]}")
    name = folder.resolve().name
    return ClipWeights(f"{LOCAL}{folder}", name, path.name, path, sha256_of(path))


def _require_known(word: str, known: list[str], option: str, what: str) -> None:
    if word not in known:
        near = difflib.get_close_matches(word, known, n=3, cutoff=0.5) or known
        raise ConfigError(f"{option} {word}: no such {what}; as in {', '.join(near[:8])}")


def _require_activation(model: str, weights: str, quick: bool) -> None:
    """Check that the architecture has the activation that the weights were trained with."""
    if _has_quick_gelu(model) != quick and (other := _other_activation(model)):
        raise ConfigError(
            f"--clip-model {model}: the weights {weights} were trained with another activation; "
            f"give --clip-model {other}"
        )


def _has_quick_gelu(model: str) -> bool:
    return bool(open_clip.get_model_config(model).get("quick_gelu"))


def _other_activation(model: str) -> str | None:
    """The architecture that differs from `model` in nothing but its activation."""
    plain = model.removesuffix("-quickgelu")
    other = f"{plain}-quickgelu" if plain == model else plain
    return other if other in open_clip.list_models() else None


def quick_gelu_of(path: Path, model: str) -> bool | None:
    """Whether a file's weights were trained with QuickGELU; None where nothing tells.

    OpenAI's own files tell by their code or their names of tensors, files of open_clip's folders by
    the config beside them, others by a published tag in the name of file or repository.
    """
    if path.suffix == ".safetensors":
        names: Iterable[str] = read_header(path).tensors
    elif code := script_code(path):
        return b"1.702" in code  # QuickGELU(x) = x sigmoid(1.702 x)
    else:
        names = pickled_names(path)
    if set(names) >= _OPENAI:
        return True
    beside = path.parent / CONFIG_NAME
    if path.name in FILE_NAMES and beside.is_file():
        return bool(read_json(beside).get("model_cfg", {}).get("quick_gelu"))
    parts = [path.name, *(part for part in path.parts if part.startswith("models--"))]
    spelled = " ".join(parts).lower().replace("-", "_")
    published = {
        tag: open_clip.get_pretrained_cfg(one, tag)
        for one in (model, _other_activation(model) or model)
        for tag in open_clip.list_pretrained_tags_by_model(one)
        if tag.lower().replace("-", "_") in spelled
    }
    return bool(published[max(published, key=len)].get("quick_gelu")) if published else None


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
        x = torch.from_numpy(map_images(self._prepare, images)).to(self.device)
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
        chosen = torch.tensor([unique.index(prompt) for prompt in prompts])
        return features[chosen], cut_short(self.tokenizer, unique, tokens)[chosen]


def _unit(features: Tensor) -> Tensor:
    """Features divided by their length.  (B, d) -> (B, d) float64 on the CPU"""
    return functional.normalize(features.cpu().double(), dim=-1)


def cut_short(tokenizer: Callable[..., Tensor], prompts: Sequence[str], tokens: Tensor) -> Tensor:
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
    place = choose_device(device)
    is_local = weights.architecture != weights.model
    with _quiet_logging():
        try:
            text = open_clip.get_model_config(weights.architecture).get("text_cfg", {})
            if any(name.startswith("hf_") for name in text) and offline_reason():
                stay_offline()  # the hub's libraries would ask for half a minute
            model, _, preprocess = open_clip.create_model_and_transforms(
                weights.architecture,
                pretrained=None if is_local else str(weights.path),
                device=place,
                **weights.preprocessing,
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
    return ClipScorer(weights, model, preprocess, tokenizer, place, batch_size)


@contextmanager
def _quiet_logging() -> Iterator[None]:
    """Keep open_clip's remarks, which go to the root logger, off the terminal."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)

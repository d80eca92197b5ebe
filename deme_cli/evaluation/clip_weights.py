"""Which CLIP tells how well an image fits its prompt: an architecture of open_clip and its weights.

Weights are one of open_clip's tags, a file, or `local-dir:FOLDER` as open_clip writes it, whose
config then names the architecture. A tag's file is looked for in DEME_CACHE, then in the hub's
cache. Tags and architectures are open_clip's own, so it is imported where they are looked up.
"""

from __future__ import annotations

import difflib
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deme_cli.diffusion.model_files import read_json
from deme_cli.errors import ArtifactError, ConfigError, MissingError
from deme_cli.evaluation.assets import hub_cache
from deme_cli.fetch import cache_folder, offline_reason, sha256_of
from deme_cli.files import pickled_names, read_header

LOCAL = "local-dir:"
# The files that open_clip takes from a repository or folder, in its order.
FILE_NAMES = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth",
    "model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth",
)  # fmt: skip
_PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")


@dataclass(frozen=True)
class ClipWeights:
    """A CLIP by its file. `architecture` is as open_clip takes it, `model` and `name` as people do.

    `preprocessing` holds what a tag says of its images (mean, std, interpolation, resize mode).
    """

    architecture: str
    model: str
    name: str
    path: Path
    sha256: str
    preprocessing: dict[str, Any] = field(default_factory=dict)

    @property
    def card(self) -> dict[str, str]:
        """As the protocol card tells it."""
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

        for name in FILE_NAMES:
            if (self.folder / name).is_file():
                return self.folder / name
        for name in FILE_NAMES:
            found = try_to_load_from_cache(self.repository, name, cache_dir=hub_cache())
            if isinstance(found, str) and Path(found).is_file():
                return Path(found)
        return None


def require_clip(model: str, weights: str) -> ClipTag | None:
    """Check that weights are here or can be fetched; the tag that has to be fetched first, or None.

    Raises ConfigError for names that open_clip does not know, MissingError within seconds where a
    file is neither here nor within reach.
    """
    found = _file_or_tag(model, weights)
    if not isinstance(found, ClipTag) or found.find() is not None:
        return None
    if reason := offline_reason():
        raise MissingError(
            f"{found.architecture}/{found.tag}: the CLIP score's weights are not on this machine, "
            f"and {reason}; connect to the network, put the files of the hub's {found.repository} "
            f"into {found.folder} (DEME_CACHE chooses another folder), or give --clip-weights FILE "
            f"or {LOCAL}FOLDER"
        )
    return found


def download_clip(tag: ClipTag) -> Path:
    """Fetch the weights of a tag into the hub's cache. Raises MissingError if that fails."""
    import open_clip
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    published = open_clip.get_pretrained_cfg(tag.architecture, tag.tag)
    try:
        return Path(open_clip.download_pretrained(published, cache_dir=str(hub_cache())))
    except OSError as error:
        raise MissingError(
            f"{tag.repository}: could not be fetched from the hub: {error}"
        ) from error


def find_clip(model: str, weights: str) -> ClipWeights:
    """The CLIP that `--clip-model` and `--clip-weights` name, on this machine.

    Raises ConfigError for names that open_clip does not know, MissingError for a file that is not
    there, ArtifactError for a folder that is none of open_clip's.
    """
    found = _file_or_tag(model, weights)
    if isinstance(found, ClipWeights):
        return found
    if (path := found.find()) is None:
        raise MissingError(
            f"{found.architecture}/{found.tag}: the CLIP score's weights are not on this machine; "
            f"they are the hub's {found.repository}"
        )
    name, digest = found.tag, sha256_of(path)
    return ClipWeights(model, model, name, path, digest, found.preprocessing)


def _file_or_tag(model: str, weights: str) -> ClipWeights | ClipTag:
    if weights.startswith(LOCAL):
        return _local(Path(weights.removeprefix(LOCAL)).expanduser())
    import open_clip

    _require_known(model, open_clip.list_models(), "--clip-model", "open_clip architecture")
    path = Path(weights).expanduser()
    if path.is_file():
        if (quick := quick_gelu_of(path, model)) is not None:
            _require_activation(model, path.name, quick)
        return ClipWeights(model, model, path.name, path, sha256_of(path))
    if path.suffix or len(path.parts) > 1:
        raise MissingError(f"{weights}: no such file of CLIP weights")
    return published_clip(model, weights)


def published_clip(model: str, tag: str) -> ClipTag:
    """A tag of an architecture. Raises ConfigError where open_clip has none of this name."""
    import open_clip

    published = open_clip.get_pretrained_cfg(model, tag)
    if not published:
        tags = open_clip.list_pretrained_tags_by_model(model)
        _require_known(tag, tags, f"--clip-weights for {model}", "tag")
    _require_activation(model, tag, bool(published.get("quick_gelu")))
    repository = "/".join(published["hf_hub"].split("/")[:2])  # a file name may follow
    preprocessing = {name: published[name] for name in _PREPROCESSING if name in published}
    return ClipTag(model, tag, repository, preprocessing)


def _require_known(word: str, known: list[str], option: str, what: str) -> None:
    if word in known:
        return
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5) or known
    raise ConfigError(f"{option} {word}: no such {what}; as in {', '.join(near[:8])}")


def _require_activation(model: str, weights: str, quick: bool) -> None:
    """Check that the architecture has the activation that the weights were trained with."""
    if has_quick_gelu(model) != quick and (other := _other_activation(model)):
        raise ConfigError(
            f"--clip-model {model}: the weights {weights} were trained with another activation; "
            f"give --clip-model {other}"
        )


def has_quick_gelu(model: str) -> bool:
    import open_clip

    return bool(open_clip.get_model_config(model).get("quick_gelu"))


def _other_activation(model: str) -> str | None:
    """The architecture that differs from `model` in nothing but its activation."""
    import open_clip

    plain = model.removesuffix("-quickgelu")
    other = f"{plain}-quickgelu" if plain == model else plain
    return other if other in open_clip.list_models() else None


def quick_gelu_of(path: Path, model: str) -> bool | None:
    """Whether a file's weights were trained with QuickGELU; None where nothing tells.

    OpenAI's own files tell by their code or their names of tensors, files of open_clip's folders by
    the config beside them, others by a published tag in the name of file or repository.
    """
    import open_clip

    if path.suffix == ".safetensors":
        names: Iterable[str] = read_header(path).tensors
    elif code := script_code(path):
        return b"1.702" in code  # QuickGELU(x) = x sigmoid(1.702 x)
    else:
        names = pickled_names(path)
    if {"input_resolution", "context_length", "vocab_size"} <= set(names):
        return True
    beside = path.parent / "open_clip_config.json"
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


def script_code(path: Path) -> bytes:
    """The source in a TorchScript archive; nothing for any other file."""
    if not zipfile.is_zipfile(path):
        return b""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".py")]
        return b"".join(map(archive.read, names))


def activation_told(clip: ClipWeights) -> str | None:
    """What is assumed of weights whose file does not tell their activation; None where it does."""
    is_file = clip.architecture == clip.model and clip.name == clip.path.name
    if not is_file or quick_gelu_of(clip.path, clip.model) is not None:
        return None
    if (other := _other_activation(clip.model)) is None:
        return None
    own = "QuickGELU" if has_quick_gelu(clip.model) else "GELU"
    return (
        f"{clip.path}: does not tell the activation it was trained with; computed with {own}, as "
        f"{clip.model} does (--clip-model {other} for the other)"
    )


def _local(folder: Path) -> ClipWeights:
    """A folder with `open_clip_config.json` and the weights of one model."""
    if not folder.is_dir():
        raise MissingError(f"--clip-weights {LOCAL}{folder}: no such folder")
    if not (folder / "open_clip_config.json").is_file():
        raise ArtifactError(
            f"{folder}: no open_clip_config.json; a file of weights alone goes with "
            f"--clip-weights FILE and --clip-model"
        )
    path = next((folder / name for name in FILE_NAMES if (folder / name).is_file()), None)
    if path is None:
        raise MissingError(f"{folder}: no weights of open_clip; expected {FILE_NAMES[0]}")
    name = folder.resolve().name
    return ClipWeights(f"{LOCAL}{folder}", name, path.name, path, sha256_of(path))

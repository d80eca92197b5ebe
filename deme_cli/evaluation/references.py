"""What figures are taken on and against: a feature network by its file, and reference images.

`inception`, `clip`, `dinov2` and `digits` are known by name; anything else is a TorchScript file of
float32 images (B, 3, H, W) in [0, 255] -> (B, d). Only a distance on Inception features is
called FID. A reference is a named dataset, images, or statistics somebody made before: that of
CIFAR-10 is the train split (50,000 images), that of the digits the test split. `find_weights` and
`find_reference` tell at once, without torch, whether they can be had and fit each other;
`open_reference` reads statistics, or looks at images; `reference_statistics` makes statistics to be
kept.
n images, d features.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_cli.artifacts import Record, StatisticsRecord, read_record, write_artifact
from deme_cli.config import EvalConfig
from deme_cli.console import Progress, note_once, silent
from deme_cli.data.archives import PIXELS, STATISTICS_PICKLES, npz_names, pickled_statistics
from deme_cli.data.digits import EMBEDDED
from deme_cli.data.image_source import FOLDERS_ONLY, find_image_source
from deme_cli.distributed import ALONE, World, joined
from deme_cli.errors import ArtifactError, ConfigError, MissingError
from deme_cli.fetch import Asset, cache_folder, fetch, sha256_of, user_cache
from deme_cli.files import require_output
from deme_cli.run_file import RunFile

if TYPE_CHECKING:
    import numpy as np

    from deme_cli.evaluation.features import Extractor
    from deme_cli.evaluation.frechet import Statistics

DIGITS_PATH = EMBEDDED / "digit-features.pt"  # made by examples/digit_features.py
NAMED = ("inception", "clip", "dinov2", "digits")
DISTANCES = {"fid": ("fid", "frechet"), "kid": ("kid", "kernel"), "prc": ("prc", "prc")}
CLIP_REPOSITORY = "laion/CLIP-ViT-g-14-laion2B-s34B-b88K"  # of the usual CLIP score
# The files that open_clip takes from a repository or folder, in its order.
CLIP_FILES = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth",
    "model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth",
)  # fmt: skip
SPLITS = {"train": "train", "test": "held-out", "held-out": "held-out", "all": "all"}
_DEFAULT_SPLITS = {"digits": "held-out", "cifar10": "train"}
# Known datasets whose Inception statistics clean-fid publishes: its name, split, size, image count.
PUBLISHED_STATISTICS = {
    "cifar10": ("cifar10", "train", 32, 50_000),
    "lsun-church": ("lsun_church", "train", 256, 50_000),
}


@dataclass(frozen=True)
class FeatureWeights:
    """A feature network by its file. `family` is one of NAMED, or `file`.

    `published` says whether the checksum is the publisher's; None where nobody publishes one.
    """

    family: str
    name: str
    resize: str
    path: Path
    sha256: str
    published: bool | None

    def name_of(self, distance: str) -> str:
        """What `fid`, `kid` or `prc` on these features is called, as `frechet_digits`."""
        usual, other = DISTANCES[distance]
        return usual if self.family == "inception" else f"{other}_{self.name}"

    @property
    def extractor(self) -> dict[str, str]:
        """As a statistics record names it."""
        return {"name": self.name, "sha256": self.sha256}


def choose_features(features: str | None, references: Sequence[str]) -> str:
    """The features asked for, else those that fit the references.

    `digits` for digits, those of a `statistics` artifact where it was made with named ones, else
    `inception`.
    """
    for reference in references if features is None else ():
        if reference == "digits":
            return "digits"
        record = record_of_file(reference)
        if isinstance(record, StatisticsRecord) and record.extractor.get("name") in NAMED:
            return record.extractor["name"]
    return features or "inception"


def record_of_file(argument: str) -> Record | None:
    """The record of an artifact; None for what is no file."""
    path = Path(argument).expanduser()
    return read_record(path) if path.suffix == ".safetensors" and path.is_file() else None


def weights_assets(features: str, resize: str, weights: Path | None) -> list[Asset]:
    """The published file that `find_weights` will look for, if it does.

    Raises ConfigError for settings that contradict each other, MissingError for no such features.
    """
    if features not in NAMED and not Path(features).expanduser().is_file():
        raise MissingError(
            f"--features {features}: no such file; expected {', '.join(NAMED)} or a TorchScript"
        )
    if weights is not None and features not in ("inception", "clip", "dinov2"):
        raise ConfigError(
            "--weights goes with --features inception, clip or dinov2; others bring their own"
        )
    if resize != "clean" and features != "inception":
        raise ConfigError(f"--resize {resize} goes with --features inception, not {features}")
    asset = published_weights(features, resize)
    return [asset] if asset is not None and weights is None else []


def find_weights(
    features: str, resize: str = "clean", weights: Path | None = None
) -> FeatureWeights:
    """The feature network that `--features`, `--resize` and `--weights` name.

    resize counts for Inception alone: images reach the other networks in their own way. Raises what
    `weights_assets` raises, MissingError for a file that is not there.
    """
    path = weights or (DIGITS_PATH if features == "digits" else Path(features).expanduser())
    for asset in weights_assets(features, resize, weights):
        if (found := asset.find()) is None:
            raise MissingError(f"{asset.name}: the {asset.what} are missing; fetch {asset.url}")
        path = found
    if not path.is_file():
        raise MissingError(f"{path}: no such file of feature network weights")
    digest, published = sha256_of(path), published_weights(features, resize)
    is_copy = features == "clip" and path.suffix == ".safetensors"  # open_clip's, without checksum
    known = None if published is None or is_copy else digest == published.sha256
    if features not in NAMED:
        name = re.sub(r"\W+", "_", path.stem).strip("_").lower()
        return FeatureWeights("file", name, "none", path, digest, known)
    way = {"inception": resize, "digits": "none"}.get(features, features)
    return FeatureWeights(features, features, way, path, digest, known)


def require_same_extractor(record: StatisticsRecord, weights: FeatureWeights, where: str) -> None:
    """Check that statistics were made with this network and resize mode; raises ArtifactError."""
    made = (record.extractor.get("name"), record.extractor.get("sha256"), record.resize)
    used = (weights.name, weights.sha256, weights.resize)
    if made != used:
        then, now = (
            f"{name} (sha256 {sha!s:.12}, resize {way})" for name, sha, way in (made, used)
        )
        raise ArtifactError(
            f"{where}: made with {then}, this run uses {now}; set --features, --resize and "
            f"--weights as then, or run `deme stats` again"
        )


def published_weights(features: str, resize: str) -> Asset | None:
    """The file of a network that others publish.

    Of Inception as clean-fid takes it for a resize mode: the TorchScript of NVIDIA's StyleGAN2-ADA
    for `clean` and `legacy_tensorflow`, the state dict of pytorch-fid for `legacy_pytorch`. Of
    CLIP ViT-B/32, as in clean-fid's `clip_vit_b_32`, OpenAI's file, or the copy that open_clip has
    fetched from the hub. Of DINOv2 ViT-L/14, as in EDM2's FD-DINOv2, that of transformers.
    """
    digest = None
    if features == "dinov2":
        name, what = "dinov2-large.safetensors", "DINOv2 ViT-L/14 weights"
        url = "https://huggingface.co/facebook/dinov2-large/resolve/main/model.safetensors"
        repository = "models--facebook--dinov2-large/snapshots/*/model.safetensors"
        copies = sorted(hub_cache().glob(repository))
    elif features == "clip":
        name, what = "ViT-B-32.pt", "CLIP ViT-B/32 weights"
        digest = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
        url = f"https://openaipublic.azureedge.net/clip/models/{digest}/{name}"
        repository = "models--timm--vit_base_patch32_clip_224.openai/snapshots/*"
        hub = hub_cache().glob(f"{repository}/open_clip_model.safetensors")
        copies = [user_cache() / "clip" / name, *sorted(hub)]
    elif features != "inception":
        return None
    elif resize == "legacy_pytorch":
        name, what = "pt_inception-2015-12-05-6726825d.pth", "Inception weights of pytorch-fid"
        digest = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
        url = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{name}"
        torch_home = Path(os.environ.get("TORCH_HOME") or user_cache() / "torch").expanduser()
        copies = [torch_home / "hub" / "checkpoints" / name]
    else:
        name, what = "inception-2015-12-05.pt", "Inception weights"
        digest = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
        url = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{name}"
        copies = [Path("." if platform.system() == "Windows" else "/tmp") / name]  # clean-fid's
    return Asset(name, what, url, digest, tuple(copies))


def hub_cache() -> Path:
    """Where the hub's library keeps what it fetches."""
    home = Path(os.environ.get("HF_HOME") or user_cache() / "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()


def clip_asset(name: str, repository: str) -> Asset:
    """The weights of a CLIP score: in a folder of DEME_CACHE called as the repository of the hub
    that has them, or in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    copies = [cache_folder() / repository.split("/")[-1] / file for file in CLIP_FILES]
    for file in CLIP_FILES:
        cached = try_to_load_from_cache(repository, file, cache_dir=hub_cache())
        copies += [Path(cached)] if isinstance(cached, str) else []
    address = f"https://huggingface.co/{repository}"
    return Asset(name, "CLIP score's weights", address, copies=tuple(copies))


@dataclass(frozen=True)
class Reference:
    """A reference that is there. kind: `published`, `npz`, `statistics` or `images`.

    `split` is of images; `n` how many images stand behind statistics, where that is known. Once
    opened, `sha256` is of the file, or the fingerprint of the images, and there are `statistics`
    for a Fréchet distance, or `features` (n, d) for what needs images; a process that has looked at
    images for another one has neither.
    """

    source: str
    kind: str
    path: Path | None = None
    n: int | None = None
    split: str | None = None
    sha256: str | None = None
    statistics: Statistics | None = field(default=None, compare=False, repr=False)
    features: np.ndarray | None = field(default=None, compare=False, repr=False)

    @property
    def card(self) -> dict[str, Any]:
        """As the protocol card tells it."""
        file = self.path.name if self.path else None
        return {
            "source": self.source, "kind": self.kind, "file": file, "split": self.split,
            "n": self.n, "sha256": self.sha256,
        }  # fmt: skip


def statistics_asset(dataset: str, resize: str) -> Asset:
    """clean-fid's Inception statistics of a dataset in PUBLISHED_STATISTICS."""
    name, split, size, num = PUBLISHED_STATISTICS[dataset]
    file_name = f"{name}_{resize}_{split}_{size}.npz"
    package = importlib.util.find_spec("cleanfid")
    folders = package.submodule_search_locations if package else None
    copies = tuple(Path(folder) / "stats" / file_name for folder in folders or ())
    what = f"statistics of {num} images of {dataset} ({split})"
    address = f"https://www.cs.cmu.edu/~clean-fid/stats/{file_name}"
    return Asset(file_name, what, address, copies=copies)


def reference_assets(
    source: str, features: str, resize: str, *, needs_images: bool = False
) -> list[Asset]:
    """What `find_reference` will look for outside: clean-fid's statistics of a known dataset."""
    if source in PUBLISHED_STATISTICS and features == "inception" and not needs_images:
        return [statistics_asset(source, resize)]
    return []


def find_reference(
    source: str, features: str, resize: str = "clean", *, weights: FeatureWeights | None = None,
    needs_images: bool = False, split: str | None = None,
) -> Reference:  # fmt: skip
    """The reference that an argument names, with its headers checked.

    weights: what statistics must have been made with, if that is to be checked now. needs_images:
    as the kernel distance and precision do. split: of images, `train`, `test` or `all`.
    Raises MissingError where something is missing, ArtifactError for statistics of other features.
    """
    for asset in reference_assets(source, features, resize, needs_images=needs_images):
        if (published := asset.find()) is None:
            raise MissingError(f"{source}: {asset.name} is missing; fetch {asset.url}")
        _require_statistics(published)
        return Reference(source, "published", published, n=PUBLISHED_STATISTICS[source][3])
    if source == "parti":
        raise MissingError(
            "parti: PartiPrompts are prompts without images; measure --prompts parti by "
            "--clip-score, or give a folder of images"
        )
    if source in FOLDERS_ONLY and not Path(source).is_dir():
        raise MissingError(
            f"{source}: no statistics of {FOLDERS_ONLY[source]} are published for these features; "
            f"get the images and make them: deme stats FOLDER -o {source}.safetensors"
        )
    path, record = Path(source).expanduser(), record_of_file(source)
    if path.suffix in STATISTICS_PICKLES and path.is_file():
        raise ConfigError(pickled_statistics(path, features))
    if isinstance(record, StatisticsRecord):
        if weights is not None:
            require_same_extractor(record, weights, source)
        found = Reference(source, "statistics", path, n=record.n)
    elif path.suffix == ".npz" and not _takes_pixels(path, needs_images):
        _require_statistics(path)
        found = Reference(source, "npz", path)
    else:
        return find_images(source, split)  # samples are; anything else is refused as such
    if needs_images:
        raise ConfigError(f"{source}: holds a mean and covariance; --kid and --prc need images")
    return found


def find_images(source: str, split: str | None = None) -> Reference:
    """The images that an argument names, and the split of them that is meant.

    Raises MissingError where nothing is there, ConfigError for an unknown split.
    """
    if split is not None and split not in SPLITS:
        raise ConfigError(f"split {split!r}: expected one of train, test, all")
    find_image_source(source)
    default = _DEFAULT_SPLITS.get(source, "all")
    return Reference(source, "images", split=SPLITS[split] if split else default)


def _takes_pixels(path: Path, needs_images: bool) -> bool:
    """Whether the images of an .npz are meant, not statistics; tells which, where it has both."""
    names = npz_names(path)
    has_both = {PIXELS, "mu", "sigma"} <= names
    if has_both:
        taken, left = (PIXELS, "mu and sigma") if needs_images else ("mu and sigma", PIXELS)
        way = "" if needs_images else f"; for those of its images: deme stats {path} -o FILE"
        note_once(f"{path}: holds images and statistics: {taken} taken, {left} left out{way}")
    return needs_images if has_both else PIXELS in names


def _require_statistics(path: Path) -> None:
    """Check that an .npz holds mu and sigma, from its table of contents."""
    names = npz_names(path)
    if not {"mu", "sigma"} <= names:
        found = ", ".join(sorted(names)) or "nothing"
        raise ArtifactError(
            f"{path}: expected the arrays mu and sigma, or images as {PIXELS}, found {found}"
        )


def open_reference(
    reference: Reference, extractor: Extractor, shape: tuple[int, int, int] | None = None, *,
    needs_images: bool = False, world: World = ALONE, progress: Progress = silent,
) -> Reference:  # fmt: skip
    """The reference with its statistics, or with its features, where images are needed.

    shape: (C, H, W) that images come at; None for their own size. Processes of `world` share the
    images. Raises ArtifactError if statistics have another number of features.
    """
    if reference.path is not None:
        statistics = _read_statistics(reference.path, reference.n or 0)
        own, d = f"statistics of {len(statistics.mu)} features", len(statistics.mu)
        if shape is not None and d != (num := extractor.num_features(shape)):
            raise ArtifactError(f"{reference.path}: {own}, {extractor.weights.name} has {num}")
        return replace(reference, sha256=sha256_of(reference.path), statistics=statistics)
    import numpy as np

    from deme_cli.data.images import open_images
    from deme_cli.evaluation.features import look_at

    data = open_images(reference.source, shape=shape, split=reference.split or "all")
    label = f"reference {reference.source}"
    running, kept = look_at(data, extractor, label, world, progress, keep=needs_images)
    opened = replace(reference, n=len(data), sha256=data.fingerprint)
    if not world.is_first:
        return opened
    if needs_images:
        return replace(opened, features=np.concatenate(kept))
    return replace(opened, statistics=running.statistics(reference.source))


def _read_statistics(path: Path, n: int) -> Statistics:
    """The mean and covariance in a file; raises ArtifactError where their shapes do not fit."""
    import numpy as np
    from safetensors.numpy import load_file

    from deme_cli.evaluation.frechet import Statistics

    try:
        if path.suffix == ".safetensors":
            arrays = load_file(path)
        else:
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in ("mu", "sigma")}
        mu, sigma = (arrays[name].astype(np.float64) for name in ("mu", "sigma"))
    except (KeyError, ValueError, TypeError, OSError, zipfile.BadZipFile, EOFError) as error:
        raise ArtifactError(f"{path}: cannot be read: {error}; fetch or make it again") from error
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ArtifactError(
            f"{path}: expected mu (d,) and sigma (d, d), found {mu.shape}, {sigma.shape}"
        )
    return Statistics(mu, sigma, n)


def reference_statistics(
    data: str, output: Path, settings: EvalConfig | None = None, *,
    split: str | None = None, size: int | None = None, squeeze: bool = False,
    weights: Path | None = None, run: RunFile | None = None, device: str = "auto",
    force: bool = False, progress: Progress = silent,
) -> StatisticsRecord | None:  # fmt: skip
    """Make the reference statistics that `evaluate` takes distances to.

    data: images as any image argument names them.   settings: of which features, resize and
    batch_size count; those of `run` if None.   split: train, test or all; None for the usual one.
    size: bring images to that many pixels a side first, cropped, or with `squeeze` squeezed.
    weights: the file of the Inception or CLIP features.   progress: is told how far it is.

    The processes that this one has joined share the images. Returns the record, None in all but the
    first of them. Raises ConfigError, MissingError, ArtifactError, NumericsError; then no output
    appears.
    """
    settings, world = settings or (run or RunFile()).settings(EvalConfig), joined()
    world.require_same({
        "data": data, "output": str(output), "split": split, "size": size, "squeeze": squeeze,
        "features": settings.features, "resize": settings.resize, "weights": str(weights),
        "batch_size": settings.batch_size,
    })  # fmt: skip
    if world.is_first:
        require_output(output, force=force, inputs=[Path(data)])
    if size is not None and size < 1:
        raise ConfigError(f"--size {size}: expected a number of pixels above 0")
    if squeeze and size is None:
        raise ConfigError("--squeeze needs --size, the side to squeeze images to")
    if output.suffix != ".safetensors":
        raise ConfigError(f"--output {output}: expected a name that ends in .safetensors")
    features = choose_features(settings.features, [data])
    split = find_images(data, split).split or "all"
    with world.first_before_others():
        fetch(weights_assets(features, settings.resize, weights), progress)
    found = find_weights(features, settings.resize, weights)

    import numpy as np

    from deme_cli.data.images import open_images
    from deme_cli.evaluation.features import look_at, open_extractor

    extractor = open_extractor(found, device=world.device or device, batch_size=settings.batch_size)
    shape = None if size is None else (3, size, size)
    images = open_images(data, shape=shape, split=split, squeeze=squeeze)
    running, _ = look_at(images, extractor, f"looking at {data}", world, progress)
    made = None
    if world.is_first:
        statistics = running.statistics(data)
        record = StatisticsRecord(
            n=statistics.n, extractor=found.extractor, resize=found.resize, source=images.source,
            data={"fingerprint": images.fingerprint, "split": split, "shape": list(images.shape),
                  "squeezed": images.squeeze},
        )  # fmt: skip
        n = np.array(statistics.n, dtype=np.int64)
        tensors = {"mu": statistics.mu, "sigma": statistics.sigma, "n": n}
        made = write_artifact(output, tensors, record)
    world.wait()  # nobody ends well before the statistics are there
    return made

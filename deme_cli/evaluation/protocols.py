"""Protocols by name: what published figures were measured with, each with its source.

A protocol fixes settings of [sample] and [eval]. A value in deme.toml yields to it; an option on
the command line that says otherwise is an error. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deme_cli.config import EvalConfig, SampleConfig
from deme_cli.errors import ConfigError
from deme_cli.settings import Settings


@dataclass(frozen=True)
class Protocol:
    """Settings that belong together. `source` says whose they are, `open` what that leaves open.

    `reference` describes the images that the user has to give with --fid; None where the protocol
    names them itself, or needs none.
    """

    name: str
    source: str
    open: str
    sample: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    reference: str | None = None

    def drew(self, card: Mapping[str, Any]) -> bool:
        """Whether finished images, by their card, were drawn as this protocol says."""
        found = {**card, "resize": card.get("resize_to")}
        found["prompts"] = (card.get("prompts") or {}).get("source")
        return all(found.get(name) == value for name, value in self.sample.items())

    def settings(self, config: type[Settings]) -> dict[str, Any]:
        """What it fixes of one table; the number of images and the seed are settings of both."""
        if config is SampleConfig:
            return dict(self.sample)
        assert config is EvalConfig, config
        shared = {name: self.sample[name] for name in ("num", "seed") if name in self.sample}
        return {**shared, **self.evaluation}


# Inception as pytorch-fid runs it, which clean-fid's mode of this name is nearest to.
_PYTORCH_FID = {"features": "inception", "resize": "legacy_pytorch"}
_CLIP_SCORE = {
    "clip_score": True,
    "clip_model": "ViT-g-14",
    "clip_weights": "laion2b_s34b_b88k",
}
_STABLE_DIFFUSION = {
    "sampler": "pndm",
    "steps": 25,
    "guidance": 7.5,
    "resolution": 512,
    "resize": 256,
    "per_prompt": 1,
    "seed": 1234,
}

_PROTOCOLS = (
    Protocol(
        "ddim-cifar10",
        "DeMe, Table 3 and section 4.1: DDIM with 100 steps, 50,000 images, FID against the 50,000 "
        "training images of CIFAR-10",
        "the spacing of the timesteps (here the checkpoint's own) and the seeds",
        {"sampler": "ddim", "steps": 100, "eta": 0.0, "num": 50_000},
        {"fid": "cifar10", **_PYTORCH_FID},
    ),
    Protocol(
        "lsun-church-50k",
        "DeMe's released recipe for LSUN-Church: DDIM with 50 steps, eta 0, 50,000 images, FID of "
        "pytorch-fid against the real images",
        "which real images (here the 50,000 whose statistics clean-fid publishes) and the seeds",
        {"sampler": "ddim", "steps": 50, "eta": 0.0, "num": 50_000},
        {"fid": "lsun-church", **_PYTORCH_FID},
    ),
    Protocol(
        "lsun-bedroom-50k",
        "DeMe, section 4.1: 50,000 images; drawn as in its released recipe for LSUN-Church, DDIM "
        "with 50 steps, eta 0",
        "the recipe for bedrooms, which was not released, its real images and the seeds",
        {"sampler": "ddim", "steps": 50, "eta": 0.0, "num": 50_000},
        dict(_PYTORCH_FID),
        "LSUN bedroom at 256 x 256 pixels",
    ),
    Protocol(
        "bk-sdm-coco30k",
        "BK-SDM (Kim et al. 2023), which DeMe follows: PNDM with 25 steps, guidance 7.5, seed "
        "1234, 512 pixels resized to 256, one image for each of 30,000 captions of MS-COCO "
        "val2014; FID of pytorch-fid against all of val2014, CLIP score with ViT-g/14",
        "which 30,000 captions DeMe took; BK-SDM draws all images from one stream of noise and "
        "keeps them as JPEG, here each has its own seed and stays as it is",
        {**_STABLE_DIFFUSION, "prompts": "coco", "num": 30_000},
        {**_PYTORCH_FID, **_CLIP_SCORE},
        "the 40,504 images of MS-COCO val2014, squeezed to 256 x 256 pixels "
        "(for statistics, with --size 256 --squeeze)",
    ),
    Protocol(
        "parti",
        "DeMe, Table 2: CLIP score with ViT-g/14 of one image for each of the 1,632 PartiPrompts "
        "(Yu et al. 2022), drawn and resized as in BK-SDM",
        "sampler, guidance and resolution on PartiPrompts (here those on MS-COCO)",
        {**_STABLE_DIFFUSION, "prompts": "parti", "num": 1632},
        dict(_CLIP_SCORE),
    ),
    Protocol(
        "imagenet",
        "DeMe, Table 2: FID and CLIP score with ViT-g/14 of Stable Diffusion's images of the 1,000 "
        "classes of ImageNet, drawn and resized as in BK-SDM",
        "number of images (here 50 of each class, 50,000), prompts (here 'a photo of a' and the "
        "class), sampler and guidance (here those on MS-COCO), and which real images",
        {**_STABLE_DIFFUSION, "prompts": "imagenet", "num": 50_000},
        {**_PYTORCH_FID, **_CLIP_SCORE},
        "ImageNet-1k at 256 x 256 pixels",
    ),
)
_FLAGS = {  # options that are not called as their setting
    (SampleConfig, "resize"): "--resize-to",
    (SampleConfig, "num"): "-n",
    (EvalConfig, "num"): "-n",
}
PROTOCOLS = {protocol.name: protocol for protocol in _PROTOCOLS}


def find_protocol(name: str | None) -> Protocol | None:
    """The protocol of this name, if one is asked for. Raises ConfigError for an unknown name."""
    if name is not None and name not in PROTOCOLS:
        raise ConfigError(f"--protocol {name}: expected one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name] if name else None


def apply_protocol(
    protocol: Protocol | None, config: type[Settings], options: Mapping[str, Any]
) -> dict[str, Any]:
    """The options of the command line (None if not given) with what the protocol fixes.

    Raises ConfigError naming an option that says something else.
    """
    if protocol is None:
        return dict(options)
    fixed = protocol.settings(config)
    for name, value in fixed.items():
        given = options.get(name)
        if given is not None and given != value:
            flag = _FLAGS.get((config, name), f"--{name.replace('_', '-')}")
            raise ConfigError(
                f"{flag} {_shown(given)}: the protocol {protocol.name} has {_shown(value)}; leave "
                f"{flag} out, or measure without --protocol"
            )
    return {**options, **fixed}


def require_reference(protocol: Protocol | None, fid: str | None) -> None:
    """Check that the images are given that a protocol leaves to the user. Raises ConfigError."""
    if protocol is not None and protocol.reference and not fid:
        raise ConfigError(
            f"the protocol {protocol.name} measures against {protocol.reference}: give that folder "
            f"with --fid FOLDER, or its statistics: deme stats FOLDER --resize legacy_pytorch "
            f"-o reference.safetensors"
        )


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

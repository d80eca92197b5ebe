"""Under which protocol a figure was made: those with a name, and the card of a measured row.

A published protocol fixes settings of [sample] and [eval]. A value in deme.toml yields to it; an
option on the command line that says otherwise is an error.

The card of a row takes up that of its images (which model, sampler, steps, seed) and adds what
measured them. A figure without its card is not comparable, so the cards of a table are compared
field by field. Who drew (model, source, fingerprints) may differ and is what a table is about; so
may the seed, but then rows are not paired. Nothing here imports torch.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from deme_cli import __version__
from deme_cli.config import EvalConfig, SampleConfig, Settings
from deme_cli.errors import ConfigError
from deme_cli.run_file import AnySettings, RunFile

Card = Mapping[str, Any]
LIBRARIES = ("torch", "diffusers", "clean-fid", "open-clip-torch")
# Fields that say who drew, from which noise, how many in all, and from where files were read.
WHO_AND_WHENCE = frozenset((
    "model", "source", "fingerprints", "ranges", "num_train_timesteps", "prediction_type",
    "seed", "seeds", "num", "companions", "pipeline", "images", "protocol", "prompts",
))  # fmt: skip
_HOW = ("sampler", "steps", "spacing", "dtype", "seed")  # without which a card tells too little
_SHOWN = 40  # characters of a value in a message


@dataclass(frozen=True)
class Protocol:
    """Settings that belong together. source: whose they are.   open: what that leaves open.

    reference: the images that the user has to give with --fid; None where there are none to give.
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


# Inception as pytorch-fid runs it, which clean-fid's mode of this name is nearest to.
_PYTORCH_FID = {"features": "inception", "resize": "legacy_pytorch"}
_CLIP_SCORE = {
    "clip_score": True, "clip_model": "ViT-g-14", "clip_weights": "laion2b_s34b_b88k",
}  # fmt: skip
_STABLE_DIFFUSION = {
    "sampler": "pndm", "steps": 25, "guidance": 7.5, "resolution": 512, "resize": 256,
    "per_prompt": 1, "seed": 1234,
}  # fmt: skip
_DDIM = {"sampler": "ddim", "eta": 0.0, "num": 50_000}

_PROTOCOLS = (
    Protocol(
        "ddim-cifar10",
        "DeMe, Table 3 and section 4.1: DDIM with 100 steps, 50,000 images, FID against the 50,000 "
        "training images of CIFAR-10",
        "the spacing of the timesteps (here the checkpoint's own) and the seeds",
        {**_DDIM, "steps": 100},
        {"fid": "cifar10", **_PYTORCH_FID},
    ),
    Protocol(
        "lsun-church-50k",
        "DeMe's released recipe for LSUN-Church: DDIM with 50 steps, eta 0, 50,000 images, FID of "
        "pytorch-fid against the real images",
        "which real images (here the 50,000 whose statistics clean-fid publishes) and the seeds",
        {**_DDIM, "steps": 50},
        {"fid": "lsun-church", **_PYTORCH_FID},
    ),
    Protocol(
        "lsun-bedroom-50k",
        "DeMe, section 4.1: 50,000 images; drawn as in its released recipe for LSUN-Church, DDIM "
        "with 50 steps, eta 0",
        "the recipe for bedrooms, which was not released, its real images and the seeds",
        {**_DDIM, "steps": 50},
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
    fixed = dict(protocol.sample)
    if config is EvalConfig:  # the number of images and the seed are settings of both
        fixed = {name: value for name, value in fixed.items() if name in ("num", "seed")}
        fixed |= protocol.evaluation
    for item in fields(config):
        value, given = fixed.get(item.name), options.get(item.name)
        if item.name in fixed and given is not None and given != value:
            flag = (item.metadata["flags"] or f"--{item.name.replace('_', '-')}").split()[-1]
            raise ConfigError(
                f"{flag} {_shown(given)}: the protocol {protocol.name} has {_shown(value)}; leave "
                f"{flag} out, or measure without --protocol"
            )
    return {**options, **fixed}


def settings_under_protocol(
    run: RunFile, evaluation: Mapping[str, Any], sampling: Mapping[str, Any]
) -> tuple[EvalConfig, SampleConfig]:
    """The settings that options (None if not given) make of those of `run` and of its protocol.

    Raises ConfigError for an option that says something else than the protocol.
    """
    named = find_protocol(run.settings(EvalConfig, protocol=evaluation["protocol"]).protocol)
    settings = run.settings(EvalConfig, **apply_protocol(named, EvalConfig, evaluation))
    counts = {"num": settings.num, "seed": settings.seed}
    given = apply_protocol(named, SampleConfig, {**sampling, **counts})
    return settings, run.settings(SampleConfig, **given)


def under_protocol(protocol: Protocol | None, settings: AnySettings, run: RunFile) -> AnySettings:
    """The settings with what the protocol fixes. Raises ConfigError where they say otherwise, and
    neither the run's file nor the defaults do."""
    kind, own = type(settings), asdict(run.settings(type(settings)))
    usual = asdict(kind())
    given = {n: v for n, v in asdict(settings).items() if v != usual[n] and v != own[n]}
    return replace(settings, **apply_protocol(protocol, kind, given))


def require_reference(protocol: Protocol | None, fid: str | None) -> None:
    """Check that the images are given that a protocol leaves to the user. Raises ConfigError."""
    if protocol is not None and protocol.reference and not fid:
        raise ConfigError(
            f"the protocol {protocol.name} measures against {protocol.reference}: give that folder "
            f"with --fid FOLDER, or its statistics: deme stats FOLDER --resize legacy_pytorch "
            f"-o reference.safetensors"
        )


def evaluation_card(
    card: Card, measured: Card, protocol: Protocol | None, *, seeds: list[int]
) -> dict[str, Any]:
    """The card of one row, from that of its images and of what measured them.

    seeds: one per repeat, none of finished images, which a named protocol may not have drawn.
    """
    if not seeds and protocol is not None and not protocol.drew(card):
        protocol = None
    drawn = {**card, "seeds": seeds} if seeds else card
    versions = {"deme": __version__, **{name: library_version(name) for name in LIBRARIES}}
    named = {"protocol": protocol.name if protocol else None}
    return {**drawn, **named, **measured, "versions": versions}


def library_version(name: str) -> str | None:
    """The installed version of a distribution, None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def require_one_protocol(
    cards: Mapping[str, Card], counts: Mapping[str, int], *, mixed: bool
) -> list[str]:
    """What a reader should know of rows that differ, by their cards and their numbers of images.

    Raises ConfigError, unless `mixed`, naming the first two rows that differ and every field.
    """
    first, *others = cards
    remarks = []
    for name in others:
        found = compare(cards[first], cards[name], counts[first], counts[name])
        if found is None:
            what = "nobody noted how the images of one of them were drawn: it has no protocol card"
        else:
            what = "; ".join(f"{field} {_shown(a)} and {_shown(b)}" for field, a, b in found)
        if what:
            remarks.append(f"{first} and {name} are of different protocols: {what}")
    if remarks and not mixed:
        raise ConfigError(f"{remarks[0]}; measure them in separate runs, or add --mixed")
    seeds = {name: card.get("seed") for name, card in cards.items() if is_known(card)}
    if len(set(seeds.values())) > 1:
        listed = ", ".join(f"{name} {seed}" for name, seed in seeds.items())
        remarks.append(
            f"seeds differ ({listed}): these rows do not share their noise and are not paired"
        )
    return remarks


def compare(
    card: Card, other: Card, count: int, other_count: int
) -> list[tuple[str, Any, Any]] | None:
    """(field, value, other value) of all that differs; None where one of the two has no card."""
    if is_known(card) != is_known(other):
        return None
    fields = [field for field in dict.fromkeys([*card, *other]) if field not in WHO_AND_WHENCE]
    pairs = [("n", count, other_count), *((f, card.get(f), other.get(f)) for f in fields)]
    return [pair for pair in pairs if pair[1] != pair[2]]


def is_known(card: Card) -> bool:
    """Whether a card tells how images were drawn."""
    return all(name in card for name in _HOW)


def describe_cards(cards: Mapping[str, Card]) -> list[str]:
    """Lines for the terminal: what all rows share once, then what tells them apart."""
    lines, card = [], next(iter(cards.values()))
    if "features" in card:
        remark = " (NOT the published weights)" if card["weights_published"] is False else ""
        lines.append(
            f"features {card['features']}, resize {card['resize']}, "
            f"weights sha256 {card['weights_sha256'][:12]}{remark}"
        )
    for metric, reference in card.get("references", {}).items():
        count = f"{reference['n']} images" if reference["n"] else "images not counted"
        parts = dict.fromkeys((reference["source"], reference["file"], reference["split"], count))
        k = f", {card['neighbours']} neighbours" if metric.startswith("prc") else ""
        lines.append(f"{metric} against {', '.join(filter(None, parts))}{k}")
    if clip := card.get("clip_score"):
        model = f"{clip['model']}, {clip['weights']}"
        lines.append(f"clip_score by {model}, sha256 {clip['sha256'][:12]}")
    groups: dict[str, list[str]] = {}
    for name, own in cards.items():
        groups.setdefault(_drawn(own), []).append(name)
    return lines + [f"{', '.join(names)}: {text}" for text, names in groups.items()]


def _drawn(card: Card) -> str:
    if not is_known(card):
        return "finished images of unknown protocol"
    seeds = card.get("seeds") or [card["seed"]]
    span = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    eta = f", eta {card['eta']:g}" if card.get("eta") else ""
    spacing = f", {card['spacing']} spacing" if card["spacing"] else ""
    guidance = f", guidance {card['guidance']:g}" if card.get("guidance") else ""
    drawn = f"{card['sampler']} {card['steps']} steps{spacing}{eta}{guidance}"
    return f"{drawn}, {card['dtype']}, {span}"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    text = "none" if value is None else str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."

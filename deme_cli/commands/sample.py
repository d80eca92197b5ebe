"""`deme sample` and `deme ensemble-sample`: draw images of one model, or of experts in turn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import deme_cli
from deme_cli import console
from deme_cli.commands.options import Given, OptionsOf, argument, command, flag, option
from deme_cli.config import EvalConfig, SampleConfig
from deme_cli.errors import ConfigError
from deme_cli.evaluation.protocols import apply_protocol, find_protocol
from deme_cli.run_file import RunFile
from deme_cli.sampling.sample import ENSEMBLE_NAME

_COMMON = "pipeline config device dtype compile force dry_run"
_OUTPUT = "A .safetensors artifact, or a folder for PNG files"
Prompt = Annotated[str | None, flag("--prompt", "One prompt for all images.", "What is shown")]
Protocol = Annotated[str | None, option(EvalConfig, "protocol")]


@command(_COMMON, meets=True)
def sample(
    model: Annotated[str, argument(
        "MODEL", "An artifact, a diffusers folder, a hub id, or digits."
    )],
    given: Annotated[Given, OptionsOf(SampleConfig)],
    common: Given,
    prompt: Prompt = None,
    protocol: Protocol = None,
    output: Annotated[
        Path | None, flag("--output -o", f"{_OUTPUT} [default: {{model}}-samples.safetensors].")
    ] = None,
    as_json: bool = False,
) -> None:  # fmt: skip
    """Draw images from one model; run the same command again to continue.

    A preview lies beside them. Image i depends on the seed, i and its prompt or
    class alone. Processes of one launch (torchrun, accelerate launch, srun)
    share the batches.

    Example: deme sample merged.safetensors -n 64
    """
    settings = _settings(common["run"], given, prompt=prompt, protocol=protocol)
    with console.showing() as progress:
        images = deme_cli.sample(model, settings, output=output, progress=progress, **common)
    _tell(images, dry_run=common["dry_run"], as_json=as_json)


@command(_COMMON, meets=True)
def ensemble_sample(
    experts: Annotated[list[Path], argument(
        "EXPERT...", "Experts of one base whose ranges cover all timesteps."
    )],
    given: Annotated[Given, OptionsOf(SampleConfig)],
    common: Given,
    prompt: Prompt = None,
    protocol: Protocol = None,
    output: Annotated[Path, flag("--output -o", f"{_OUTPUT}.")] = Path(ENSEMBLE_NAME),
    as_json: bool = False,
) -> None:  # fmt: skip
    """Draw images from an ensemble of experts (Eq. 7); run the same command again to continue.

    Timestep t goes to the expert whose range holds it. It costs what one model
    costs. Processes of one launch (torchrun, accelerate launch, srun) share the
    batches.

    Example: deme ensemble-sample ft_*.safetensors -n 64
    """
    settings = _settings(common["run"], given, prompt=prompt, protocol=protocol)
    with console.showing() as progress:
        images = deme_cli.ensemble_sample(
            experts, settings, output=output, progress=progress, **common
        )
    _tell(images, dry_run=common["dry_run"], as_json=as_json)


def _settings(
    run: RunFile, given: Given, *, prompt: str | None, protocol: str | None
) -> SampleConfig:
    """The settings of [sample] with options and a named protocol.

    prompt: one prompt for all images, in place of a set of them.
    """
    from deme_cli.data.prompts import TEXT

    if prompt is not None:
        if given.get("prompts") is not None:
            raise ConfigError(
                "--prompt is one prompt, --prompts a set of them; give one of the two"
            )
        given = {**given, "prompts": f"{TEXT}{prompt}"}
    fixed = apply_protocol(find_protocol(protocol), SampleConfig, given)
    settings = run.settings(SampleConfig, **fixed)
    if prompt is not None and given.get("prompt_column") is None:
        settings = replace(settings, prompt_column=None)  # that of the set in deme.toml
    return settings


def _tell(images: deme_cli.Images, *, dry_run: bool, as_json: bool) -> None:
    """What was drawn, or what would be."""
    card, (height, width, channels) = images.protocol, images.shape
    if not dry_run:
        console.result_paths(
            [images.path, images.preview], as_json=as_json, num=images.num, kept=images.num_kept,
            seconds=images.seconds, protocol=card,
        )  # fmt: skip
        return
    how = [f"{card['sampler']}, {card['steps']} steps"]
    how += [f"{card['spacing']} spacing"] if card["spacing"] else []
    how += [f"prompts of {card['prompts']['source']}"] if card["prompts"] else []
    how += [f"classes {card['classes']}"] if card["classes"] else []
    how += [f"guidance {card['guidance']:g}"] if card["guidance"] is not None else []
    console.note(
        f"would draw {card['num']} images ({height} x {width}, {channels} channels) to "
        f"{images.path}: {card['model']} {' '.join(mark[:12] for mark in card['fingerprints'])}, "
        f"{', '.join(how)}, seed {card['seed']}"
    )
    if as_json:
        console.result_json({"dry_run": True, "paths": [str(images.path)], "protocol": card})

"""`deme sample`: draw images from one model, and what it shares with `deme ensemble-sample`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deme_cli import console
from deme_cli.commands.fetching import fetch
from deme_cli.commands.launching import meet
from deme_cli.commands.options import (
    Compile,
    ConfigPath,
    Device,
    DryRun,
    Dtype,
    Force,
    Json,
    Pipeline,
    Quiet,
    begin,
    option,
)
from deme_cli.config import EvalConfig, SampleConfig
from deme_cli.errors import ConfigError, writing
from deme_cli.outputs import require_output
from deme_cli.processes import World
from deme_cli.run_file import RunFile

if TYPE_CHECKING:
    from deme_cli.records import DenoiserRecord
    from deme_cli.sampling.sampler import SamplingExpert

_C, _SHOWN, _SIZE = SampleConfig, "What is shown", "Size"
Num = Annotated[int | None, option(_C, "num", "-n", "--num")]
Sampler = Annotated[str | None, option(_C, "sampler", "--sampler")]
Steps = Annotated[int | None, option(_C, "steps", "--steps")]
Eta = Annotated[float | None, option(_C, "eta", "--eta")]
Spacing = Annotated[str | None, option(_C, "spacing", "--spacing")]
Guidance = Annotated[float | None, option(_C, "guidance", "--guidance")]
BatchSize = Annotated[int | None, option(_C, "batch_size", "--batch-size", "-b")]
Seed = Annotated[int | None, option(_C, "seed", "--seed")]
Prompts = Annotated[str | None, option(_C, "prompts", "--prompts", panel=_SHOWN)]
Prompt = Annotated[
    str | None,
    typer.Option("--prompt", help="One prompt for all images.", rich_help_panel=_SHOWN,
                 show_default=False),
]  # fmt: skip
PromptColumn = Annotated[str | None, option(_C, "prompt_column", "--prompt-column", panel=_SHOWN)]
PerPrompt = Annotated[int | None, option(_C, "per_prompt", "--per-prompt", panel=_SHOWN)]
Classes = Annotated[str | None, option(_C, "classes", "--classes", panel=_SHOWN)]
Resolution = Annotated[int | None, option(_C, "resolution", "--resolution", panel=_SIZE)]
ResizeTo = Annotated[int | None, option(_C, "resize", "--resize-to", panel=_SIZE)]
Protocol = Annotated[str | None, option(EvalConfig, "protocol", "--protocol")]
OUTPUT_HELP = "A .safetensors artifact, or a folder for PNG files"


@dataclass(frozen=True)
class Request:
    """What a command is to draw of `models`, where the images go, and how it speaks."""

    models: Sequence[str]
    config: SampleConfig
    pipeline: str | None
    output: Path
    device: str
    dtype: str
    compile: str
    force: bool
    dry_run: bool
    as_json: bool

    def check(self, world: World) -> None:
        """What can be told before anything heavy is loaded; fetches prompts that are not here.

        The first process of `world` goes first, and it alone looks at the output.
        """
        told = {"models": list(self.models), "output": str(self.output), "dtype": self.dtype}
        world.require_same({**told, **asdict(self.config)})
        with world.first_before_others():
            if world.is_first:
                self._check_output()
            if self.config.prompts:
                from deme_cli.data.prompts import prompt_assets

                fetch(prompt_assets(self.config.prompts))

    def _check_output(self) -> None:
        with writing(self.output):
            to_artifact = self.output.suffix == ".safetensors" and not self.output.is_dir()
        if to_artifact:
            require_output(self.output, force=self.force)


def sample_config(
    run: RunFile, options: Mapping[str, Any], *, prompt: str | None, protocol: str | None
) -> SampleConfig:
    """The settings of [sample] that the options (None if not given) and a protocol make."""
    from deme_cli.data.prompts import TEXT
    from deme_cli.evaluation.protocols import apply_protocol, find_protocol

    options = dict(options)
    if prompt is not None:
        if options.get("prompts") is not None:
            raise ConfigError(
                "--prompt is one prompt, --prompts a set of them; give one of the two"
            )
        options["prompts"] = f"{TEXT}{prompt}"
    named = find_protocol(protocol)
    config = run.settings(_C, **apply_protocol(named, _C, options))
    if config.prompts and options.get("prompts") is None:
        config = replace(config, prompts=run.seen(config.prompts))
    if prompt is not None and options.get("prompt_column") is None:
        config = replace(config, prompt_column=None)  # that of the set in deme.toml
    return config


def sample(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="An artifact, a diffusers folder, a hub id, or digits.",
            show_default=False,
        ),
    ],
    num: Num = None,
    prompts: Prompts = None,
    prompt: Prompt = None,
    prompt_column: PromptColumn = None,
    per_prompt: PerPrompt = None,
    classes: Classes = None,
    guidance: Guidance = None,
    sampler: Sampler = None,
    steps: Steps = None,
    eta: Eta = None,
    spacing: Spacing = None,
    resolution: Resolution = None,
    resize_to: ResizeTo = None,
    protocol: Protocol = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help=rf"{OUTPUT_HELP} \[default: {{model}}-samples.safetensors]."
        ),
    ] = None,
    pipeline: Pipeline = None,
    config: ConfigPath = None,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    compile: Compile = "auto",
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw images from one model; run the same command again to continue.

    A preview lies beside them. Image i depends on the seed, i and its prompt or class alone.
    Processes of one launch (torchrun, accelerate launch, srun) share the batches.

    Example: deme sample merged.safetensors -n 64
    """
    console.set_quiet(quiet)
    world = meet(device)
    run = begin(config, quiet=quiet)
    options = {
        "num": num, "prompts": prompts, "prompt_column": prompt_column, "per_prompt": per_prompt,
        "classes": classes, "guidance": guidance, "sampler": sampler, "steps": steps, "eta": eta,
        "spacing": spacing, "resolution": resolution, "resize": resize_to,
        "batch_size": batch_size, "seed": seed,
    }  # fmt: skip
    settings = sample_config(run, options, prompt=prompt, protocol=protocol)
    request = Request(
        [model], settings, run.pipeline(pipeline), output or _default_output(model),
        world.device or device, dtype, compile, force, dry_run, as_json,
    )  # fmt: skip
    request.check(world)

    from deme_cli.sampling.single import open_single

    experts, record = open_single(model, device=request.device, dtype=dtype)
    _warn_of_lone_expert(model, record)
    draw(experts, [record], request, world)


def _default_output(model: str) -> Path:
    name = Path(model).expanduser().resolve().name.removesuffix(".safetensors")
    return Path(f"{name}-samples.safetensors")


def _warn_of_lone_expert(model: str, record: Any) -> None:
    from deme_cli.records import ExpertRecord

    if isinstance(record, ExpertRecord) and len(record.timesteps) < record.num_train_timesteps:
        console.warn(
            f"{model} is the expert of timesteps {record.timesteps} and will denoise all "
            f"{record.num_train_timesteps}; deme ensemble-sample takes each expert for its own"
        )


def draw(
    experts: Sequence[SamplingExpert],
    records: Sequence[DenoiserRecord],
    request: Request,
    world: World,
    *,
    hold_one: bool = False,
) -> None:
    """Draw what was asked, with the other processes of `world`; a bar, and the paths."""
    from deme_cli.sampling.draw import Drawn, draw_samples
    from deme_cli.sampling.protocol import protocol_card
    from deme_cli.sampling.scene import open_scene
    from deme_cli.sampling.store import Order

    config, device, dtype = request.config, request.device, request.dtype
    scene = open_scene(records, config, pipeline=request.pipeline, device=device, dtype=dtype)
    card = protocol_card(records, config, scene=scene, dtype=dtype)
    channels, height, width = scene.image_shape
    order = Order(
        request.output, card, (height, width, channels), config.batch_size,
        force=request.force, prompts=scene.prompts, classes=scene.classes,
    )  # fmt: skip
    if request.dry_run:
        _say_what_would_run(order.path, order.shape, card, as_json=request.as_json)
        return
    began, drawn = time.monotonic(), None
    with console.progress("sampling", order.num, "image") as bar:
        for record in draw_samples(
            experts, config, order, scene=scene, hold_one=hold_one, compile=request.compile,
            world=world,
        ):  # fmt: skip
            if isinstance(record, Drawn):
                drawn = record
            else:
                bar.advance(record.done * order.num // record.total)
    world.wait()  # nobody ends well before the images are there
    if drawn is None:
        return
    seconds = time.monotonic() - began
    console.result_paths(
        [drawn.images, drawn.preview],
        as_json=request.as_json,
        num=order.num,
        kept=drawn.num_kept,
        seconds=round(seconds, 3),
        protocol=card,
    )


def _say_what_would_run(
    path: Path, shape: tuple[int, int, int], card: dict[str, Any], *, as_json: bool
) -> None:
    height, width, channels = shape
    told = [f"{card['sampler']}, {card['steps']} steps"]
    told += [f"{card['spacing']} spacing"] if card["spacing"] else []
    told += [f"prompts of {card['prompts']['source']}"] if card["prompts"] else []
    told += [f"classes {card['classes']}"] if card["classes"] else []
    told += [f"guidance {card['guidance']:g}"] if card["guidance"] is not None else []
    console.note(
        f"would draw {card['num']} images ({height} x {width}, {channels} channels) to {path}: "
        f"{card['model']} {' '.join(mark[:12] for mark in card['fingerprints'])}, "
        f"{', '.join(told)}, seed {card['seed']}"
    )
    if as_json:
        console.result_json({"dry_run": True, "paths": [str(path)], "protocol": card})

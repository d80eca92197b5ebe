"""`sample` and `ensemble_sample`: images of one model, or of experts that take turns (Eq. 7)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_cli import console
from deme_cli.api.fetching import fetch
from deme_cli.config import SampleConfig
from deme_cli.distributed import ALONE, World
from deme_cli.errors import ConfigError, writing
from deme_cli.files import require_output
from deme_cli.run_file import RunFile

if TYPE_CHECKING:
    from deme_cli.artifacts import DenoiserRecord
    from deme_cli.sampling.conditioning import Conditioning
    from deme_cli.sampling.ensemble import SamplingExpert
    from deme_cli.sampling.store import Order

ENSEMBLE_NAME = "ensemble.safetensors"


@dataclass(frozen=True)
class Images:
    """Images that were drawn: where they lie, and the protocol they were drawn under.

    num_kept: how many of `num` an earlier, stopped run had left.
    """

    path: Path
    preview: Path
    num: int
    num_kept: int
    seconds: float
    protocol: dict[str, Any]


def sample(
    model: str | Path,
    settings: SampleConfig | None = None,
    *,
    output: Path | None = None,
    run: RunFile | None = None,
    pipeline: str | None = None,
    device: str = "auto",
    dtype: str = "fp32",
    compile: str = "auto",
    force: bool = False,
) -> Images:
    """Draw images from one model; a stopped run goes on when the same is asked again.

    model: an artifact, a diffusers folder, a hub id, or digits.   settings: those of `run` if None.
    output: a .safetensors artifact or a folder for PNG files; None for a name made from the
    model's. Image i depends on the seed, i and its prompt or class alone.

    Raises ConfigError, MissingError or ArtifactError before anything is drawn, Stopped after a
    signal, NumericsError where the model makes images that are not finite.
    """
    run = run or RunFile()
    job = DrawingJob(
        [str(model)], _seen_from(run, settings), output or default_output(str(model)),
        run.pipeline(pipeline), device, dtype, compile, force,
    )  # fmt: skip
    return _here(job.run())


def ensemble_sample(
    experts: Sequence[Path],
    settings: SampleConfig | None = None,
    *,
    output: Path = Path(ENSEMBLE_NAME),
    run: RunFile | None = None,
    hold_one: bool = False,
    pipeline: str | None = None,
    device: str = "auto",
    dtype: str = "fp32",
    compile: str = "auto",
    force: bool = False,
) -> Images:
    """Draw images with each expert denoising the timesteps of its own range (Eq. 7).

    experts: of one base, their ranges covering all timesteps.   hold_one: keep one of them in
    memory at a time. The rest is as for `sample`.
    """
    run = run or RunFile()
    job = DrawingJob(
        [str(path) for path in experts], _seen_from(run, settings), output,
        run.pipeline(pipeline), device, dtype, compile, force, is_ensemble=True, hold_one=hold_one,
    )  # fmt: skip
    return _here(job.run())


def _seen_from(run: RunFile, settings: SampleConfig | None) -> SampleConfig:
    """The settings, those of `run` if None; prompts that are not here lie beside its file."""
    settings = settings or run.settings(SampleConfig)
    return replace(settings, prompts=settings.prompts and run.seen(settings.prompts))


def _here(images: Images | None) -> Images:
    assert images is not None, "a process that is alone is the first"
    return images


def default_output(model: str) -> Path:
    """Where images of a model go if nobody says: {model}-samples.safetensors, here."""
    name = Path(model).expanduser().resolve().name.removesuffix(".safetensors")
    return Path(f"{name}-samples.safetensors")


def sample_settings(
    run: RunFile, options: Mapping[str, Any], *, prompt: str | None, protocol: str | None
) -> SampleConfig:
    """The settings of [sample] that options (None if not given) and a named protocol make.

    prompt: one prompt for all images, in place of a set of them.
    """
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
    config = _seen_from(
        run, run.settings(SampleConfig, **apply_protocol(named, SampleConfig, options))
    )
    if prompt is not None and options.get("prompt_column") is None:
        config = replace(config, prompt_column=None)  # that of the set in deme.toml
    return config


@dataclass(frozen=True)
class DrawingJob:
    """What is drawn of `models`, by which processes, and where the images go."""

    models: Sequence[str]
    config: SampleConfig
    output: Path
    pipeline: str | None
    device: str
    dtype: str
    compile: str
    force: bool
    is_ensemble: bool = False
    hold_one: bool = False  # of an ensemble, in memory
    world: World = ALONE

    def run(self) -> Images | None:
        """Draw, with a bar; None in the other processes of a launch."""
        self._check()
        with console.waiting("loading the libraries and the model"):
            from deme_cli.sampling.draw import Drawn, draw_samples

            experts, conditioning, order = self._open()
        began, drawn = time.monotonic(), None
        with console.progress("sampling", order.num, "image") as bar:
            for record in draw_samples(
                experts, self.config, order, conditioning=conditioning, hold_one=self.hold_one,
                compile=self.compile, world=self.world,
            ):  # fmt: skip
                if isinstance(record, Drawn):
                    drawn = record
                else:
                    bar.advance(record.done * order.num // record.total)
        self.world.wait()  # nobody ends well before the images are there
        if drawn is None:
            return None
        return Images(
            drawn.images, drawn.preview, order.num, drawn.num_kept,
            seconds=round(time.monotonic() - began, 3), protocol=dict(order.card),
        )  # fmt: skip

    def say_what_would_run(self) -> dict[str, Any]:
        """One line about what `run` would draw, after all its checks; returns the protocol."""
        self._check()
        _, _, order = self._open()
        card, (height, width, channels) = dict(order.card), order.shape
        told = [f"{card['sampler']}, {card['steps']} steps"]
        told += [f"{card['spacing']} spacing"] if card["spacing"] else []
        told += [f"prompts of {card['prompts']['source']}"] if card["prompts"] else []
        told += [f"classes {card['classes']}"] if card["classes"] else []
        told += [f"guidance {card['guidance']:g}"] if card["guidance"] is not None else []
        console.note(
            f"would draw {card['num']} images ({height} x {width}, {channels} channels) to "
            f"{order.path}: {card['model']} "
            f"{' '.join(mark[:12] for mark in card['fingerprints'])}, {', '.join(told)}, "
            f"seed {card['seed']}"
        )
        return card

    def _open(self) -> tuple[Sequence[SamplingExpert], Conditioning, Order]:
        """The networks, what goes into them besides noise, and the files to be."""
        from deme_cli.sampling.conditioning import open_conditioning, protocol_card
        from deme_cli.sampling.store import Order

        experts, records = self._open_ensemble() if self.is_ensemble else self._open_single()
        config, dtype = self.config, self.dtype
        conditioning = open_conditioning(
            records[0], config, pipeline=self.pipeline, device=self.device, dtype=dtype
        )
        card = protocol_card(records, config, conditioning=conditioning, dtype=dtype)
        channels, height, width = conditioning.image_shape
        order = Order(
            self.output, card, (height, width, channels), config.batch_size, force=self.force,
            prompts=conditioning.prompts, classes=conditioning.classes,
        )  # fmt: skip
        return experts, conditioning, order

    def _check(self) -> None:
        """What can be told before anything heavy is loaded; fetches prompts that are not here.

        The first process of a launch goes first, and it alone looks at the output.
        """
        world = self.world
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

    def _open_single(self) -> tuple[Sequence[SamplingExpert], list[DenoiserRecord]]:
        from deme_cli.artifacts import ExpertRecord
        from deme_cli.sampling.ensemble import open_single

        (model,) = self.models
        experts, record = open_single(
            model, pipeline=self.pipeline, device=self.device, dtype=self.dtype
        )
        if isinstance(record, ExpertRecord) and len(record.timesteps) < record.num_train_timesteps:
            console.warn(
                f"{model} is the expert of timesteps {record.timesteps} and will denoise all "
                f"{record.num_train_timesteps}; deme ensemble-sample takes each expert for its own"
            )
        return experts, [record]

    def _open_ensemble(self) -> tuple[Sequence[SamplingExpert], list[DenoiserRecord]]:
        from deme_cli.sampling.ensemble import open_ensemble, read_ensemble

        paths = [Path(model) for model in self.models]
        records: list[DenoiserRecord] = [member.record for member in read_ensemble(paths)]
        return open_ensemble(paths, device=self.device, dtype=self.dtype), records

"""A training run before it begins: which range, which output, what is already done, what it needs.

A `Plan` is checked from headers and file names before torch is imported; `prepare` opens the images
and loads the weights, and gives the `Run`: everything it needs, and what makes it the same run.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme_cli.artifacts import BaseRecord, DenoiserRecord, fingerprint, read_record
from deme_cli.config import AFFINITY_NAME, NOT_RESULT, DataConfig, FinetuneConfig, SplitConfig
from deme_cli.errors import ConfigError, MissingError, nearest, reading
from deme_cli.fetch import require_peft
from deme_cli.files import cast_specs, read_header, require_output, require_space
from deme_cli.timesteps import RangeChoice, TimestepRange, parse_range
from deme_cli.training.trackers import require_tracker

if TYPE_CHECKING:
    from deme_cli.diffusion.denoiser import Denoiser
    from deme_cli.training.clusters import Affinity
    from deme_cli.training.examples import Examples

_FILES_BESIDE = 5  # of the base's size: a checkpoint (weights, average, two moments), the expert
_CLASSES = {"model": "UNet2DModel", "scheduler": "DDPMScheduler"}  # where a description names none


def checkpoint_path(output: Path) -> Path:
    """The state from which the run that writes `output` continues; hidden, so globs pass it by."""
    return output.parent / f".{output.stem}.checkpoint"


def metrics_path(output: Path) -> Path:
    """The curve of the run that writes `output`: one JSON record a line."""
    return output.with_name(f"{output.stem}.metrics.jsonl")


def affinity_path(base: Path) -> Path:
    """Where the gradients of `base` are looked for, by which its timesteps may be clustered."""
    return base.with_name(AFFINITY_NAME)


def variant_path(output: Path, *, step: int | None = None, length: float | None = None) -> Path:
    """The result after `step` updates (the last if None), under an EMA of `length` (or the usual).

    In a folder beside the output, so that `ft_*.safetensors` names the experts alone:
    `ft_2of4.snapshots/step-000400.ema-0.050.safetensors`; the usual one at the end is the output.
    """
    words = [] if step is None else [f"step-{step:06d}"]
    if length is not None:
        short = f"{length:.3f}"
        words.append(f"ema-{short if float(short) == length else length}")
    if not words:
        return output
    return output.with_name(f"{output.stem}.snapshots") / f"{'.'.join(words)}{output.suffix}"


def snapshot_steps(config: FinetuneConfig) -> range:
    """The updates after which a snapshot is made; not the last one, which makes the result."""
    every = config.snapshot_every
    return range(every, config.steps, every) if every else range(0)


def variant_paths(output: Path, config: FinetuneConfig) -> list[Path]:
    """Every file that a run writes besides `output`."""
    ends = product((*snapshot_steps(config), None), (None, *(config.ema_lengths or [])))
    paths = [variant_path(output, step=step, length=length) for step, length in ends]
    return [path for path in paths if path != output]


@dataclass(frozen=True)
class Plan:
    """One run to come: what is asked for, its range and its output.

    A base from scratch has no range, but a `description` of its network and schedule.
    """

    base: Path
    images: DataConfig
    config: FinetuneConfig
    output: Path = Path()
    choice: RangeChoice | None = None
    description: Mapping[str, Any] = field(default_factory=dict)
    device: str = "auto"
    dtype: str = "fp32"
    compile: str = "auto"
    shard: bool = False
    save_dtype: str | None = None
    pipeline: str | None = None
    force: bool = False
    is_done: bool = False

    def __post_init__(self) -> None:
        cast_specs((), self.save_dtype)  # known now, not when the weights are written

    @property
    def range_text(self) -> str:
        """The range as --range takes it."""
        assert self.choice is not None
        index, of = self.choice.index, self.choice.of
        return f"{index}/{of}" if of else str(self.choice.range)

    @property
    def outputs(self) -> list[Path]:
        """Every file the run writes, its main one first; of a finished run those still there."""
        paths = [self.output, *variant_paths(self.output, self.config)]
        return list(filter(Path.exists, paths)) if self.is_done else paths

    @property
    def has_companions(self) -> bool:
        """Whether the base has frozen parts around it."""
        return self.choice is not None and bool(read_record(self.base, "base").companions)

    def describe(self, image_shape: Sequence[int] = ()) -> str:
        """One line that says what runs; image_shape: (C, H, W), where it is known."""
        config = self.config
        span = f"timesteps {self.choice.range}" if self.choice else "all timesteps, from scratch"
        images = f"{config.steps * config.batch_size * config.accumulation} images"
        if image_shape:
            images += f" of {image_shape[1]} x {image_shape[2]} pixels"
        num_more = len(variant_paths(self.output, config))
        more = f", {num_more} more files" if num_more else ""
        state = "; done" if self.is_done else ""
        return f"{self.output}: {span}, {config.steps} updates, {images}{more}{state}"


@dataclass(frozen=True)
class Run:
    """What is trained, on what, how, and where it ends.

    `clusters` are the draws whose losses are balanced against each other, if any. `shard`: divide
    the networks among the processes, which uses up the denoiser's. Like `compile` and the device it
    is no part of what makes a run the same. With `from_scratch` the denoiser's random weights are
    trained into a base; its config then asks for no consistency and no projection.
    """

    denoiser: Denoiser
    choice: RangeChoice
    examples: Examples
    held_out: Examples | None
    flip: bool
    config: FinetuneConfig
    output: Path
    dtype: str = "fp32"
    from_scratch: bool = False
    clusters: Sequence[TimestepRange] = ()
    compile: str = "off"
    shard: bool = False
    save_dtype: str | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the result: a kept run continues only if all of it agrees."""
        return {
            "range": str(self.choice.range),
            "cluster_ranges": list(map(str, self.clusters)),
            "base": self.denoiser.record.fingerprint,
            "data": self.examples.fingerprint,
            "resolution": list(self.examples.image_shape[1:]),
            "crop": self.examples.crop,
            "companions": self.denoiser.record.companions,
            "flip": self.flip,
            "dtype": self.dtype,
            **_results_of(self.config),
        }


def _results_of(config: FinetuneConfig) -> dict[str, Any]:
    """The settings that decide the result."""
    return {name: value for name, value in asdict(config).items() if name not in NOT_RESULT}


def plan_experts(
    plan: Plan, split: SplitConfig, range_text: str, output: Path | None
) -> list[Plan]:
    """`plan` for each range that `range_text` names (i/N, start:stop, or all of `split`).

    With `all`, experts that exist with these settings are marked done. Raises ConfigError,
    MissingError or ArtifactError on a range, base or output that cannot be used.
    """
    if not plan.base.exists():
        raise MissingError(f"{plan.base}: no base there; make one with `deme split`, or use --base")
    record, texts = read_record(plan.base, "base"), [range_text]
    if range_text == "all":
        if output is not None:
            raise ConfigError("--output names one file, but --range all writes one for each range")
        num_ranges = len(split.timestep_ranges) or split.n
        texts = [f"{index}/{num_ranges}" for index in range(1, num_ranges + 1)]
    plans, config = [], plan.config
    if config.lora:
        require_peft()
        config = replace(config, projection="none")  # which is folded into weights that stay
        plan = replace(plan, config=config)
    for text in texts:
        choice = parse_range(text, record.num_train_timesteps, split.timestep_ranges)
        path, span = output or Path(f"ft_{choice.label}.safetensors"), choice.range
        is_done = range_text == "all" and not plan.force and path.exists()
        plans.append(one := replace(plan, output=path, choice=choice, is_done=is_done))
        if is_done:
            _require_same_settings(one, record)
            continue
        if config.multitask != "none" and config.p > 0 and len(span) < record.num_train_timesteps:
            raise ConfigError(
                f"multitask = {config.multitask!r} divides range {span} into clusters, and "
                f"p = {config.p} draws outside them; use --p 0 or --range 1/1"
            )
        _read_affinity(plan, record)
        _require_free(one)
    if not all(one.is_done for one in plans):
        require_companions(record, plan.pipeline)
    return plans


def plan_base(plan: Plan, description: Path, output: Path) -> Plan:
    """`plan` for a base of the [model] and [scheduler] in a TOML or JSON file."""
    if plan.config.lora:
        raise ConfigError("--lora trains adapters of a base, and --from-scratch has none; choose")
    config = replace(plan.config, p=0.0, consistency=0.0, projection="none")
    document = read_description(description)
    plan = replace(plan, config=config, output=output, description=document)
    _require_free(plan)
    if config.multitask != "none" and config.cluster_by == "gradient":
        raise ConfigError("cluster_by = 'gradient': a base from scratch has no gradients to go by")
    return plan


def require_processes(plan: Plan, size: int) -> None:
    """Check that `size` processes can share an update, and with `shard` the network."""
    config = plan.config
    for is_refused, why in (
        (plan.shard and size == 1, "--shard divides the network among several processes, and this "
         "is one alone: start one for each GPU (torchrun, accelerate launch, srun), or leave it "
         "out"),
        (plan.shard and plan.dtype == "fp16", "--shard with --dtype fp16: choose bf16, which needs "
         "no loss scale"),
        (plan.shard and config.lora, "--shard divides weights that are trained, and --lora trains "
         "none of them; choose one"),
        (plan.shard and plan.compile == "on", "--shard with --compile on: what is divided is not "
         "compiled; choose one"),
        (size > 1 and config.multitask != "none", f"multitask = {config.multitask!r} needs the "
         f"gradients of whole batches, and {size} processes share them; train with one process, or "
         f"--multitask none"),
        (config.batch_size < size, f"batch_size = {config.batch_size} is for all {size} processes "
         f"together: expected one image for each at least"),
    ):  # fmt: skip
        if is_refused:
            raise ConfigError(why)


def require_companions(record: DenoiserRecord, pipeline: str | None) -> None:
    """Check that a model's frozen parts are there; raises MissingError naming the first."""
    if record.companions:
        from deme_cli.diffusion.model_files import locate_parts

        locate_parts(pipeline or record.source, list(record.companions))


def _read_affinity(plan: Plan, record: DenoiserRecord) -> Affinity | None:
    """The gradients by which timesteps are clustered, where they are to be."""
    if plan.config.multitask == "none" or plan.config.cluster_by != "gradient":
        return None
    from deme_cli.training.clusters import read_affinity

    return read_affinity(affinity_path(plan.base), record.fingerprint)


def _require_free(plan: Plan) -> None:
    """Check that there are images, that every output may be written, and room for an expert's."""
    if not plan.images.source:
        raise ConfigError("no training images: set [data] source in deme.toml, or use --data")
    if plan.config.log_with:
        require_tracker(plan.config.log_with)
    require_output(plan.output, force=plan.force, inputs=[plan.base])
    is_kept = checkpoint_path(plan.output).exists()  # then its snapshots so far are its own
    num_files = _FILES_BESIDE + len(plan.config.ema_lengths or [])
    for path in variant_paths(plan.output, plan.config):
        if path.parent.exists():  # else nothing is there, and a dry run leaves it so
            require_output(path, force=plan.force or is_kept)
        num_files += not path.exists()
    if plan.choice is not None:
        require_space(plan.output, num_files * 4 * read_header(plan.base).num_parameters)


def _require_same_settings(plan: Plan, base: BaseRecord) -> None:
    """Check that the finished expert at `plan.output` is what the plan would make again."""
    from deme_cli.data.images import open_images
    from deme_cli.diffusion.backbones import backbone_of

    record, images = read_record(plan.output, "expert"), plan.images
    anew = "add --force to train all ranges anew, or move it away"
    if record.imported:
        raise ConfigError(f"{plan.output} exists, imported and not trained here; {anew}")
    data = open_images(
        images.source, shape=(3, 8, 8), split="train", wants=backbone_of(base.model_config).wants,
        captions=images.captions, keep=False,
    )  # fmt: skip
    if data.fingerprint != record.data.get("fingerprint"):
        raise ConfigError(
            f"{plan.output} exists, trained on other images or captions ({record.data['source']}) "
            f"than those in {images.source} now (or by an earlier deme, which did not compare "
            f"every byte); {anew}"
        )
    wanted = {**_results_of(plan.config), "base": base.fingerprint, "crop": images.crop}
    wanted |= {"dtype": plan.dtype, "flip": images.horizontal_flip, "save_dtype": plan.save_dtype}
    wanted["resolution"] = images.resolution and [images.resolution] * 2
    unset = asdict(FinetuneConfig())  # records leave out what is unset, old ones what was not there
    kept = {**unset, "save_dtype": None, **record.training, "base": record.base}
    for name, value in wanted.items():
        is_free = name in ("flip", "resolution") and value is None  # as the images have it
        if name in kept and kept[name] != value and not is_free:
            raise ConfigError(
                f"{plan.output} exists with another {name}, {kept[name]!r} and not {value!r}; "
                f"{anew}"
            )


def read_description(path: Path) -> dict[str, Any]:
    """{model, scheduler}: two diffusers configs from a TOML or JSON file.

    Raises MissingError if there is no such file, ConfigError if it lacks either table or has more,
    or for a key that its class does not take, which diffusers would drop.
    """
    import diffusers
    import tomli

    try:
        with reading(path):
            text = path.read_text(encoding="utf-8")
        document = json.loads(text) if path.suffix == ".json" else tomli.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path}: neither valid TOML nor JSON: {error}") from error
    for table in {**_CLASSES, **document}:
        if table not in _CLASSES or not isinstance(document.get(table), dict):
            word = "lacks the" if table in _CLASSES else "unknown"
            raise ConfigError(f"{path}: {word} table [{table}]; expected [model] and [scheduler]")
        name = str(document[table].get("_class_name", _CLASSES[table]))
        kind: Any = getattr(diffusers, name, None)
        if not hasattr(kind, "from_config"):
            raise ConfigError(f"{path}: [{table}] diffusers has no class {name!r}")
        known = set(inspect.signature(kind).parameters) - {"kwargs"}
        for key in document[table]:
            if not key.startswith("_") and key not in known:
                near = nearest(key, sorted(known))
                raise ConfigError(f"{path}: unknown key {key!r} in [{table}] of {name}{near}")
    return document


def prepare(plan: Plan) -> Run:
    """Open the images and load the base (or draw its random weights).

    The caches behind the examples may still have to be filled. With `force`, a kept run of this
    output is dropped here, and not before.
    """
    from deme_cli.diffusion.denoiser import choose_device, load_denoiser

    device = "cpu" if plan.shard else str(choose_device(plan.device))  # to be divided from there
    if plan.choice is None:
        denoiser = random_denoiser(
            plan.description, plan.config.seed, device=device, pipeline=plan.pipeline
        )
        choice = RangeChoice(TimestepRange(0, denoiser.schedule.num_train_timesteps), 1, 1)
        record, examples, held_out = open_plan_examples(plan, denoiser.record)
    else:
        choice = plan.choice
        record, examples, held_out = open_plan_examples(plan)
        rests = plan.config.lora is not None and plan.dtype != "fp32"
        denoiser = load_denoiser(plan.base, device="cpu" if rests else device)
        if rests:  # it never gets to the device in float32
            from deme_cli.training.state import hold_at_rest

            hold_at_rest(denoiser.network, plan.dtype).to(device)
        denoiser = replace(denoiser, record=record)
    schedule, config, clusters = denoiser.schedule, plan.config, list[TimestepRange]()
    if config.multitask != "none":
        from deme_cli.training.clusters import cluster_draws

        draws, affinity = schedule.indices(choice.range), _read_affinity(plan, record)
        clusters = cluster_draws(draws, config.clusters, config.cluster_by, schedule, affinity)
    if config.lora:
        from deme_cli.diffusion.adapters import target_layers

        # known now, not after the caches
        target_layers(denoiser.network, config.lora_targets, config.lora)
    if plan.force:
        checkpoint_path(plan.output).unlink(missing_ok=True)
    flip = plan.images.horizontal_flip
    return Run(
        denoiser, choice, examples, held_out, examples.can_flip if flip is None else flip, config,
        plan.output, dtype=plan.dtype, from_scratch=plan.choice is None, clusters=clusters,
        compile=plan.compile, shard=plan.shard, save_dtype=plan.save_dtype,
    )  # fmt: skip


def open_plan_examples(
    plan: Plan, record: DenoiserRecord | None = None
) -> tuple[DenoiserRecord, Examples, Examples | None]:
    """The record (unless given, of the base) with its frozen parts named; train and held-out."""
    from deme_cli.diffusion.companions import open_companions
    from deme_cli.training.examples import name_companions, open_examples

    images, config = plan.images, plan.config
    record = record or name_companions(read_record(plan.base, "base"), plan.pipeline)
    companions = open_companions(
        record, pipeline=plan.pipeline, device=plan.device, dtype=plan.dtype
    )
    cache: dict[str, Any] = {
        "cache": config.cache, "beside": (plan.base if plan.choice else plan.output).parent,
    }  # fmt: skip
    flips, num, held_out = images.horizontal_flip, config.held_out, None
    train = open_examples(images, companions, split="train", flips=flips, **cache)
    if num:
        held_out = open_examples(images, companions, split="held-out", num_needed=num, **cache)
    return record, train, held_out


def random_denoiser(
    description: Mapping[str, Any], seed: int, *, device: str, pipeline: str | None = None
) -> Denoiser:
    """The denoiser that {model, scheduler} describes, its weights drawn from `seed`.

    pipeline: the folder or hub id with the frozen parts of a model that has any; its own denoiser
    is not read. Raises ConfigError where such a model comes without one.
    """
    import torch

    from deme_cli.diffusion.backbones import backbone_of
    from deme_cli.diffusion.backbones.backbone import config_of
    from deme_cli.diffusion.denoiser import Denoiser, build_network, choose_device
    from deme_cli.diffusion.model_files import digests_of, locate_parts
    from deme_cli.diffusion.schedule import read_schedule

    model, scheduler = ({"_class_name": c, **description[n]} for n, c in _CLASSES.items())
    source, companions = "trained from scratch", {}
    if parts := backbone_of(model, "[model]").parts:
        if not pipeline:
            raise ConfigError(
                f"{model['_class_name']} needs {', '.join(parts)}: give the folder or hub id of a "
                f"pipeline that has them with --pipeline"
            )
        folder = locate_parts(pipeline, parts)
        source = str(folder.resolve()) if Path(pipeline).expanduser().is_dir() else pipeline
        companions = digests_of(folder)
    with torch.random.fork_rng(devices=[]):  # diffusers initialises from the global generator
        torch.manual_seed(seed)
        network = build_network(model, "[model]")
    schedule = read_schedule(scheduler, "[scheduler]")
    record = BaseRecord(
        source=source, model_config={**config_of(network), "_class_name": model["_class_name"]},
        scheduler_config=scheduler, num_train_timesteps=schedule.num_train_timesteps,
        companions=companions, fingerprint=fingerprint(network.state_dict()),
    )  # fmt: skip
    network.to(choose_device(device)).eval().requires_grad_(False)
    return Denoiser(network, schedule, record)

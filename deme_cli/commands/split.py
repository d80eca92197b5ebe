"""`deme split`: import the base, divide [0, T), and write what every later command reads."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deme_cli import console
from deme_cli.commands.options import DryRun, Force, Json, Pipeline, Quiet, option
from deme_cli.config import CONFIG_NAME, SplitConfig
from deme_cli.errors import ConfigError, DemeError
from deme_cli.outputs import require_output, write_whole
from deme_cli.run_file import RunFile
from deme_cli.timesteps import TimestepRange, split_uniform
from deme_cli.training.affinity import AFFINITY_NAME, read_affinity, require_affinity

if TYPE_CHECKING:
    from deme_cli.diffusion.checkpoints import ImportedModel
    from deme_cli.records import BaseRecord

BASE_NAME = "base.safetensors"
# Training data guessed from a model's name, by a word in it.
_DATA_BY_NAME = {
    "digits": "digits",
    "cifar10": "cifar10",
    "cifar-10": "cifar10",
    "church": "lsun-church",
    "bedroom": "lsun-bedroom",
}
_C = SplitConfig

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="digits, a diffusers folder, a hub id, or a base or merged artifact.",
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="Training images: a folder, parquet file, hub dataset id, samples artifact, digits or "
        r"cifar10 \[default: guessed from the model's name].",
        show_default=False,
    ),
]
Gradients = Annotated[
    Path | None,
    typer.Option(
        "--gradients",
        help="For --by gradient: what `deme analyze gradients` wrote "
        rf"\[default: {AFFINITY_NAME} in the output folder].",
        show_default=False,
    ),
]
Output = Annotated[
    Path, typer.Option("--output", "-o", help=f"Folder for {CONFIG_NAME} and {BASE_NAME}.")
]


def split(
    model: Model = "digits",
    n: Annotated[int | None, option(_C, "n", "-n", "--num-ranges")] = None,
    data: Data = None,
    by: Annotated[str | None, option(_C, "by", "--by")] = None,
    gradients: Gradients = None,
    pipeline: Pipeline = None,
    output: Output = Path("."),
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Import a pretrained model and divide its timesteps into ranges, one expert each.

    Example: deme split digits -n 4
    """
    from deme_cli.artifacts import write_artifact

    console.set_quiet(quiet)
    settings = RunFile(Path("."), {}).settings(SplitConfig, n=n, by=by)
    paths = [output / BASE_NAME, output / CONFIG_NAME]
    for path in paths:
        require_output(path, force=force)
    _check_model(model, settings)
    measured = _check_gradients(gradients, settings, model, data, output)

    from deme_cli.diffusion.checkpoints import base_record, import_model

    imported = import_model(model, pipeline)
    record = base_record(imported)
    ranges = _divide(settings, record, measured)
    images = _choose_data(data, record)
    text = _run_file_text(record, settings, ranges, images, output, pipeline)
    facts = _measured(record, imported, ranges, images, pipeline)
    if not dry_run:
        record = write_artifact(paths[0], imported.weights, record)
        write_whole(paths[1], [text.encode()])
    _show(record, ranges, facts)
    console.result_paths([] if dry_run else paths, as_json=as_json, dry_run=dry_run, **facts)


def _check_model(model: str, settings: SplitConfig) -> None:
    """What the model's files say without its tensors: it is there, and its T can be divided."""
    from deme_cli.diffusion.locate import locate_model, peek_timesteps

    if num_train_timesteps := peek_timesteps(locate_model(model)):
        split_uniform(settings.n, num_train_timesteps)


def _check_gradients(
    given: Path | None, settings: SplitConfig, model: str, data: str | None, output: Path
) -> tuple[Path, str] | None:
    """The file that --by gradient reads, and the command that writes it."""
    if settings.by != "gradient":
        if given is not None:
            raise ConfigError(f"--gradients {given} is read by --by gradient alone")
        return None
    path = given or output / AFFINITY_NAME
    words = ["deme", "analyze", "gradients", model, "--data", data or _guess_data(model) or "DATA"]
    words += [] if path == Path(AFFINITY_NAME) else ["-o", str(path)]
    command = shlex.join(words)
    require_affinity(path, command=command)
    return path, command


def _divide(
    settings: SplitConfig, record: BaseRecord, measured: tuple[Path, str] | None
) -> list[TimestepRange]:
    """The ranges of [0, T) by --by; `measured` is where gradients lie, and what writes them."""
    from deme_cli.diffusion.schedule import read_schedule
    from deme_cli.training.clusters import split_times

    affinity = None
    if measured:
        affinity = read_affinity(measured[0], record.fingerprint, command=measured[1])
    schedule = read_schedule(record.scheduler_config)
    return split_times(settings.n, settings.by, schedule, affinity)


def _guess_data(name: str) -> str:
    """Training data by a word in a model's name; nothing where none is known."""
    words = name.lower()
    return next((known for word, known in _DATA_BY_NAME.items() if word in words), "")


def _choose_data(data: str | None, record: BaseRecord) -> str:
    """The data as given, else the guess from the model's name; warns where nothing can be found."""
    from deme_cli.data.places import find_place

    chosen = _guess_data(record.source) if data is None else data
    if not chosen:
        console.warn("no --data given: set source under [data] before `deme finetune`")
        return chosen
    try:
        find_place(chosen)
    except DemeError as error:
        console.warn(f"the training images are not there yet: {error}")
    return chosen


def _run_file_text(
    record: BaseRecord,
    settings: SplitConfig,
    ranges: list[TimestepRange],
    images: str,
    output: Path,
    pipeline: str | None,
) -> str:
    """deme.toml for this run. Local image paths become absolute where the file lies elsewhere."""
    from deme_cli.data.digits import DIGITS_SETTINGS
    from deme_cli.diffusion.backbones.known import backbone_of
    from deme_cli.run_file import render_run_file

    if output.resolve() != Path.cwd():
        images, pipeline = _absolute(images), _absolute(pipeline)
    live: dict[str, dict[str, Any]] = {
        "model": {"source": record.source, "base": BASE_NAME},
        "data": {"source": images},
        "split": {"n": settings.n, "by": settings.by, "ranges": [str(span) for span in ranges]},
    }
    if pipeline:
        live["model"]["pipeline"] = pipeline
    live |= backbone_of(record.model_config).settings
    if images == "digits" and not record.companions:
        live |= DIGITS_SETTINGS
    return render_run_file(live)


def _absolute(place: str | None) -> str | None:
    """A path that is there as an absolute one; a known name or anything else as it is."""
    from deme_cli.data.places import KNOWN_DATASETS

    here = Path(place or "").expanduser()
    is_path = place and place not in ("digits", *KNOWN_DATASETS) and here.exists()
    return str(here.resolve()) if is_path else place


def _show(record: BaseRecord, ranges: list[TimestepRange], facts: dict[str, Any]) -> None:
    """What was read, and the ranges with the signal-to-noise ratios at their ends."""
    from deme_cli.diffusion.schedule import read_schedule

    schedule = read_schedule(record.scheduler_config)
    noise = (10 * schedule.snr.log10()).tolist()
    draws = [schedule.indices(span) for span in ranges]
    for assumed in facts["notes"]:
        console.warn(assumed)
    shape = " x ".join(map(str, facts["image_shape"]))
    if record.companions:
        shape += f", latents {' x '.join(map(str, facts['sample_shape']))}"
    console.note(
        f"{record.source}: {record.model_config['_class_name']}, "
        f"{facts['parameters']:,} parameters, T = {record.num_train_timesteps}, "
        f"predicts {schedule.prediction_type}, images {shape}"
    )
    console.table(
        f"{len(ranges)} ranges of [0, {record.num_train_timesteps}), "
        f"data: {facts['data'] or 'not set'}",
        ["range", "timesteps", "draws", "SNR from (dB)", "to (dB)"],
        [
            [f"{index}/{len(ranges)}", str(span), str(len(drawn)),
             f"{noise[drawn.start]:.1f}", f"{noise[drawn.stop - 1]:.1f}"]
            for index, (span, drawn) in enumerate(zip(ranges, draws, strict=True), start=1)
        ],
    )  # fmt: skip


def _measured(
    record: BaseRecord,
    imported: ImportedModel,
    ranges: list[TimestepRange],
    images: str,
    pipeline: str | None,
) -> dict[str, Any]:
    """What `--json` tells besides the paths."""
    from deme_cli.diffusion.backbones.known import backbone_of
    from deme_cli.diffusion.companions import open_companions
    from deme_cli.diffusion.schedule import read_schedule

    backbone = backbone_of(record.model_config)
    image_shape = sample_shape = backbone.sample_shape(record.model_config)
    if record.companions:
        image_shape = open_companions(record, pipeline=pipeline).image_shape(sample_shape)
    return {
        "source": record.source,
        "data": images,
        "fingerprint": record.fingerprint,
        "parameters": sum(tensor.numel() for tensor in imported.weights.values()),
        "num_train_timesteps": record.num_train_timesteps,
        "prediction_type": read_schedule(record.scheduler_config).prediction_type,
        "wants": backbone.wants,
        "image_shape": list(image_shape),
        "sample_shape": list(sample_shape),
        "companions": record.companions,
        "ranges": [str(span) for span in ranges],
        "notes": list(imported.notes),
    }

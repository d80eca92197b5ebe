"""The curve of a run, also in TensorBoard, Weights & Biases or trackio: accelerate's trackers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from deme_cli.errors import MissingError

if TYPE_CHECKING:
    from deme_cli.training.setup import Run
    from deme_cli.training.train import TrainStep


def require_tracker(name: str) -> None:
    """Raises MissingError where the package of a tracker is not installed."""
    if not any(map(find_spec, (name, f"{name}X"))):  # torch writes for TensorBoard by either
        raise MissingError(f"--log-with {name}: the package is missing; pip install {name}")


@contextmanager
def tracking(run: Run, step: int) -> Iterator[Callable[[TrainStep], None]]:
    """Where points of the curve of `run` are told, which goes on from `step`.

    TensorBoard's files lie in logs/NAME beside the output; what it was told of later steps by a run
    that was killed no longer counts. The others have the run under its name in the project `deme`.
    """
    from accelerate import Accelerator

    kind, name = str(run.config.log_with), run.output.stem
    is_local = kind == "tensorboard"
    options: dict[str, Any] = {"purge_step": step + 1} if is_local else {"name": name}
    accelerator = Accelerator(
        cpu=run.denoiser.device.type == "cpu", log_with=kind, project_dir=run.output.parent / "logs"
    )
    settings = {key: value if isinstance(value, int | float | str) else str(value)
                for key, value in run.identity.items()}  # fmt: skip
    accelerator.init_trackers(
        name if is_local else "deme", config=settings, init_kwargs={kind: options}
    )

    def tell(record: TrainStep) -> None:
        values = {key: value for key, value in asdict(record).items() if value is not None}
        accelerator.log(values, step=values.pop("step"))

    try:
        yield tell
    finally:  # not `end_training`, which takes the processes apart that deme has joined
        for tracker in accelerator.trackers:
            tracker.finish()

"""One model that denoises all of [0, T): an ensemble of one."""

from __future__ import annotations

from functools import partial

from deme_cli.artifacts import DenoiserRecord, read_record
from deme_cli.diffusion.checkpoints import open_denoiser
from deme_cli.diffusion.denoiser import choose_device
from deme_cli.diffusion.model_files import locate_model
from deme_cli.sampling.sampler import SamplingExpert, single
from deme_cli.timesteps import TimestepRange


def open_single(
    argument: str, *, pipeline: str | None = None, device: str = "cpu", dtype: str = "fp32"
) -> tuple[list[SamplingExpert], DenoiserRecord]:
    """The model that an argument names, and its record.

    An artifact is loaded when its weights are needed; a folder at once, for it tells its
    fingerprint only by its weights. Raises what `locate_model` and `open_denoiser` raise.
    """
    choose_device(device)
    place = locate_model(argument)
    load = partial(open_denoiser, argument, pipeline=pipeline, device=device, dtype=dtype)
    if not place.is_file():
        denoiser = load()
        return single(denoiser), denoiser.record
    record = read_record(place, "base", "expert", "merged")
    whole = TimestepRange(0, record.num_train_timesteps)
    return [SamplingExpert(whole, load)], record

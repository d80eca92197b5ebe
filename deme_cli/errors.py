"""Failures the user can act on. One class per exit code (`deme` prints the message, no traceback).

A message says where, what was expected, what was found and what to do; lower case, no period.
Anything that is not a `DemeError` is a bug and keeps its traceback (exit code 1).
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class DemeError(Exception):
    """Something the user can mend; `exit_code` is what the process ends with."""

    exit_code = 1

    def __init__(self, message: str, *, exit_code: int | None = None) -> None:
        super().__init__(message)
        self.exit_code = exit_code or self.exit_code


class ConfigError(DemeError):
    """Wrong usage or configuration."""

    exit_code = 2


class MissingError(DemeError):
    """A file, dataset, weight, hub or disk that is needed is missing or unreachable."""

    exit_code = 3


class ArtifactError(DemeError):
    """An artifact or data is wrong: corrupt, mismatched, or of another base."""

    exit_code = 4


class NumericsError(DemeError):
    """The numbers failed: NaN, a non-finite loss or distance."""

    exit_code = 5


class GateError(DemeError):
    """A gate such as `eval --max-fid` was not met."""

    exit_code = 6


class Stopped(DemeError):
    """A signal ended the run, its state saved: 75 for SIGTERM and SIGUSR1, 130 for Ctrl-C."""

    exit_code = 75


def shown(value: object) -> str:
    """A value from outside as a message shows it: on one line of bounded length."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


_STORAGE = {  # by the names of what the operating system says
    "ENOSPC": "no space left on the disk; free some",
    "EDQUOT": "the disk quota is used up; free some",
    "EACCES EPERM": "no permission to write there",
    "EROFS": "the file system is read-only",
    "EFBIG": "the file system takes no file this large",
    "EEXIST ENOTDIR": "part of this path is a file, not a folder",
    "EISDIR ENOTEMPTY": "a folder of this name exists",
    "ENOENT EINVAL": "this place takes no files",
    "ELOOP": "links in this path go in a circle",
    "ENAMETOOLONG": "the name is too long for the disk",
}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Translate what the operating system says while `path` is written into a `MissingError`."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        told = re.search(r"\(os error (\d+)\)", str(error))  # all that safetensors tells of it
        number = error.errno if isinstance(error, OSError) else told and int(told[1])
        name = errno.errorcode.get(number or 0)
        for names, what in _STORAGE.items():
            if name in names.split():
                raise MissingError(f"{path}: {what}; choose another --output") from error
        raise


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Translate what the operating system says while `path` is read into a `MissingError`."""
    try:
        yield
    except FileNotFoundError as error:
        raise MissingError(f"{path}: no such file") from error
    except OSError as error:
        raise MissingError(f"{path}: cannot be read: {error.strerror}") from error


_OUT_OF_MEMORY = (  # what a RuntimeError says; accelerate's `should_reduce_batch_size` knows fewer
    "out of memory",  # torch's allocators of CUDA, HIP, XPU and MPS; CUDA's own error 2
    "STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN, cuSOLVER, cuSPARSE, which allocate beside torch
    "ALLOCATION_FAILED",  # the same of cuDNN since 9
    "Invalid buffer size: ",  # MPS, of a tensor larger than a Metal buffer may be
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",  # Windows
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is how torch says that a device, or the processor, has too little memory."""
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


@contextmanager
def out_of_memory_as(message: str) -> Iterator[None]:
    """Translate a lack of memory into a `MissingError` that says `message`."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise MissingError(message) from error


# What the training scripts of diffusers, kohya, mergekit and clean-fid call our options, settings
# and commands, where it does not resemble our word.
OTHER_WORDS = {
    "base": "base_model pretrained_model_name_or_path model",
    "batch_size": "per_device_train_batch_size bs",
    "checkpoint_every": "save_steps",
    "coefficients": "weights weight alpha ratio",
    "data": "train_data_dir instance_data_dir dataset_name dataset_config image_dir",
    "device": "gpu cuda no_cuda",
    "dtype": "mixed_precision precision save_precision fp16 bf16",
    "eval": "evaluate fid metrics",
    "fid": "reference dataset_name compute_fid",
    "finetune": "train training",
    "force": "overwrite overwrite_output_dir",
    "grad_clip": "max_grad_norm",
    "guidance": "cfg cfg_scale",
    "jobs": "num_processes num_workers dataloader_num_workers",
    "lr": "learning_rate unet_lr",
    "merge": "search",
    "model": "pretrained_model_name_or_path base",
    "n": "num_ranges num_experts experts",
    "num": "num_images num_samples num_validation_images num_gen",
    "output": "outdir save_dir logging_dir",
    "prompts": "prompt_file validation_prompts",
    "range": "timestep_range min_timestep max_timestep",
    "resolution": "image_size height width",
    "resume": "resume_from_checkpoint",
    "sample": "generate inference",
    "sampler": "scheduler noise_scheduler",
    "seed": "random_seed manual_seed",
    "source": "data train_data_dir dataset_name",
    "split": "init convert",
    "steps": "max_train_steps train_steps training_steps updates iterations num_inference_steps "
    "inference_steps sampling_steps",
    "warmup": "lr_warmup_steps num_warmup_steps",
    "weighting_gamma": "snr_gamma min_snr_gamma",
}


def closest(word: str, known: Iterable[str]) -> str | None:
    """What of `known` somebody meant who wrote `word`: a slip, or the word of another tool for it.

    Dashes, underscores and capitals are all one.
    """
    from difflib import get_close_matches

    own = {name.lower().lstrip("-").replace("-", "_"): name for name in known}
    meant = dict(own)
    for name, others in OTHER_WORDS.items():
        if (name := name.replace("-", "_")) in own:
            meant |= {other: own[name] for other in others.split() if other not in own}
    plain = word.lower().lstrip("-").replace("-", "_")
    found = get_close_matches(plain, meant, n=1, cutoff=0.6)
    return meant[found[0]] if found else None


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown `word`: what of `known` may be meant, or all of it."""
    known = list(known)
    close = closest(word, known)
    return f"; did you mean {close!r}?" if close else f"; known: {', '.join(known)}"

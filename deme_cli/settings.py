"""What a setting is: a default, the sentence that explains it, the words it may take, its option.

A table of settings is a frozen dataclass that checks itself, so a config that exists is a config
that can run.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from deme_cli.errors import ConfigError

# What the training scripts of diffusers, kohya, mergekit and clean-fid call our options, settings
# and commands. A name of ours that the place in question does not know is passed over.
OTHER_WORDS = {
    "lr": "learning_rate unet_lr",
    "steps": "max_train_steps train_steps training_steps max_steps num_steps updates iterations "
    "num_inference_steps inference_steps sampling_steps",
    "batch_size": "train_batch_size per_device_train_batch_size eval_batch_size bs",
    "accumulation": "gradient_accumulation_steps accumulation_steps",
    "lr_schedule": "lr_scheduler lr_scheduler_type",
    "warmup": "lr_warmup_steps warmup_steps num_warmup_steps",
    "checkpoint_every": "checkpointing_steps save_steps",
    "snapshot_every": "save_every_n_steps",
    "grad_clip": "max_grad_norm gradient_clip",
    "weight_decay": "adam_weight_decay",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "ema_decay": "use_ema ema",
    "weighting_gamma": "snr_gamma min_snr_gamma",
    "loss_weighting": "weighting_scheme",
    "consistency": "consistency_weight consistency_loss",
    "caption_dropout": "caption_dropout_rate proportion_empty_prompts conditioning_dropout_prob",
    "cache": "cache_latents cache_latents_to_disk",
    "range": "timestep_range min_timestep max_timestep",
    "num_ranges": "num_experts experts",
    "n": "num_ranges num_experts experts",
    "source": "data train_data_dir dataset_name",
    "resize": "resize_to",
    "data": "train_data_dir instance_data_dir dataset dataset_name dataset_config image_dir",
    "captions": "caption_column caption_extension text_column",
    "flip": "random_flip flip_aug horizontal_flip",
    "horizontal_flip": "random_flip flip_aug flip",
    "crop": "center_crop random_crop",
    "resolution": "image_size height width",
    "base": "base_model pretrained_model_name_or_path model",
    "model": "base_model pretrained_model_name_or_path base",
    "output": "output_dir output_path output_name out outdir out_path save_dir logging_dir",
    "resume": "resume_from_checkpoint",
    "dtype": "mixed_precision precision torch_dtype save_precision save_dtype fp16 bf16",
    "device": "gpu cuda no_cuda",
    "compile": "torch_compile",
    "jobs": "num_processes num_workers dataloader_num_workers",
    "seed": "random_seed manual_seed",
    "num": "num_images num_samples num_validation_images num_gen",
    "sampler": "scheduler noise_scheduler solver",
    "spacing": "timestep_spacing",
    "guidance": "guidance_scale cfg cfg_scale",
    "prompt": "validation_prompt caption",
    "prompts": "prompt_file prompts_file validation_prompts",
    "classes": "class_labels class_ids",
    "per_prompt": "num_images_per_prompt",
    "coefficients": "weights weight alpha ratio",
    "method": "merge_method",
    "fid": "reference dataset_name compute_fid",
    "kid": "compute_kid",
    "evaluations": "trials n_trials max_evals",
    "force": "overwrite overwrite_output_dir",
    "config": "config_file",
    "pipeline": "vae pretrained_vae_model_name_or_path",
    "split": "import init convert",
    "finetune": "train training tune",
    "sample": "generate inference",
    "ensemble-sample": "ensemble",
    "eval": "evaluate fid metrics",
    "merge": "search",
    "inspect": "show info",
    "export": "save_pretrained convert_to_diffusers",
    "doctor": "check env",
}


def closest(word: str, known: Iterable[str]) -> str | None:
    """What of `known` somebody meant who wrote `word`: a slip, or the word of another tool for it.

    Dashes, underscores and capitals are all one.
    """
    own = {_plain(name): name for name in known}
    meant = {
        _plain(other): own[_plain(name)]
        for name, others in OTHER_WORDS.items()
        if _plain(name) in own
        for other in others.split()
    } | own
    found = difflib.get_close_matches(_plain(word), meant, n=1, cutoff=0.6)
    return meant[found[0]] if found else None


def _plain(word: str) -> str:
    return word.lower().lstrip("-").replace("-", "_")


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown `word`: what of `known` may be meant, or all of it."""
    known = list(known)
    close = closest(word, known)
    return f"; did you mean {close!r}?" if close else f"; known: {', '.join(known)}"


def setting(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    flags: str = "",
    panel: str | None = None,
    parse: Callable[[str, str], Any] | None = None,
    option: bool = True,
) -> Any:
    """A field with its one-sentence help and, for words, the words allowed.

    flags: of its option, separated by spaces, as `--num -n` or `--flip/--no-flip`; by default its
    name.   panel: where `--help` lists it.   parse: the value of a text on the command line and the
    flag before it, for what is more than one word or number.   option: whether there is one, or the
    setting is one of deme.toml alone.
    """
    metadata = {
        "help": help, "choices": tuple(choices), "flags": flags, "panel": panel, "parse": parse,
        "option": option,
    }  # fmt: skip
    return field(default=default, metadata=metadata)


def help_of(item: Field[Any]) -> str:
    """The sentence for `--help`: what the setting means, its choices and its default."""
    text: str = item.metadata["help"]
    if item.metadata["choices"]:
        text += f" ({', '.join(item.metadata['choices'])})"
    if item.default not in (None, MISSING, "") and not isinstance(item.default, bool):
        text += f" [default: {item.default}]"
    return text


def flags_of(item: Field[Any]) -> list[str]:
    """The flags of the option of a setting, the long one first, as `--flip/--no-flip`."""
    flags = item.metadata["flags"].split() or [f"--{item.name.replace('_', '-')}"]
    return sorted(flags, key=lambda flag: not flag.startswith("--"))


class FromFile(list[Any]):
    """A list as a deme.toml has it. One with a value for each expert goes by their ranges, not, as
    a list that was given to a command or a function, by the order of its arguments."""


@dataclass(frozen=True)
class Settings:
    """Checks that hold for every table: the words are known and the types fit."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            choices = item.metadata.get("choices")
            if choices and value is not None and value not in choices:
                raise ConfigError(f"{item.name} = {value!r}: expected one of {', '.join(choices)}")
        self.check()

    @classmethod
    def combine(cls, table: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """The values of a table of deme.toml with those that were given in their places."""
        return {**table, **given}

    def check(self) -> None:
        """What the words alone cannot say; each table adds its own."""

    def _positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} = {value}: expected a number above 0")

    def _not_negative(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ConfigError(f"{name} = {value}: expected 0 or more")


def parse_numbers(text: str, what: str) -> list[float]:
    """`0.1,0.2` as numbers. Raises ConfigError naming `what`."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{what} {text!r}: expected numbers separated by commas") from error


def parse_lists(text: str, what: str) -> list[Any]:
    """`0,1` as one list for all, `0,1;0,2` as a list of lists."""
    lists = [parse_numbers(part, what) for part in text.split(";")]
    return lists if len(lists) > 1 else lists[0]

"""What each image is to show: its prompt or its class, and how many images that makes.

Text-to-image models draw prompts, class models the classes in turn, unconditional models neither.
Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from deme_cli.config import SampleConfig
from deme_cli.data.prompts import PromptSet, read_prompts, select_prompts
from deme_cli.errors import ConfigError

DEFAULT_NUM = 64  # images, where neither -n nor prompts say how many
SUBJECT_FIELDS = ("prompts", "prompts_sha256", "per_prompt", "classes")  # of the card
_SPAN = re.compile(r"(\d+)(?:-(\d+))?")


@dataclass(frozen=True)
class Subjects:
    """What images 0 .. num - 1 show: a prompt each, a class each, both, or nothing.

    `card` holds the SUBJECT_FIELDS that have a meaning here.
    """

    num: int
    prompts: list[str] | None = None
    classes: list[int] | None = None
    card: dict[str, Any] = field(default_factory=dict)


def choose_subjects(
    wants: str,
    num_classes: int | None,
    config: SampleConfig,
    *,
    prompts: PromptSet | None = None,
) -> Subjects:
    """The subjects that `config` names, for a model that wants `nothing`, a `class` or a `text`.

    prompts: in place of those that `config` names, for text models.
    Raises ConfigError for settings that such a model cannot follow, and what `read_prompts` raises.
    """
    if wants == "text":
        return _prompted(config, prompts)
    if wants == "class":
        assert num_classes is not None
        return _classified(config, num_classes)
    _refuse(config, "this model draws from noise alone", "prompts", "classes", "prompt_column")
    if config.guidance not in (None, 1):
        raise ConfigError(
            f"guidance = {config.guidance:g}: this model draws from noise alone, so there is "
            f"nothing to guide it by; leave guidance out"
        )
    return Subjects(_num(config))


def prompts_in_turn(
    found: PromptSet, *, num: int | None, per_prompt: int
) -> tuple[list[str], list[int] | None]:
    """The prompt of each image, and its class where the prompts have any, as `select_prompts`."""
    pairs = select_prompts(found, num=num, per_prompt=per_prompt)
    classes = [number for _, number in pairs if number is not None]
    return [prompt for prompt, _ in pairs], classes or None


def _prompted(config: SampleConfig, found: PromptSet | None) -> Subjects:
    _refuse(config, "this model draws prompts, not classes", "classes")
    if found is None:
        if not config.prompts:
            raise ConfigError(
                "this model draws prompts: give them with --prompts FILE (txt, csv, tsv or json), "
                "--prompts parti, coco, imagenet or digits, or one with --prompt TEXT"
            )
        found = read_prompts(config.prompts, column=config.prompt_column)
    prompts, classes = prompts_in_turn(found, num=config.num, per_prompt=config.per_prompt)
    card = {
        "prompts": {
            "source": found.source,
            "column": config.prompt_column,
            "n": len(found),
            "template": found.template,
        },
        "prompts_sha256": found.sha256,
        "per_prompt": config.per_prompt,
    }
    return Subjects(len(prompts), prompts, classes, card)


def _classified(config: SampleConfig, num_classes: int) -> Subjects:
    _refuse(config, "this model draws classes, not prompts", "prompts", "prompt_column")
    turn = parse_classes(config.classes, num_classes) if config.classes else range(num_classes)
    classes = [turn[index % len(turn)] for index in range(_num(config))]
    return Subjects(len(classes), None, classes, {"classes": spans(turn)})


def _num(config: SampleConfig) -> int:
    return DEFAULT_NUM if config.num is None else config.num


def _refuse(config: SampleConfig, reason: str, *names: str) -> None:
    """Raise ConfigError if one of these settings is given."""
    for name in names:
        if (value := getattr(config, name)) is not None:
            raise ConfigError(f"{name} = {value!r}: {reason}; leave {name} out")
    if "prompts" in names and config.per_prompt != 1:
        raise ConfigError(f"per_prompt = {config.per_prompt}: {reason}; leave per_prompt out")


def parse_classes(text: str, num_classes: int) -> list[int]:
    """`0,3,7` or `0-9` as class numbers, in the order given, each below `num_classes`."""
    classes: list[int] = []
    for part in text.split(","):
        match = _SPAN.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ConfigError(f"classes {text!r}: expected numbers, as in 0,3,7 or 0-9")
        if last >= num_classes:
            raise ConfigError(
                f"classes {text!r}: class {last} is not among the {num_classes} classes of this "
                f"model, 0 to {num_classes - 1}"
            )
        classes += range(first, last + 1)
    return classes


def spans(classes: Sequence[int]) -> str:
    """Class numbers as `parse_classes` reads them, runs of neighbours in one: `0-9`."""

    def runs() -> Iterator[str]:
        first = last = classes[0]
        for number in [*classes[1:], None]:
            if number is not None and number == last + 1:
                last = number
                continue
            yield str(first) if first == last else f"{first}-{last}"
            if number is not None:
                first = last = number

    return ",".join(runs())

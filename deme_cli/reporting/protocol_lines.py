"""The command lines of samples, tables and analyses, told from their protocol cards.

A card holds what was chosen as it came out (the sampler's name, the guidance of the pipeline), so a
line may say what the command would have chosen by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deme_cli.analysis_config import ANALYSES
from deme_cli.config import DataConfig, EvalConfig, SampleConfig, SplitConfig
from deme_cli.reporting.command_words import (
    Names,
    option_words,
    output_words,
    path_word,
    setting_words,
)
from deme_cli.run_file import RunFile

# Of analyses, what is no setting: what it is where nobody says.
_OPTIONS: dict[str, dict[str, str | None]] = {
    "losses": {"split": "held-out", "dtype": "fp32"},
    "activations": {"split": "held-out", "dtype": "fp32", "range": None},
    "landscape": {"split": "train"},
}  # fmt: skip


def sampling(card: Mapping[str, Any], name: str, run: RunFile, names: Names) -> list[str]:
    """`deme sample`, or `deme ensemble-sample` where each range had its own expert."""
    models = [path_word(names.get(mark, "MODEL")) for mark in card["fingerprints"]]
    if card["model"] == "ensemble":
        words, usual = ["ensemble-sample", *models], "ensemble.safetensors"
    else:
        words = ["sample", *models]
        usual = f"{models[0].removesuffix('.safetensors')}-samples.safetensors"
    words += _drawing(card, run)
    return [*words, *output_words(name, usual)]


def _drawing(card: Mapping[str, Any], run: RunFile) -> list[str]:
    """The options that say how images are drawn."""
    values = {key: card[key] for key in ("num", "steps", "eta", "seed", "guidance", "resolution")
              if card.get(key) is not None}  # fmt: skip
    given = run.settings(SampleConfig)
    if card.get("sampler") != given.sampler:
        values["sampler"] = card.get("sampler")
    if card.get("spacing") not in (None, given.spacing):
        values["spacing"] = card["spacing"]
    if card.get("resize_to"):
        values["resize"] = card["resize_to"]
    if card.get("per_prompt"):
        values["per_prompt"] = card["per_prompt"]
    if prompts := card.get("prompts"):
        values["prompts"] = prompts["source"]
    elif classes := card.get("classes"):
        values["classes"] = classes if isinstance(classes, str) else ",".join(map(str, classes))
    words = setting_words(SampleConfig, run, values)
    return words + ([] if card.get("dtype", "fp32") == "fp32" else ["--dtype", card["dtype"]])


def measuring(
    rows: Sequence[Mapping[str, Any]], name: str, run: RunFile, names: Names
) -> list[str]:
    """`deme eval` of all rows of a table."""
    card = rows[0]["protocol"]
    models = dict.fromkeys(path_word(model) for row in rows for model in _drawn_by(row, names))
    figure, *_ = rows[0]["metrics"].values()
    values: dict[str, Any] = {
        "num": figure["n"], "repeats": figure.get("repeats", 1), "protocol": card.get("protocol"),
        "seed": card.get("seed"), **_references(card),
    }  # fmt: skip
    if card.get("resize") not in (None, "none"):
        values["resize"] = card["resize"]
    if clip := card.get("clip_score"):
        values |= {"clip_score": True, "clip_model": clip["model"], "clip_weights": clip["weights"]}
    if classifier := card.get("accuracy"):
        values["accuracy"] = classifier["model"]
    words = setting_words(EvalConfig, run, values)
    drawn = {key: value for key, value in card.items() if key not in ("num", "seed", "resize")}
    return ["eval", *models, *words, *_drawing(drawn, run), "-o", path_word(name)]


def _drawn_by(row: Mapping[str, Any], names: Names) -> list[str]:
    """The files of a row: its models, or the finished images."""
    if row["kind"] == "samples":
        file = f"{row['name']}.safetensors"
        return [file if file in names.values() else row["name"]]
    return [names.get(mark, "MODEL") for mark in row["protocol"].get("fingerprints", ["?"])]


def _references(card: Mapping[str, Any]) -> dict[str, Any]:
    """--fid and --kid, and the features where the references alone would not lead to them."""
    found: dict[str, Any] = {}
    for metric, reference in card.get("references", {}).items():
        is_kernel = metric.startswith(("kid", "kernel"))
        found["kid" if is_kernel else "fid"] = reference["source"]
    features = card.get("features")
    usual = "digits" if "digits" in found.values() else "inception"
    return found | ({"features": features} if features and features != usual else {})


def analysing(
    document: Mapping[str, Any], name: str, run: RunFile, names: Names
) -> list[str] | None:
    """`deme analyze …` of a document; None for one that no analysis writes."""
    kind = document.get("kind")
    if kind not in ANALYSES:
        return None
    protocol = document["protocol"]
    marks = dict.fromkeys(_marks(protocol["experts"] if kind == "task-vectors" else protocol))
    models = [path_word(name) for name in dict.fromkeys(names[m] for m in marks if m in names)]
    if kind == "landscape":  # the others lie beside the line or plane
        most = protocol["spanning"]
        models[most:] = [word for model in models[most:] for word in ("--mark", model)]
    words = ["analyze", kind, *models]
    data = protocol.get("data") or {}
    words += setting_words(ANALYSES[kind], run, protocol)
    if kind == "gradients":
        words += setting_words(SplitConfig, run, {"n": protocol.get("n")})
    if data.get("source") != run.settings(DataConfig).source:
        words += setting_words(DataConfig, run, data)
    for option, usual in _OPTIONS.get(kind, {}).items():
        given = protocol.get(option, data.get(option))
        if given not in (None, usual):
            words += option_words(f"--{option}", given)
    return [*words, *output_words(name, f"{kind}.json")]


def _marks(value: Any) -> Iterator[str]:
    """Every text in a protocol that may be a fingerprint, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _marks(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _marks(entry)

"""What experts could win over plain finetuning, before anyone trains them in earnest.

Every range gets a short expert, trained on its own timesteps alone (p = 0, no consistency loss),
and plain finetuning as many updates in total. Their losses on held-out images, all on the same
draws, say what there is to win by dividing the timesteps: the change of the ensemble's loss from
that of plain finetuning, over all timesteps and by range.

It says how far ranges are from what they could be, not what a distance of images will be:
examples/when.md has both side by side, for the points of a study.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from deme_cli.analysis.losses import analyze_losses, change_text, draw_losses, relative_changes
from deme_cli.analysis.result import (
    Analysis,
    check_inputs,
    own_base,
    peek,
    ranges_of,
    write_analysis,
)
from deme_cli.analysis.settings import ForecastConfig, LossConfig, bucket_ranges
from deme_cli.config import DataConfig, FinetuneConfig
from deme_cli.console import Progress, Step, signed, silent
from deme_cli.run_file import RunFile
from deme_cli.training.finetune import finetune


def analyze_forecast(
    settings: ForecastConfig | None = None, *, images: DataConfig | None = None,
    num_ranges: int | None = None, output: Path = Path("forecast.json"), run: RunFile | None = None,
    pipeline: str | None = None, device: str = "auto", dtype: str = "fp32", force: bool = False,
    dry_run: bool = False, progress: Progress = silent,
) -> Analysis:  # fmt: skip
    """Train short experts of the base of `run` and tell what an ensemble of them wins.

    settings: `updates` of each range, and the draws of the losses; all else of the training is
    [finetune] of `run`.   num_ranges: equal ranges; None for those of `run`.

    The short experts lie in a hidden folder beside `output` until that is written, so a stopped
    call goes on. The rest is as for `analyze_losses`; raises what `finetune` raises, too.
    """
    run, settings = run or RunFile(), settings or ForecastConfig()
    images, base = check_inputs(output, images, run, split="held-out", force=force), own_base(run)
    record, whole = peek(base)
    assert whole, "a base tells its timesteps"
    ranges, buckets = ranges_of(run, [], num_ranges, whole), bucket_ranges(settings.buckets, whole)
    short = short_settings(run.settings(FinetuneConfig), settings.updates)
    plain = replace(short, steps=len(ranges) * short.steps)
    told = f"{base}: {len(ranges)} short experts of {short.steps} updates, plain finetuning of "
    progress(Step(note=f"{told}{plain.steps}; rate {short.lr:g}, batches of {short.batch_size}"))
    if dry_run:
        return Analysis(output, facts={"dry_run": True})
    trained: dict[str, Any] = {"finetune": asdict(short), "ranges": list(map(str, ranges))}
    kept = output.parent / f".{output.stem}.unfinished"
    if force:
        shutil.rmtree(kept, ignore_errors=True)
    known = repr([record, asdict(images), trained, dtype, run.pipeline(pipeline)])
    folder = kept / hashlib.sha256(known.encode()).hexdigest()[:8]
    common: dict[str, Any] = {
        "images": images, "run": run, "pipeline": pipeline, "device": device, "dtype": dtype,
        "progress": progress,
    }  # fmt: skip
    models = {"plain": ("1/1", plain)}
    models |= {f"short_{i}": (str(span), short) for i, span in enumerate(ranges, 1)}
    paths = [folder / f"{name}.safetensors" for name in models]
    for path, (span, training) in zip(paths, models.values(), strict=True):
        if not path.exists():  # else done before
            finetune(span, training, output=path, **common)
    draws = {name: value for name, value in asdict(settings).items() if name != "updates"}
    measured = analyze_losses(
        [paths[0], base, *paths[1:]], LossConfig(**draws), num_ranges=num_ranges,
        output=folder / "losses.json", force=True, **common,
    )  # fmt: skip
    rows = measured.document["models"]
    document = {"protocol": {**measured.document["protocol"], **trained}, "models": rows}
    foot = f"{short.steps} updates of each range, {plain.steps} of plain finetuning"
    made = _write(output, document, draw_losses(rows, buckets, ranges, foot=foot))
    shutil.rmtree(kept)
    return made


def _write(output: Path, document: dict[str, Any], picture: bytes) -> Analysis:
    """Write what base and ensemble of the short experts lose less or more than plain finetuning."""
    plain, base, *_, ensemble = document["models"]
    ranges = document["protocol"]["ranges"]
    changes = {
        "base": relative_changes(plain, base), "short experts": relative_changes(plain, ensemble),
    }  # fmt: skip
    whole, *by_range = changes["short experts"]
    most, best = min(zip(by_range, ranges, strict=True))
    reading = f"short experts change the held-out loss by {change_text(*whole)} % against plain "
    reading += f"finetuning, on {best} by {signed(most[0], 1)} %"
    return write_analysis(
        output, "forecast", {"reading": reading, **document, "changes": changes}, picture,
        shown=["changes"], columns=["loss against plain, %", "all", *ranges],
        rows=[
            [name, *(change_text(*pair, sign="±") for pair in pairs)]
            for name, pairs in changes.items()
        ],
    )  # fmt: skip


def short_settings(settings: FinetuneConfig, updates: int) -> FinetuneConfig:
    """The training of a run, cut to `updates` and to what an expert wins on its range alone."""
    return replace(
        settings, steps=updates, warmup=min(settings.warmup, updates // 5), p=0.0, consistency=0.0,
        projection="none", multitask="none", held_out=0, checkpoint_every=max(updates, 100),
        snapshot_every=None, ema_lengths=None, log_with=None,
    )  # fmt: skip

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
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from deme_cli.analysis.losses import analyze_losses, changes, draw_losses
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
from deme_cli.timesteps import TimestepRange
from deme_cli.training.finetune import finetune

PLAIN = "plain"


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
    whole = peek(base)[1]
    assert whole, "a base tells its timesteps"
    ranges, buckets = ranges_of(run, [], num_ranges, whole), bucket_ranges(settings.buckets, whole)
    short = short_settings(run.settings(FinetuneConfig), settings.updates)
    plain = replace(short, steps=len(ranges) * short.steps)
    told = f"{base}: {len(ranges)} short experts of {short.steps} updates, plain finetuning of "
    progress(Step(note=f"{told}{plain.steps}; rate {short.lr:g}, batches of {short.batch_size}"))
    if dry_run:
        return Analysis(output, facts={"dry_run": True})
    trained: dict[str, Any] = {"finetune": asdict(short), "ranges": list(map(str, ranges))}
    known = [peek(base)[0], asdict(images), trained, dtype]
    digest = hashlib.sha256(repr(known).encode()).hexdigest()[:8]
    folder = output.parent / f".{output.stem}-{digest}"
    common: dict[str, Any] = {
        "images": images, "run": run, "pipeline": pipeline, "device": device, "dtype": dtype,
        "progress": progress,
    }  # fmt: skip
    short_names = [f"short_{index}of{len(ranges)}" for index in range(1, len(ranges) + 1)]
    plan = [("1/1", plain), *((str(span), short) for span in ranges)]
    models = [folder / f"{name}.safetensors" for name in (PLAIN, *short_names)]
    for path, (span, training) in zip(models, plan, strict=True):
        if not path.exists():  # else done before
            finetune(span, training, output=path, **common)
    models.insert(1, Path(base))
    draws = {name: value for name, value in asdict(settings).items() if name != "updates"}
    measured = analyze_losses(
        list(map(str, models)), LossConfig(**draws), num_ranges=num_ranges,
        output=folder / "losses.json", force=True, **common,
    )  # fmt: skip
    rows = measured.document["models"]
    ensemble = next(row for row in rows if row["kind"] == "ensemble")
    compared = {"base": changes(rows[0], rows[1]), "short experts": changes(rows[0], ensemble)}
    document = {
        "reading": headline(compared["short experts"], ranges),
        "protocol": {**measured.document["protocol"], **trained, "plain_updates": plain.steps},
        "ranges": trained["ranges"], "changes": compared, "models": rows,
    }  # fmt: skip
    foot = f"{short.steps} updates of each range, {plain.steps} of plain finetuning"
    made = write_analysis(
        output, "forecast", document, draw_losses(rows, buckets, ranges, foot=foot),
        shown=["ranges", "changes"], columns=["loss against plain, %", "all", *trained["ranges"]],
        rows=[
            [name, *(f"{signed(mean, 1)}±{half:.1f}" for mean, half in pairs)]
            for name, pairs in compared.items()
        ],
    )  # fmt: skip
    shutil.rmtree(folder)
    return made


def short_settings(settings: FinetuneConfig, updates: int) -> FinetuneConfig:
    """The training of a run, cut to `updates` and to what an expert wins on its range alone."""
    return replace(
        settings, steps=updates, warmup=min(settings.warmup, updates // 5), p=0.0, consistency=0.0,
        projection="none", multitask="none", held_out=0, checkpoint_every=max(updates, 100),
        snapshot_every=None, ema_lengths=None, log_with=None,
    )  # fmt: skip


def headline(compared: Sequence[tuple[float, float]], ranges: Sequence[TimestepRange]) -> str:
    """What the short experts won in all, and where most."""
    (mean, half), *by_range = compared
    best = min(range(len(ranges)), key=lambda index: by_range[index][0])
    told = f"short experts change the held-out loss by {signed(mean, 1)} ± {half:.1f} % against "
    return f"{told}plain finetuning, on {ranges[best]} by {signed(by_range[best][0], 1)} %"

"""What losses say: the file's rows, and in a sentence what each model gained, and where it lost."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from deme_cli.analysis import intervals
from deme_cli.analysis.document import document_bytes
from deme_cli.analysis.losses.measure import Curve, LossAnalysis, Losses


def document_of(analysis: LossAnalysis, found: Losses) -> bytes:
    """The file: a row per model, lists by bucket in the order of `buckets`."""
    examples, config = analysis.examples, analysis.config
    protocol = {
        "models": {entrant.name: entrant.fingerprints for entrant in analysis.entrants},
        "data": {"source": examples.source, "fingerprint": examples.fingerprint,
                 "split": analysis.split},
        "images": found.num_images, "buckets": config.buckets, "num": config.num,
        "seed": config.seed, "dtype": analysis.dtype, "intervals": intervals.MEANING,
    }  # fmt: skip
    return document_bytes(
        "losses", read_losses(found), protocol,
        ranges=[str(span) for span in found.ranges],
        buckets=[str(bucket) for bucket in found.buckets],
        models=[_row(found, curve) for curve in found.curves],
    )  # fmt: skip


def foot_of(analysis: LossAnalysis, found: Losses) -> str:
    """What was measured, in a line under the picture."""
    return (
        f"{analysis.config.num} draws per bucket from {found.num_images} images of "
        f"{analysis.examples.source} ({analysis.split}), the same for all; bands: 95 %, pointwise, "
        f"over images"
    )


def _row(found: Losses, curve: Curve) -> dict[str, Any]:
    row = {
        "name": curve.name,
        "kind": curve.kind,
        "range": None if curve.span is None else str(curve.span),
        "loss": curve.loss,
        "loss_by_range": curve.range_losses,
        "losses": curve.losses.tolist(),
        "halves": curve.halves.tolist(),
    }
    if curve is found.curves[0]:
        return row
    return row | {
        "minus": found.curves[0].name,
        "difference": asdict(curve.overall),
        "difference_by_range": [asdict(one) for one in curve.by_range],
        "differences": curve.differences.tolist(),
        "difference_halves": curve.difference_halves.tolist(),
    }


def read_losses(found: Losses) -> str:
    """In a sentence: what each whole model gained or lost, and in which ranges."""
    first, others = found.curves[0], [c for c in found.curves[1:] if c.span is None]
    others = others or found.curves[1:]
    if not others:
        low, high = int(first.losses.argmin()), int(first.losses.argmax())
        return (
            f"the loss of {first.name} is {first.loss:.3g} over all timesteps, from "
            f"{first.losses[low]:.3g} in {found.buckets[low]} to {first.losses[high]:.3g} in "
            f"{found.buckets[high]}"
        )
    parts = []
    for curve in others:
        better, worse = _told(found, curve, -1), _told(found, curve, 1)
        words = [f"lower in {', '.join(better)}" if better else "lower in no range"]
        words += [f"higher in {', '.join(worse)}"] if worse else []
        change, half = (100 / first.loss * v for v in (curve.overall.mean, curve.overall.half))
        shown = f"{half:.1f}" if half == half else "?"  # one image alone has no interval
        parts.append(f"{curve.name} {change:+.1f} ± {shown} % ({', '.join(words)})")
    return f"loss over all timesteps against {first.name}: {'; '.join(parts)}"


def _told(found: Losses, curve: Curve, sign: int) -> list[str]:
    """Ranges in which the interval tells the change from 0, in the direction of `sign`."""
    pairs = zip(found.ranges, curve.by_range, strict=True)
    return [str(span) for span, one in pairs if one.is_told_from_zero and one.mean * sign > 0]

"""What finetuning does to the features of a network, block by block (the paper's figure 2).

Base and expert see the same draws (image, t, eps), t spread evenly over a range. After every block,
where the paper puts its projections, the features of both are compared as (B, C, P): B draws, C
channels, P places; tokens of transformers are places. block_change.py says what is told of them.
Half of the draws fit the channel-wise map, half test it; where there are fewer images than draws,
both halves see the same images under other noise. Only sums over draws are kept; what grows is C^2.
Then the same once more for each control, a network with random weight changes (random_change.py).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deme_cli.analysis.activations.block_change import (
    BlockChange,
    ProjectionDistance,
    block_change,
    block_sums,
    fit_map,
)
from deme_cli.analysis.activations.features import as_places, listening
from deme_cli.analysis.activations.found import ActivationChanges
from deme_cli.analysis.activations.random_change import randomly_changed
from deme_cli.analysis.draws import identity_of, spread_draws
from deme_cli.analysis.unfinished import Step, Unfinished
from deme_cli.analysis_config import ActivationConfig
from deme_cli.diffusion.backbones.backbone import Site
from deme_cli.diffusion.denoiser import Denoiser
from deme_cli.diffusion.projection import PREFIX, sites
from deme_cli.errors import ArtifactError, ConfigError, NumericsError
from deme_cli.settings import nearest
from deme_cli.timesteps import TimestepRange
from deme_cli.training.examples import Examples
from deme_cli.training.held_out import FixedDraws


@dataclass(frozen=True)
class ActivationAnalysis:
    """What is measured, opened; `names` are what the user called base and expert.

    block: the one to draw maps of, None for the one that changed most.
    """

    base: Denoiser
    expert: Denoiser
    names: tuple[str, str]
    examples: Examples
    config: ActivationConfig
    span: TimestepRange
    split: str
    output: Path
    block: str | None = None

    @property
    def sites(self) -> list[Site]:
        return sites(self.base.network, "block")

    @property
    def num_comparisons(self) -> int:
        """Draws of the expert and of all controls."""
        return self.config.num * (self.config.controls + 1)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the sums: they are used again only if all of it agrees.

        Not how many controls there are: those of the first ones are the same whatever follows.
        """
        return {
            "base": self.base.record.fingerprint,
            "expert": self.expert.record.fingerprint,
            "dtype": str(self.base.dtype),
            **identity_of(self.base.record, self.examples),
            "split": self.split,
            "range": str(self.span),
            "num": self.config.num,
            "seed": self.config.seed,
        }


def require_block(network: nn.Module, block: str | None, name: str) -> None:
    """Check that the network called `name` has this block; raises ConfigError with the nearest."""
    known = [site.path for site in sites(network, "block")]
    if block is not None and block not in known:
        raise ConfigError(f"--block {block}: no such block in {name}{nearest(block, known)}")


def measure_activations(
    analysis: ActivationAnalysis, *, force: bool = False
) -> Generator[Step | ActivationChanges]:
    """Compare the features; yields a `Step` per batch, and the `ActivationChanges` last.

    A comparison is one draw of base and expert, then, one after another, of base and each control.
    Sums are kept beside the output until the caller discards them, and used again unless `force`.
    Raises NumericsError on features that are not finite, ArtifactError where nothing changed,
    ConfigError on a range in which a flow schedule has no time, Stopped after a signal.
    """
    draws, found = _draws(analysis), []
    with Unfinished(analysis.output, analysis.identity, force=force) as kept:
        done, total = min(_done(kept), analysis.num_comparisons), analysis.num_comparisons
        note = f"continuing after {done} of {total} comparisons" if done else kept.note
        yield Step(done, note)
        for k in range(analysis.config.controls + 1):
            yield from _compare(analysis, draws, k, kept)
            found.append(_blocks(analysis, k, kept.arrays))
        blocks, *controls = found
        most = max(blocks, key=lambda block: block.size if block.size > 0 else 0.0)
        drawn = next((block for block in blocks if block.name == analysis.block), most)
        yield ActivationChanges(blocks, drawn, controls)


def _done(kept: Unfinished) -> int:
    return int(kept.arrays.get("done", [0])[0])


def _draws(analysis: ActivationAnalysis) -> FixedDraws:
    """In a random order, so that any part of them is spread over the range."""
    config = analysis.config
    return spread_draws(
        analysis.examples, analysis.base.schedule, [analysis.span], config.num,
        seed=config.seed, purpose="activations", batch_size=config.batch_size,
    )  # fmt: skip


def _compare(
    analysis: ActivationAnalysis, draws: FixedDraws, k: int, kept: Unfinished
) -> Iterator[Step]:
    """Add what is missing of the sums of the expert (k = 0), or of control k, as `k/block/name`."""
    num, batch_size = analysis.config.num, analysis.config.batch_size
    start, done = k * num, _done(kept) - k * num
    if done >= num:
        return
    base, changed = analysis.base.network, analysis.expert.network
    if k > 0:
        changed = randomly_changed(base, changed, seed=analysis.config.seed, k=k)
    while done < num:
        kept.done = f"{start + done} of {analysis.num_comparisons} comparisons"
        kept.check()
        stop = min(done + batch_size, num if done >= num // 2 else num // 2)
        if done == num // 2:
            _fit(analysis, k, kept.arrays)
        _add_batch(analysis, changed, draws, range(done, stop), k, kept.arrays)
        done = stop
        if done == num:
            for site in analysis.sites:
                del kept.arrays[f"{k}/{site.path}/map"]  # tested, and large
        kept.arrays["done"] = np.array([start + done])
        kept.save_now_and_then()
        yield Step(start + done)


def _fit(analysis: ActivationAnalysis, k: int, arrays: dict[str, np.ndarray]) -> None:
    """Solve for each block's map; what it is fitted by is no longer needed."""
    for site in analysis.sites:
        start = f"{k}/{site.path}/"
        if f"{start}map" not in arrays:
            gram, cross = (arrays.pop(f"{start}{key}") for key in ("gram", "cross"))
            arrays[f"{start}map"] = fit_map(gram, cross)


def _add_batch(
    analysis: ActivationAnalysis, changed: nn.Module, draws: FixedDraws, chosen: range, k: int,
    arrays: dict[str, np.ndarray],
) -> None:  # fmt: skip
    """Add the sums of these draws to `arrays`, all of them or, on an error, none."""
    before: dict[str, Tensor] = {}
    found: dict[str, np.ndarray] = {}

    def compare(path: str, features: Tensor) -> None:
        start = f"{k}/{path}/"
        base, grid = as_places(before.pop(path), draws.examples.shape)
        delta = as_places(features, draws.examples.shape)[0] - base
        fitted = arrays.get(f"{start}map")
        sums = block_sums(
            base, delta, None if fitted is None else torch.from_numpy(fitted).to(base.device)
        )
        require_finite(sums, path, analysis.names, k)
        found[f"{start}grid"] = np.array(grid)
        for key, value in sums.items():
            found[start + key] = arrays.get(start + key, 0.0) + value.cpu().numpy()

    indices = torch.arange(chosen.start, chosen.stop)
    for network, take in ((analysis.base.network, before.__setitem__), (changed, compare)):
        with listening(network, analysis.sites, take):
            draws.outputs(network, indices)
    arrays.update(found)


def require_finite(sums: dict[str, Tensor], path: str, names: tuple[str, str], k: int) -> None:
    """Check the sums of the base and of the expert (k = 0) or control k; raises NumericsError."""
    base, expert = (bool(sums[key].isfinite().all()) for key in ("base_moments", "squares"))
    if base and not expert and k > 0:
        raise NumericsError(
            f"the features after {path} are not finite with random weight changes as large as "
            f"those of {names[1]}; leave them out with --controls 0"
        )
    for finite, name in zip((base, expert), names, strict=True):
        if not finite:
            raise NumericsError(
                f"{name}: the features after {path} are not finite; the model's weights are broken"
            )


def projection_distances(network: nn.Module) -> dict[str, ProjectionDistance]:
    """How far each block's own projection is from the identity, by block; {} where there is none.

    Projections trained as `fold` are part of other layers and have no matrix of their own.
    """
    parameters, found = dict(network.named_parameters()), {}
    for site in sites(network, "block"):
        weight = parameters.get(f"{PREFIX}.{site.path.replace('.', '_')}.weight")
        if weight is not None:
            matrix = weight.detach().cpu().double()
            difference = matrix - torch.eye(len(matrix), dtype=matrix.dtype)
            found[site.path] = ProjectionDistance(
                float(difference.norm()) / len(matrix) ** 0.5,
                float(torch.linalg.matrix_norm(difference, ord=2)),
            )
    return found


def _blocks(
    analysis: ActivationAnalysis, k: int, arrays: dict[str, np.ndarray]
) -> list[BlockChange]:
    """What the sums of one pass say. Raises ArtifactError where the expert changed no block."""
    distances = projection_distances(analysis.expert.network) if k == 0 else {}
    blocks = []
    for site in analysis.sites:
        start = f"{k}/{site.path}/"
        sums = {n.removeprefix(start): a for n, a in arrays.items() if n.startswith(start)}
        rows, columns = sums["grid"].tolist()
        blocks.append(
            block_change(
                site.path, sums, analysis.config.num, (rows, columns), distances.get(site.path)
            )
        )
    if k == 0 and not any(block.size > 0 for block in blocks):
        base, expert = analysis.names
        raise ArtifactError(
            f"{expert}: its features are those of {base} after every block; nothing was finetuned"
        )
    return blocks

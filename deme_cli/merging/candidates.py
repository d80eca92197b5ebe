"""Candidate weights in memory: one network, set to theta + sum_i w_i tau_i again and again.

With `hold` base and parents are kept in float32 on the device, so a candidate costs a few passes
over the weights and no allocation. Without, they are read from their files piece by piece each
time, which takes the memory of one network whatever their number. tau_i are as the method makes
them, by the functions that write the merged file; `slopes` are the derivatives along them.
N parents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from deme_cli.artifacts import load_tensors
from deme_cli.diffusion.denoiser import Denoiser, assemble, choose_device
from deme_cli.errors import ConfigError
from deme_cli.merging.coefficients import Coefficients
from deme_cli.merging.differences import Differences, float_runs
from deme_cli.merging.lineage import Family
from deme_cli.merging.methods.known import LINEAR, MethodSettings, fit_coefficients, open_method
from deme_cli.merging.pieces import COMPUTED_IN, PIECE, Run, Sources
from deme_cli.merging.sums import Sums


class CandidateNetwork:
    """A denoiser whose weights are those of the coefficients it was last given."""

    def __init__(
        self,
        family: Family,
        *,
        device: str,
        dtype: str,
        method: MethodSettings = LINEAR,
        hold: bool = True,
    ) -> None:
        self._family, self._settings = family, method
        self._method = open_method(family, method)
        theta = load_tensors(family.base.path)
        for spec in family.projections:
            theta[spec.name] = torch.eye(spec.shape[0])
        where = str(family.base.path)
        self._denoiser = assemble(family.base_record, theta, where, device=device, dtype=dtype)
        del theta
        self._held = self._read_all(choose_device(device)) if hold else None

    @torch.no_grad()
    def at(self, coefficients: Coefficients | Sequence[float] | None) -> Denoiser:
        """The denoiser of these coefficients; valid until the next call.

        None: 1/N each, or what the method finds itself. Integers stay the base's. Raises
        ConfigError where the coefficients do not fit.
        """
        fitted = fit_coefficients(self._family, coefficients, self._settings)
        weights = self._denoiser.network.state_dict()
        if self._held is None:
            self._stream(fitted, weights)
            return self._denoiser
        for name, sources in self._held.items():
            parameter = weights[name]
            total = parameter if parameter.dtype == torch.float32 else parameter.float()
            total.zero_()
            for source, c in self._method.terms(name, fitted.of(name)):
                total.add_(sources[source], alpha=c)
            if total is not parameter:
                parameter.copy_(total)
        return self._denoiser

    def slopes(self) -> dict[str, tuple[float, ...]]:
        """dL/dw_i by tensor: the N inner products <grad, tau_i> of each parameter with a `.grad`.

        In float64, streamed from the files. Raises ConfigError for a method whose weights are not
        linear in the coefficients.
        """
        if not self._method.is_linear:
            raise ConfigError(f"method {self._settings.name} has no slopes; use another --search")
        parameters = dict(self._denoiser.network.named_parameters())
        slopes = {}
        with Sources(self._family.headers) as sources:
            differences = Differences(sources, self._family)
            for run in float_runs(self._family):
                name = run.specs[0].name
                grad = parameters[name].grad if name in parameters else None
                if grad is not None:
                    slopes[name] = self._slope(differences, run, grad.reshape(-1))
        return slopes

    def _slope(self, differences: Differences, run: Run, grad: Tensor) -> tuple[float, ...]:
        """<grad, tau_i> for the parents of one tensor."""
        transform, total = self._method.transform, np.zeros(len(self._family.parents))
        wide = None if transform else np.dtype(np.float64)
        for start, stop in run.spans(PIECE):
            _, taus = differences.read(run, start, stop, wide)
            if transform:
                transform(run.specs[0].name, start, taus)
            piece = grad[start:stop].to("cpu", torch.float64).numpy()
            total += [float((tau * piece).sum()) for tau in taus]
        return tuple(total.tolist())

    def _stream(self, coefficients: Coefficients, weights: dict[str, Tensor]) -> None:
        """Put the sums into the network's tensors, piece by piece from the files."""
        totals = {dtype: np.empty(PIECE, dtype) for dtype in set(COMPUTED_IN.values())}
        for sums, run in self._runs():
            name = run.specs[0].name
            flat = weights[name].view(-1)
            terms = self._method.terms(name, coefficients.of(name))
            for start, stop in run.spans(PIECE):
                total = totals[COMPUTED_IN[run.dtype]][: stop - start]
                sums.add_up(run, start, terms, total)
                flat[start:stop].copy_(torch.from_numpy(total))

    def _read_all(self, place: torch.device) -> dict[str, Tensor]:
        """theta and what the terms count of every parent, (N + 1, *shape) in float32 by name."""
        held = {}
        for sums, run in self._runs():
            count, (spec,) = len(self._family.parents) + 1, run.specs
            rows = np.empty((count, spec.num_elements), np.float32)
            for start, stop in run.spans(PIECE):
                sums.each(run, start, rows[:, start:stop])
            held[spec.name] = torch.from_numpy(rows).view(count, *spec.shape).to(place)
        return held

    def _runs(self) -> Iterator[tuple[Sums, Run]]:
        """The floating-point tensors one by one, with the open files to add them up from."""
        with (
            Sources(self._family.headers) as sources,
            np.errstate(over="ignore", invalid="ignore"),  # the objective will not be finite
        ):
            sums = Sums(sources, self._family, self._method)
            for run in float_runs(self._family):
                yield sums, run

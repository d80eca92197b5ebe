"""Candidates in memory: one network, set to theta + sum_i w_i tau_i again and again, and measured.

Base and experts are read from their files piece by piece each time, by the functions that write the
merged file, which takes the memory of one network whatever their number; a candidate is the merged
file bit for bit. `slopes` are the derivatives along the tau_i as the method makes them.
N experts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deme_cli.artifacts import load_tensors
from deme_cli.diffusion.denoiser import Denoiser, assemble
from deme_cli.errors import ArtifactError, ConfigError
from deme_cli.merging.coefficients import Coefficients
from deme_cli.merging.inputs import Inputs
from deme_cli.merging.methods import LINEAR, MethodSettings, fit_coefficients, open_method
from deme_cli.merging.objectives import HeldOutLoss, Objective
from deme_cli.merging.space import BY_RANGE, SLOPES, SOUP_NAME, Point, Space
from deme_cli.merging.tensor_stream import COMPUTED_IN, PIECE, Run, TensorStream, float_runs
from deme_cli.sampling.ensemble import SamplingExpert, single
from deme_cli.timesteps import TimestepRange, require_cover
from deme_cli.training.batches import Check


class CandidateNetwork:
    """A denoiser whose weights are those of the coefficients it was last given."""

    def __init__(
        self, inputs: Inputs, *, device: str, dtype: str, method: MethodSettings = LINEAR
    ) -> None:
        self._inputs, self._settings = inputs, method
        self._method = open_method(inputs, method)
        theta = load_tensors(inputs.base.path)
        for spec in inputs.projections:
            theta[spec.name] = torch.eye(spec.shape[0])
        where = str(inputs.base.path)
        self._denoiser = assemble(inputs.base_record, theta, where, device=device, dtype=dtype)

    @torch.no_grad()
    def at(self, coefficients: Coefficients | Sequence[float] | None) -> Denoiser:
        """The denoiser of these coefficients; valid until the next call.

        None: 1/N each, or what the method finds itself. Integers stay the base's. Raises
        ConfigError where the coefficients do not fit.
        """
        fitted = fit_coefficients(self._inputs, coefficients, self._settings)
        weights = self._denoiser.network.state_dict()
        totals = {dtype: np.empty(PIECE, dtype) for dtype in set(COMPUTED_IN.values())}
        for stream, run in self._runs():
            name = run.specs[0].name
            flat = weights[name].view(-1)
            terms = self._method.terms(name, fitted.of(name))
            for start, stop in run.spans(PIECE):
                total = totals[COMPUTED_IN[run.dtype]][: stop - start]
                stream.add_up(run, start, terms, total)
                flat[start:stop].copy_(torch.from_numpy(total))
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
        for stream, run in self._runs():
            name = run.specs[0].name
            grad = parameters[name].grad if name in parameters else None
            if grad is not None:
                slopes[name] = self._slope(stream, run, grad.reshape(-1))
        return slopes

    def _slope(self, stream: TensorStream, run: Run, grad: Tensor) -> tuple[float, ...]:
        """<grad, tau_i> for the experts of one tensor."""
        total = np.zeros(len(self._inputs.experts))
        for start, stop in run.spans(PIECE):
            if self._method.transform:
                _, taus = stream.counted(run, start, stop)
            else:
                _, taus = stream.vectors(run, start, stop, np.dtype(np.float64))
            piece = grad[start:stop].to("cpu", torch.float64).numpy()
            total += [float((tau * piece).sum()) for tau in taus]
        return tuple(total.tolist())

    def _runs(self) -> Iterator[tuple[TensorStream, Run]]:
        """The floating-point tensors one by one, with the open files."""
        with (
            TensorStream(self._inputs, self._method.transform) as stream,
            np.errstate(over="ignore", invalid="ignore"),  # the objective will not be finite
        ):
            for run in float_runs(self._inputs):
                yield stream, run


class Evaluator:
    """Objectives of candidates, by stage; `with_slopes`: stage 0 gives the gradient as well."""

    def __init__(
        self, inputs: Inputs, space: Space, *, method: MethodSettings, device: str, dtype: str,
        with_slopes: bool = False,
    ) -> None:  # fmt: skip
        self.inputs, self.space, self.with_slopes = inputs, space, with_slopes
        self._method, self._device, self._dtype = method, device, dtype
        self.objectives: Sequence[Objective] = ()
        self.check: Check = lambda *progress: None

    @cached_property
    def network(self) -> CandidateNetwork:
        """Loaded when the first candidate comes."""
        return self._open(self._method)

    @cached_property
    def _linear(self) -> CandidateNetwork:
        """The network of linear combinations, whatever the method."""
        return self.network if self._method.name == "linear" else self._open(LINEAR)

    def _open(self, method: MethodSettings) -> CandidateNetwork:
        return CandidateNetwork(self.inputs, method=method, device=self._device, dtype=self._dtype)

    def __call__(self, stage: int, point: Point, name: str = "") -> tuple[float, dict[str, Any]]:
        """The objective of a stage at `point`, where the reference `name` lies, if any; and what
        else came with it."""
        objective = self.objectives[stage]
        denoiser = self.network.at(self.space.coefficients(point))
        if stage == 0 and self.with_slopes and name != SOUP_NAME:
            assert isinstance(objective, HeldOutLoss)
            value = objective.value_and_gradient(denoiser, self.check)
            if not math.isfinite(value):
                return value, {}
            return value, {SLOPES: self.space.slopes(self.network.slopes())}
        if isinstance(objective, HeldOutLoss):
            errors = objective.errors(single(denoiser), self.check)
            by_range = objective.by_range(errors, self.ranges)
            return errors.mean().item(), {BY_RANGE: by_range}
        return objective(single(denoiser), self.check, self._key(point)), {}

    def _key(self, point: Point) -> str:
        """Everything that makes the candidate's weights: what is kept under it may outlive a search
        that was given up, and the next one has other experts."""
        experts = [expert.record.fingerprint for expert in self.inputs.experts]
        space, method = self.space, [self._method.name, self._method.used]
        return json.dumps(
            [self.inputs.base_record.fingerprint, experts, method, self._dtype,
             space.all_groups, dict(space.fixed), point]
        )  # fmt: skip

    @property
    def ranges(self) -> list[TimestepRange]:
        """Those of the experts, from low timesteps to high."""
        return sorted({expert.record.timesteps for expert in self.inputs.experts})

    def at(self, coefficients: Coefficients | None) -> list[SamplingExpert]:
        """The method's network for these coefficients, None for those it finds itself or 1/N; valid
        until the next one is asked for."""
        return single(self.network.at(coefficients))

    def linear(self, coefficients: Sequence[float]) -> list[SamplingExpert]:
        """theta + sum_i w_i tau_i with the same N coefficients everywhere; valid until the next."""
        return single(self._linear.at(coefficients))

    def ensemble(self) -> list[SamplingExpert]:
        """The experts, each in its range, taking turns in the one network (Eq. 7).

        Of several experts of one range the first counts. Raises ArtifactError where they do not
        cover [0, T) once.
        """
        experts = self.inputs.experts
        return [
            SamplingExpert(experts[index].record.timesteps, partial(self._expert, index))
            for index in first_of_each_range(self.inputs)
        ]

    def _expert(self, index: int) -> Denoiser:
        return self._linear.at([float(i == index) for i in range(self.space.num_experts)])


def first_of_each_range(inputs: Inputs) -> list[int]:
    """Numbers of the experts that make the ensemble, in the order of their ranges.

    Raises ArtifactError where these do not cover [0, T) once.
    """
    first: dict[TimestepRange, int] = {}
    for index in inputs.by_range:
        first.setdefault(inputs.experts[index].record.timesteps, index)
    require_cover(list(first), inputs.base_record.num_train_timesteps)
    return list(first.values())


def has_ensemble(inputs: Inputs) -> bool:
    """Whether the experts cover [0, T) once."""
    try:
        first_of_each_range(inputs)
    except ArtifactError:
        return False
    return True

"""Candidates in memory: one network, set to theta + sum_i w_i tau_i again and again, and measured.

Base and experts are read from their files piece by piece each time, by the functions that write the
merged file, which takes the memory of one network whatever their number; a candidate is the merged
file bit for bit. `slopes` are the derivatives along the tau_i as the method makes them.
N experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial

import numpy as np
import torch

from deme_cli.artifacts import load_tensors
from deme_cli.config import EvalConfig, FinetuneConfig, MergeConfig, SampleConfig
from deme_cli.data.images import open_images
from deme_cli.data.prompts import PromptSet, read_prompts
from deme_cli.diffusion.backbones import backbone_of
from deme_cli.diffusion.companions import open_companions
from deme_cli.diffusion.denoiser import Denoiser, assemble
from deme_cli.diffusion.lora import low_rank_factors
from deme_cli.diffusion.schedule import read_schedule
from deme_cli.errors import ArtifactError, ConfigError
from deme_cli.evaluation.features import Extractor, load_extractor
from deme_cli.evaluation.references import open_reference
from deme_cli.merging.coefficients import Coefficients, Point
from deme_cli.merging.factors import merged_factors
from deme_cli.merging.inputs import COMPUTED_IN, Inputs
from deme_cli.merging.methods import LINEAR, METHODS, MethodSettings, fit_coefficients
from deme_cli.merging.objectives import ExpertsLoss, GeneratedDistance, HeldOutLoss, Objective
from deme_cli.merging.plan import SEARCH, MergePlan
from deme_cli.merging.search import SOUP_NAME, Stage
from deme_cli.merging.tensor_stream import PIECE, Run, TensorStream, float_runs
from deme_cli.sampling.conditioning import open_conditioning
from deme_cli.sampling.ensemble import SamplingExpert, single
from deme_cli.sampling.scheduler import name_sampler
from deme_cli.training.batches import Check
from deme_cli.training.examples import Examples, name_companions, open_examples


class CandidateNetwork:
    """A denoiser whose weights are those of the coefficients it was last given."""

    def __init__(
        self, inputs: Inputs, *, device: str, dtype: str, method: MethodSettings = LINEAR
    ) -> None:
        self._inputs, self._settings = inputs, method
        self._method = METHODS[method.name](inputs, method)
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
            flat, terms = weights[name].view(-1), self._method.terms(name, fitted.of(name))
            for start, stop in run.spans(PIECE):
                total = totals[COMPUTED_IN[run.dtype]][: stop - start]
                stream.add_up(run, start, terms, total)
                flat[start:stop].copy_(torch.from_numpy(total))
        return self._denoiser

    @torch.no_grad()
    def as_lora(self, coefficients: Coefficients | Sequence[float] | None, rank: int) -> Denoiser:
        """The denoiser of these coefficients as a LoRA of `rank` holds it, until the next call.

        The experts hold adapters, of which a lower rank than the sum of theirs keeps a part.
        """
        fitted = fit_coefficients(self._inputs, coefficients, self._settings)
        terms = {spec.name: self._method.terms(spec.name, fitted.of(spec.name))
                 for spec in self._inputs.specs}  # fmt: skip
        sides, _ = merged_factors(self._inputs, terms, rank)
        tensors = {name: torch.from_numpy(side) for name, side in sides.items()}
        denoiser = self.at([0.0] * len(self._inputs.experts))
        record, weights = self._inputs.base_record, denoiser.network.state_dict()
        factors = low_rank_factors(tensors, record.model_config, "the merge")
        for layer, pair in factors.items():
            weight = weights[f"{layer}.weight"]
            weight.add_(pair.change().view_as(weight).to(weight))
        return denoiser

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
            if name not in parameters or (grad := parameters[name].grad) is None:
                continue
            flat, total = grad.reshape(-1), np.zeros(len(self._inputs.experts))
            for start, stop in run.spans(PIECE):
                wide = None if stream.transform else np.dtype(np.float64)
                _, taus = stream.vectors(run, start, stop, wide)
                piece = flat[start:stop].to("cpu", torch.float64).numpy()
                total += [float((tau * piece).sum()) for tau in taus]
            slopes[name] = tuple(total.tolist())
        return slopes

    def _runs(self) -> Iterator[tuple[TensorStream, Run]]:
        """The floating-point tensors one by one, with the open files."""
        with (
            TensorStream(self._inputs, self._method.transform) as stream,
            np.errstate(over="ignore", invalid="ignore"),  # the objective will not be finite
        ):
            for run in float_runs(self._inputs):
                yield stream, run


class Workbench:
    """What candidates of a plan are and what they are measured by; all is loaded once."""

    def __init__(self, plan: MergePlan) -> None:
        self.plan, self.inputs = plan, plan.inputs
        self.record = name_companions(plan.inputs.base_record, plan.pipeline)
        self._networks: dict[MethodSettings, CandidateNetwork] = {}

    def network(self, method: MethodSettings | None = None) -> CandidateNetwork:
        """The network that combines by the plan's method, or another."""
        plan, method = self.plan, method or self.plan.method
        if method not in self._networks:
            self._networks[method] = CandidateNetwork(
                self.inputs, method=method, device=plan.device, dtype=plan.dtype
            )
        return self._networks[method]

    def at(
        self, coefficients: Coefficients | Sequence[float] | None,
        method: MethodSettings | None = None,
    ) -> list[SamplingExpert]:  # fmt: skip
        """The network for these coefficients, None for those its method finds itself or 1/N; valid
        until the next one is asked for. method: another than the plan's."""
        return single(self.network(method).at(coefficients))

    def written(self, coefficients: Coefficients | None) -> list[SamplingExpert]:
        """The network as the merged file holds it: with `--lora`, what its rank keeps."""
        if rank := self.plan.settings.lora:
            return single(self.network().as_lora(coefficients, rank))
        return self.at(coefficients)

    def ensemble(self) -> list[SamplingExpert]:
        """The experts, each in its range, taking turns in the one network (Eq. 7).

        Raises ArtifactError where they do not cover [0, T) once.
        """
        if self.inputs.ensemble is None:
            raise ArtifactError(
                "the experts do not cover all timesteps once: there is no ensemble to compare with"
            )
        experts = self.inputs.experts

        def load(index: int) -> Denoiser:
            return self.network(LINEAR).at([float(i == index) for i in range(len(experts))])

        return [
            SamplingExpert(experts[index].record.timesteps, partial(load, index))
            for index in self.inputs.ensemble
        ]

    @cached_property
    def examples(self) -> Examples:
        """The held-out images."""
        plan = self.plan
        companions = open_companions(
            self.record, pipeline=plan.pipeline, device=plan.device, dtype=plan.dtype
        )
        return open_examples(
            plan.images, companions, split="held-out", beside=self.inputs.base.path.parent,
            cache=plan.run.settings(FinetuneConfig).cache,
        )  # fmt: skip

    @cached_property
    def extractor(self) -> Extractor:
        resize = self.plan.run.settings(EvalConfig).resize
        return load_extractor(self.plan.features, resize=resize, device=self.plan.device)

    def open(self, stage: Stage, config: MergeConfig, part: int = SEARCH) -> Objective:
        """The objective of a stage with the seed of `config`; part: SEARCH or REPORT."""
        config = replace(config, num=stage.num)
        if stage.is_distance:
            return self._distance(stage, config, part)
        schedule = read_schedule(self.record.scheduler_config)
        if stage.name == "loss":
            return HeldOutLoss(self.examples, schedule, config, part)
        return ExpertsLoss(self.examples, schedule, config, self.ensemble(), part)

    def _distance(self, stage: Stage, config: MergeConfig, part: int) -> GeneratedDistance:
        """Candidates draw classes in turn; prompts in turn, those of [sample], else the captions of
        the training images from the first on; or nothing in particular.

        Images of a reference come at their own size, or, where a VAE has a size of its own, at that
        of what is drawn.
        """
        plan, prompts = self.plan, None
        sample = plan.run.settings(
            SampleConfig, num=config.num, steps=config.steps, seed=config.seed,
            batch_size=config.batch_size,
        )  # fmt: skip
        if sample.prompts:
            sample = replace(sample, prompts=plan.run.seen(sample.prompts))
        sample = name_sampler(self.record, sample)
        if backbone_of(self.record.model_config).wants == "text":
            sample, images = replace(sample, per_prompt=1), plan.images
            if sample.prompts:
                given = read_prompts(sample.prompts, column=sample.prompt_column)
                prompts = replace(given, cycles=True)
            else:
                data = open_images(
                    images.source, shape=(3, 8, 8), wants="text", captions=images.captions,
                    keep=False,
                )  # fmt: skip
                captions = tuple(data.captions(range(len(data))))
                prompts = PromptSet(f"captions of {images.source}", captions, cycles=True)
        conditioning = open_conditioning(
            self.record, sample, prompts=prompts, pipeline=plan.pipeline,
            device=plan.device, dtype=plan.dtype,
        )  # fmt: skip
        is_kernel = stage.name == "kid"
        shape = conditioning.image_shape if is_kernel or conditioning.has_latents else None
        reference = plan.reference(stage.name, part)
        opened = open_reference(reference, self.extractor, shape, needs_images=is_kernel)
        return GeneratedDistance(self.extractor, opened, sample=sample, conditioning=conditioning)

    def evaluate(
        self, objectives: Sequence[Objective], check: Check, stage: int, point: Point, name: str
    ) -> tuple[float, list[float] | None]:
        """The objective of a stage at a point of the search, and in a descent its slopes."""
        search, objective = self.plan.search, objectives[stage]
        assert search, "only a search has points"
        denoiser = self.network().at(search.space.coefficients(point))
        if stage or search.method != "gradient" or name == SOUP_NAME:
            return objective(single(denoiser), check), None
        assert isinstance(objective, HeldOutLoss)
        value = objective.draws.loss_and_gradient(denoiser.network, check)
        slopes = search.space.slopes(self.network().slopes()) if math.isfinite(value) else None
        return value, slopes

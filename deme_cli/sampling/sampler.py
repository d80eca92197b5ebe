"""Draw images from one denoiser or from an ensemble of experts, range by range.

B batch, C channels, h x w pixels of latents, H x W of images. Image i starts from noise of its own
generator, and fresh noise in stochastic samplers comes from the same one, so it depends on (seed,
i) and its conditions alone. Expert i denoises the timesteps of its range, whatever their place in
the step list (Eq. 7); samplers that evaluate twice per step ask for the expert of each evaluation.
So an ensemble costs what one model costs. Where its experts do not fit into memory together, a
chunk of batches passes through one after another.

Compiling takes a minute, copying weights on a GPU about as long as reading them twice. So experts,
and the models of a table, are copied in place into the network of the one step that is compiled.
Of several processes each draws its share of the batches, whole ones. Writing images anywhere is not
done here.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from deme_cli.config import SampleConfig
from deme_cli.diffusion.conditions import Conditions, select, to
from deme_cli.diffusion.denoiser import Denoiser
from deme_cli.diffusion.execution import (
    compile_calls,
    fitting_number,
    is_compiled,
    using_threads,
)
from deme_cli.distributed import ALONE, JointStopRequests, Lost, World
from deme_cli.errors import NumericsError
from deme_cli.sampling.conditioning import Conditioning, conditioning_of
from deme_cli.sampling.ensemble import SamplingExpert
from deme_cli.sampling.scheduler import name_sampler, take_step
from deme_cli.timesteps import route

CHUNK_BYTES = 1 << 30  # state of the images that pass through the experts together
DECODED_PIXELS = 1 << 20  # images decoded together: a VAE takes some GiB for this many pixels
_STATE_TENSORS = 6  # x_t, and at most five more that a multistep scheduler remembers
_GENERATOR_BYTES = 5_100  # a Mersenne twister as torch keeps it
_LISTEN_SECONDS = 0.2  # all processes ask one store, and steps may take a millisecond

T = TypeVar("T")


def image_seed(seed: int, index: int) -> int:
    """The seed of image `index`: 63 bits, so that it fits an int64."""
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def image_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """A generator for each image, so that its noise depends on no other image."""
    return [torch.Generator().manual_seed(image_seed(seed, index)) for index in indices]


def seeded_noise(seed: int, shape: tuple[int, int, int], indices: Sequence[int]) -> Tensor:
    """Standard normal noise (B, *shape), that of each image from its own generator."""
    generators = image_generators(seed, indices)
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


class Step(nn.Module):
    """What the network says in one step, as one graph, with classifier-free guidance.

    eps = eps(null) + g (eps(c) - eps(null))  (Ho & Salimans 2022, Eq. 6). g counts as in diffusers,
    where 1 is no guidance; theirs is w = g - 1. The formula is linear, so it holds for v, x_0 and
    velocities as well. Both predictions come from one forward of batch 2B.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser, self.network = denoiser, denoiser.network
        self._backbone, self._dtype = denoiser.backbone, denoiser.dtype

    def forward(
        self, x_t: Tensor, t: Tensor, conditions: Conditions, *, scale: float | None
    ) -> Tensor:
        """The prediction at (x_t, t), guided where there is a scale.

        x_t: (B, C, h, w) float32   t: ()   conditions: of batch B, or 2B with the null first where
        there is a scale, in the network's dtype   ->   (B, C, h, w) float32
        """
        x_t = x_t.to(self._dtype)
        if scale is None:
            return self._backbone.predict(self.network, x_t, t, conditions).float()
        pair = self._backbone.predict(self.network, torch.cat([x_t, x_t]), t, conditions).float()
        null, conditional = pair.chunk(2)
        return null + scale * (conditional - null)


class CompiledSteps:
    """Compiled steps by structure. how, num_forwards: as `is_compiled` takes them.

    num_loads: how many denoisers will come; the network of a single one is not copied.
    """

    def __init__(self, how: str, *, num_forwards: int, num_loads: int) -> None:
        self._how, self._num_forwards, self._num_loads = how, num_forwards, num_loads
        self._steps: dict[Hashable, Step] = {}

    def is_on(self, device: torch.device) -> bool:
        """Whether steps are compiled on `device`. Raises what `is_compiled` raises."""
        return is_compiled(device, self._how, num_forwards=self._num_forwards)

    @torch.no_grad()
    def carry(self, denoiser: Denoiser) -> Step:
        """The step of `denoiser`, compiled, until the next one is carried; a plain one if off.

        Where it is compiled the weights are copied, so that `denoiser` may be let go. A network of
        another structure (block projections, another config) gets a step of its own.
        """
        if not self.is_on(denoiser.device):
            return Step(denoiser)
        own = _tensors(denoiser.network)
        config = json.dumps(denoiser.record.model_config, sort_keys=True)
        key = config, tuple((name, t.shape, t.dtype, t.device) for name, t in own.items())
        step = self._steps.get(key)
        if step is None:
            if self._num_loads > 1:
                denoiser = replace(denoiser, network=copy.deepcopy(denoiser.network))
            step = self._steps[key] = Step(denoiser)
            compile_calls(step, self._how)
        elif step.network is not denoiser.network:
            torch._foreach_copy_([*_tensors(step.network).values()], [*own.values()])
            step.denoiser = replace(denoiser, network=step.network)
        return step


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


UNCOMPILED = CompiledSteps("off", num_forwards=0, num_loads=0)


class HeldExperts:
    """Experts in memory: all that were taken where a GPU takes them all, else only the last one.

    compiled: what their steps go through; it has weights of its own where it is on.
    """

    def __init__(self, experts: Sequence[SamplingExpert], compiled: CompiledSteps) -> None:
        self._experts, self._compiled = experts, compiled
        self._held: dict[int, Denoiser] = {}
        self._turn: tuple[int, Step] | None = None
        self.holds_all = True  # until the first one tells how large it is

    def take(self, index: int) -> Step:
        """The step of expert `index`, good until the next one is taken."""
        if self._turn is None or self._turn[0] != index:
            is_first, self._turn = self._turn is None, None  # leaves memory before the next comes
            denoiser = self._held.get(index) or self._experts[index].load()
            if is_first:
                self.holds_all = fit_in_memory(denoiser, len(self._experts))
            if self.holds_all and len(self._experts) > 1:
                self._held[index] = denoiser
            self._turn = index, self._compiled.carry(denoiser)
        return self._turn[1]


def fit_in_memory(denoiser: Denoiser, num: int) -> bool:
    """Whether `num` like this one take at most half of a GPU's free memory; on others, yes."""
    if denoiser.device.type != "cuda" or num == 1:
        return True
    free, _ = torch.cuda.mem_get_info(denoiser.device)
    return num * sum(tensor.nbytes for tensor in _tensors(denoiser.network).values()) <= free / 2


@dataclass(frozen=True)
class ImageBatch:
    """Finished images start .. start + B - 1."""

    start: int
    images: np.ndarray  # uint8 (B, H, W, C)


def sample_images(
    experts: Sequence[SamplingExpert], config: SampleConfig, *,
    conditioning: Conditioning | None = None, first: int = 0, world: World = ALONE,
    compiled: CompiledSteps = UNCOMPILED,
) -> Iterator[int | ImageBatch]:  # fmt: skip
    """Draw the images first .. num - 1 of `config.seed`, in order.

    Yields after every forward how much is done, in images, those before `first` included, and an
    ImageBatch for every finished batch. The experts' ranges must cover [0, T) once. Without a
    conditioning, `config` and the model's own record make it. A process of `world` draws its share
    of the batches, talking to nobody, and counts no others. `compiled`: what steps go through;
    where it is on, in batches of one size, and images change by rounding.
    Raises ConfigError if the sampler does not fit the model, ArtifactError if the frozen parts
    around it are others than its base's, NumericsError on non-finite images.
    """
    held = HeldExperts(experts, compiled)
    ranges = [expert.range for expert in experts]
    model = held.take(ranges.index(max(ranges))).denoiser  # the one that sees the noise first
    about = conditioning or conditioning_of(model, config)
    assert config.num in (None, about.num), "the conditioning is of another number of images"
    config = name_sampler(model.record, config)
    scheduler = about.scheduler(model.record, config)
    about.load()
    like = torch.empty(0, dtype=model.dtype, device=model.device)
    size = min(config.batch_size, about.num - first) if compiled.is_on(model.device) else 0
    threads = _fitting_threads(model, about, config)
    del model  # so that `held` alone keeps it
    times = zip(scheduler.timesteps.tolist(), scheduler.timesteps.to(like.device), strict=True)
    runs = [(i, list(run)) for i, run in groupby(times, key=lambda at: route(at[0], ranges))]
    num_steps = len(scheduler.timesteps)
    own, done = Shares(about.num, config.batch_size, first, world).own, first * num_steps
    chunk = 1 if held.holds_all else _batches_per_chunk(about, config)
    for begin in range(0, len(own), chunk):
        batches = [
            draw_batch(span, about, like, scheduler=scheduler, config=config, size=size)
            for span in own[begin : begin + chunk]
        ]
        for run in runs:
            expert, steps = run
            for batch in batches:
                for t, on_device in steps:
                    with using_threads(threads):
                        batch.denoise(held.take(expert), t, on_device, config)
                    done += batch.num
                    yield done // num_steps
                if run is runs[-1]:
                    yield ImageBatch(batch.start, finish_images(batch, about, config))


def _fitting_threads(denoiser: Denoiser, about: Conditioning, config: SampleConfig) -> int:
    def inputs() -> tuple[Tensor, Conditions]:  # every image comes twice for a guidance pair
        x_t = torch.zeros(1 + about.is_paired, *about.latent_shape, dtype=denoiser.dtype)
        return x_t, to(about.conditions(0, 1), x_t.device, denoiser.dtype)

    return fitting_number(denoiser.network, inputs, num_images=config.batch_size)


@torch.inference_mode()
def _batches_per_chunk(about: Conditioning, config: SampleConfig) -> int:
    """Batches whose state stays within CHUNK_BYTES, at least one."""
    per_image = 4 * _STATE_TENSORS * math.prod(about.latent_shape) + _GENERATOR_BYTES
    per_image += sum(value.nbytes for value in about.conditions(0, 1).values())
    return max(1, CHUNK_BYTES // per_image // config.batch_size)


@dataclass
class Batch:
    """`num` images under way from noise to x_0, with what their scheduler remembers.

    Up to B, the last one comes again and again: a compiled step takes batches of one size.
    """

    start: int
    num: int
    generators: list[torch.Generator]
    scheduler: Any
    x_t: Tensor  # (B, C, h, w) float32
    conditions: Conditions  # batch B, or 2B for guidance
    guidance: float | None  # where conditions come in pairs

    @torch.inference_mode()
    def denoise(self, step: Step, t: float, on_device: Tensor, config: SampleConfig) -> None:
        """Advance by one step, t given twice, on the network's device as (). The network works in
        its own dtype, the sampler in float32, on its own scale of x_t (Euler, LMS)."""
        scale = getattr(self.scheduler, "scale_model_input", None)  # flow samplers have none
        x_t = scale(self.x_t, t) if scale else self.x_t
        output = step(x_t, on_device, self.conditions, scale=self.guidance)
        self.x_t = take_step(
            self.scheduler, output, t, self.x_t, config=config, generators=self.generators
        )


@torch.inference_mode()
def draw_batch(
    span: range, about: Conditioning, like: Tensor, *, scheduler: Any, config: SampleConfig,
    size: int,
) -> Batch:  # fmt: skip
    """The images of `span` at the first timestep, in a batch of at least `size`.

    like: of the network's device and dtype.
    """
    num = len(span)
    rows = [*range(num), *[num - 1] * (size - num)]
    generators = image_generators(config.seed, [span[row] for row in rows])
    noise = torch.stack([torch.randn(about.latent_shape, generator=own) for own in generators])
    halves = [*rows, *(num + row for row in rows)] if about.is_paired else rows
    conditions = select(about.conditions(span.start, span.stop), halves)
    return Batch(
        span.start, num, generators, copy.deepcopy(scheduler),
        x_t=noise.to(like.device) * getattr(scheduler, "init_noise_sigma", 1.0),
        conditions=to(conditions, like.device, like.dtype),
        guidance=about.guidance if about.is_paired else None,
    )  # fmt: skip


@torch.inference_mode()
def finish_images(batch: Batch, about: Conditioning, config: SampleConfig) -> np.ndarray:
    """The images of a batch at x_0: decoded, in 8 bits, resized.

    ->  uint8 (B, H, W, C).  Raises NumericsError if one is not finite.
    """
    at_once = max(1, DECODED_PIXELS // math.prod(about.drawn_shape[1:]))
    images: list[np.ndarray] = []
    for part in batch.x_t[: batch.num].split(at_once):
        decoded = about.companions.decode(part)
        if not torch.isfinite(decoded).all():
            raise NumericsError(
                f"images {batch.start} to {batch.start + batch.num - 1} are not finite after "
                f"{config.steps} steps of {config.sampler}; the weights are broken, or --dtype is "
                f"too narrow for them"
            )
        levels = (decoded / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)  # as diffusers
        images.extend(levels.permute(0, 2, 3, 1).contiguous().cpu().numpy())
    if side := about.resize:  # by Pillow's bicubic filter, as BK-SDM (Kim et al. 2023, generate.py)
        for i, image in enumerate(images):
            picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
            small = picture.resize((side, side), Image.Resampling.BICUBIC)
            images[i] = np.asarray(small).reshape(side, side, -1)
    return np.stack(images)


@dataclass(frozen=True)
class Shares:
    """Images first .. num - 1 in batches of `batch_size` (the last one may be smaller), shared out.

    Batch k of those to be made goes to process k % size, so that a round, one batch of each
    process, is the next piece of the whole. Batches are those of one process, whoever makes them,
    and so is every bit of what comes out.
    """

    num: int
    batch_size: int
    first: int = 0
    world: World = ALONE

    @property
    def own(self) -> list[range]:
        """The batches of this process."""
        step = self.batch_size
        starts = range(self.first + self.world.rank * step, self.num, self.world.size * step)
        return [range(start, min(start + step, self.num)) for start in starts]

    def gather(
        self, records: Iterable[int | T], look: Callable[[T], np.ndarray]
    ) -> Iterator[tuple[int, int, list[np.ndarray]]]:
        """Per record of `records`: images done, images that are there, what has come of a round.

        records: how many images are done, and batches of this process, which `look` makes rows of.
        A round's rows (B, ...) of each batch come to the first process, in order; elsewhere none.
        Of images of others, those of finished rounds count as done, so progress falls behind rather
        than promises. All processes have to go through all of it. Raises Lost where one has ended.
        """
        size, num_batches = self.world.size, -(-(self.num - self.first) // self.batch_size)
        is_idle_at_last = 0 < num_batches % size <= self.world.rank
        done = there = own = self.first
        for record in chain(records, [None] if is_idle_at_last else []):
            rows: list[np.ndarray] = []
            if isinstance(record, int):
                done = record
            else:
                found = np.empty(0, np.uint8) if record is None else look(record)
                own += len(found)
                there = min(there + size * self.batch_size, self.num)
                rows = [part for part in self.world.gather(found) if len(part)]
            yield max(done, own) + there - own, there, rows


class DrawingStops(JointStopRequests):
    """Stop requests while shares are made: whoever is asked, or fails, ends all.

    Each process ends as soon as it hears, not at one place: nothing has to be saved jointly, and a
    round may take longer than a batch system waits.
    """

    _listened_at = 0.0

    def go_on(self, message: str) -> None:
        """Raises Stopped with `message` if this process was asked to stop, Lost if one has ended.

        Lost ends this process with the exit code of the other, which has said why.
        """
        if self.asked:
            raise self.stopped(message)
        now = time.monotonic()
        if now - self._listened_at > _LISTEN_SECONDS:
            self._listened_at = now
            if self._world.failure():
                raise Lost("another process of this launch ended")

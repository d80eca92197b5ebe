"""From the losses of a batch's images to one gradient: their mean, a weighted one, or a compromise.

B images at draws t, k clusters of timesteps. Weights multiply each image's loss (weighting.py), are
learned along with the network (uncertainty.py), or are found from the conflict of the clusters'
gradients (multitask.py). Fixed weights and a compromise combine: the losses are weighed first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from deme_cli.config import FinetuneConfig
from deme_cli.diffusion.schedule import Schedule
from deme_cli.timesteps import TimestepRange
from deme_cli.training.multitask import open_tasks
from deme_cli.training.uncertainty import Uncertainty
from deme_cli.training.weighting import loss_weights


class Reduction(nn.Module):
    """What `config` makes of the images' losses. Its parameters are trained beside the network's.

    `own_lr` is their learning rate where it is not the network's. Its state_dict is what a run
    needs to continue. Raises ConfigError on a weighting that this schedule has no number for.
    """

    weights: Tensor | None
    stops: Tensor

    def __init__(
        self, config: FinetuneConfig, schedule: Schedule, clusters: Sequence[TimestepRange] = ()
    ) -> None:
        super().__init__()
        weights = loss_weights(
            schedule,
            config.loss_weighting,
            gamma=config.weighting_gamma,
            k=config.weighting_k,
            normalise=config.normalise_weighting,
        )
        weights = None if weights is None else weights.float()
        self.register_buffer("weights", weights, persistent=False)  # (T,)
        stops = torch.tensor([cluster.stop for cluster in clusters[:-1]], dtype=torch.long)
        self.register_buffer("stops", stops, persistent=False)  # (k - 1,)
        self.uncertainty = self.tasks = self.own_lr = None
        if config.loss_weighting == "uncertainty":
            self.uncertainty = Uncertainty(schedule, seed=config.seed)
        if clusters:
            self.tasks = open_tasks(config.multitask, len(clusters), every=config.multitask_every)
            self.own_lr = config.multitask_lr

    def backward(
        self,
        losses: Tensor,
        t: Tensor,
        parameters: Sequence[nn.Parameter],
        *,
        step: int,
        generator: torch.Generator,
        scale: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Add the gradient of what is minimised to `parameters`; returns its value, a scalar.

        losses: (B,) with their graph   t: (B,). `scale` multiplies a loss before it is
        differentiated; `generator` orders what is done at random.
        """
        if self.weights is not None:
            losses = losses * self.weights[t]
        if self.tasks is not None:
            means = self._means(losses, t)
            return self.tasks.backward(
                means, parameters, step=step, generator=generator, scale=scale
            )
        total = losses.mean() if self.uncertainty is None else self.uncertainty.weigh(losses, t)
        scale(total).backward()
        return total.detach()

    def _means(self, losses: Tensor, t: Tensor) -> Tensor:
        """The mean loss of each cluster: (B,) -> (k,). Every cluster has an image in the batch."""
        found = torch.bucketize(t, self.stops, right=True)
        known = torch.arange(len(self.stops) + 1, device=t.device)
        members = found == known[:, None]  # (k, B); picking them would wait for a GPU
        return torch.where(members, losses, 0.0).sum(1) / members.sum(1)

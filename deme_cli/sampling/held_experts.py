"""Which experts of an ensemble are in memory, and which one's turn it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from deme_cli.diffusion.denoiser import Denoiser
from deme_cli.sampling.compiled import Carried, CompiledSteps

if TYPE_CHECKING:
    from deme_cli.sampling.sampler import SamplingExpert


class HeldExperts:
    """Loaded experts by index: all of them, or only the one taken last.

    compiled: what their steps go through; it has weights of its own where it is on, and beside them
    an expert that would be held alone is not kept.
    """

    def __init__(
        self, experts: Sequence[SamplingExpert], *, hold_one: bool, compiled: CompiledSteps
    ) -> None:
        self._experts, self._compiled = experts, compiled
        self._hold_one = hold_one or len(experts) == 1
        self._held: dict[int, Denoiser] = {}
        self._turn: tuple[int, Carried] | None = None

    def take(self, index: int) -> Carried:
        """Expert `index`, good until the next one is taken."""
        if self._turn is None or self._turn[0] != index:
            self._turn = None  # leaves memory before the next one comes
            self._turn = index, self._compiled.carry(self._loaded(index))
        return self._turn[1]

    def _loaded(self, index: int) -> Denoiser:
        if index in self._held:
            return self._held[index]
        denoiser = self._experts[index].load()
        if not self._hold_one:
            self._held[index] = denoiser
        return denoiser

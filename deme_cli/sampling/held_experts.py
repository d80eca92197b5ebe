"""Which experts of an ensemble are in memory, and which one's turn it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from deme_cli.diffusion.denoiser import Denoiser
from deme_cli.sampling.compiled import CompiledNetworks

if TYPE_CHECKING:
    from deme_cli.sampling.sampler import SamplingExpert


class HeldExperts:
    """Loaded experts by index: all of them, or only the one taken last.

    compiled: what their calls go through; it has weights of its own, and beside them an expert that
    would be held alone need not be kept.
    """

    def __init__(
        self, experts: Sequence[SamplingExpert], *, hold_one: bool,
        compiled: CompiledNetworks | None = None,
    ) -> None:  # fmt: skip
        self._experts, self._compiled = experts, compiled
        self._hold_one = hold_one or len(experts) == 1
        self._held: dict[int, Denoiser] = {}
        self._turn: tuple[int, Denoiser] | None = None

    def take(self, index: int) -> Denoiser:
        """The denoiser of expert `index`, good until the next one is taken."""
        if self._turn is not None and self._turn[0] == index:
            return self._turn[1]
        self._turn = None
        if index not in self._held:
            if self._hold_one:
                self._held.clear()
            self._held[index] = self._experts[index].load()
        denoiser = self._held[index]
        if self._compiled is not None:
            denoiser = self._compiled.carry(denoiser)
            if self._hold_one:
                self._held.clear()
        self._turn = index, denoiser
        return denoiser

"""DARE (Yu et al. 2024, section 3.2): drop elements of task vectors at random, rescale the rest.

m ~ Bernoulli(1 - density) per element, tau' = (1 - m) tau / density, so tau' has the expectation of
tau; the merge of tau'_i is linear. What is dropped depends on (seed, expert, tensor, element)
alone: element e takes the e-th 32-bit word of a Philox generator (counter-based; Salmon et al.
2011) whose key is a hash of the other three. So pieces and the other experts change nothing.
N parents, n elements of a piece.
"""

from __future__ import annotations

import hashlib

import numpy as np

from deme_cli.merging.lineage import Family
from deme_cli.merging.methods.linear import linear
from deme_cli.merging.methods.method import Method, vector_terms

WORDS = 8  # 32-bit words that one step of the counter makes (Philox 4x64)


def dare(family: Family, *, density: float, seed: int) -> Method:
    """Task vectors with a random share `density` of their elements."""
    if density == 1:
        return linear(family)

    def drop_and_rescale(name: str, start: int, taus: np.ndarray) -> None:
        for parent, tau in zip(family.parents, taus, strict=True):
            tau *= keeps(
                start, len(tau), seed=seed, expert=parent.expert, name=name, density=density
            )
            tau *= 1 / density

    return Method(vector_terms, drop_and_rescale)


def keeps(
    start: int, count: int, *, seed: int, expert: str, name: str, density: float
) -> np.ndarray:
    """Which of the elements start ... start + count - 1 of a tensor are kept, (count,) bool.

    expert: its fingerprint; a task vector has the mask of its expert.
    """
    key = hashlib.sha256(f"{seed}\0{expert}\0{name}".encode()).digest()[:16]
    generator = np.random.Philox(key=np.frombuffer(key, "<u8"))
    generator.advance(start // WORDS)
    skipped = start % WORDS
    raw = generator.random_raw(-(-(skipped + count) // 2))
    words = raw.astype("<u8", copy=False).view("<u4")[skipped : skipped + count]
    return words < np.uint64(round(density * 2**32))

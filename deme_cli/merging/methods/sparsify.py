"""TIES and DARE: task vectors of which only a share of the elements is kept.

TIES (Yadav et al. 2023, Algorithm 1) trims, elects signs, and takes the mean of what agrees.
Trim: hat tau_i keeps the `density` share of largest magnitude of tau_i, over the whole vector as
published, or tensor by tensor as mergekit does. Elect: gamma = sgn(sum_i hat tau_i), by element.
Merge: tau = the mean of hat tau_i over A = {i: sgn(hat tau_i) = gamma}, and theta + lambda tau.
Here that is written as task vectors tau'_i = N hat tau_i [i in A] / |A|, so that w_i = lambda / N
each gives exactly the published theta + lambda tau, and coefficients per expert keep their meaning.
Magnitudes equal to the threshold are all kept; where the sum is exactly 0 nothing agrees.

DARE (Yu et al. 2024, section 3.2) drops elements at random and rescales the rest:
m ~ Bernoulli(1 - density) per element, tau' = (1 - m) tau / density, so tau' has the expectation of
tau; the merge of tau'_i is linear. What is dropped depends on (seed, expert, tensor, element)
alone: element e takes the e-th 32-bit word of a Philox generator (counter-based; Salmon et al.
2011) whose key is a hash of the other three. So pieces and the other experts change nothing.
N experts, n elements of a piece.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from deme_cli.errors import NumericsError
from deme_cli.merging.inputs import Inputs
from deme_cli.merging.methods.linear import Method, linear, vector_terms
from deme_cli.merging.tensor_stream import PIECE, Run, TensorStream, float_runs

LOW_BITS = 15  # of the 31 without sign
NUM_HIGH, NUM_LOW = 1 << (31 - LOW_BITS), 1 << LOW_BITS
NOT_FINITE = 0x7F800000 >> LOW_BITS  # first bin of infinities and NaN
WORDS = 8  # 32-bit words that one step of the counter makes (Philox 4x64)


def ties(inputs: Inputs, *, density: float, trim: str) -> Method:
    """Trimmed, agreeing task vectors; opening it reads the files twice for the thresholds."""
    if density == 1 and len(inputs.experts) == 1:
        return linear(inputs)  # nothing is trimmed and nothing disagrees
    tensors = [run for run in float_runs(inputs) if run.specs[0].num_elements]
    if trim == "tensor":
        of_each = [_threshold(inputs, density, [run]) for run in tensors]
    else:
        shared = _threshold(inputs, density, float_runs(inputs, by_tensor=False))
        of_each = [shared] * len(tensors)
    thresholds = {run.specs[0].name: one for run, one in zip(tensors, of_each, strict=True)}

    def trim_and_elect(name: str, start: int, taus: np.ndarray) -> None:
        taus *= magnitudes(taus) >= thresholds[name][:, None]
        agreeing_mean(taus)

    return Method(vector_terms, trim_and_elect)


def _threshold(inputs: Inputs, density: float, runs: list[Run]) -> np.ndarray:
    """The least magnitude kept of each expert (N,) over all of `runs`.

    Raises NumericsError naming an expert whose difference is not finite.
    """

    def walk() -> Iterator[np.ndarray]:
        with TensorStream(inputs) as stream:
            for run in runs:
                for start, stop in run.spans(PIECE):
                    yield stream.vectors(run, start, stop)[1]

    with np.errstate(over="ignore", invalid="ignore"):
        thresholds, are_finite = kth_largest(walk, len(inputs.experts), density)
    for expert, is_finite in zip(inputs.experts, are_finite, strict=True):
        if not is_finite:
            raise NumericsError(f"{expert.path}: holds weights that are not finite")
    return thresholds


def agreeing_mean(taus: np.ndarray) -> None:
    """N hat tau_i [sgn(hat tau_i) = sgn(sum_j hat tau_j)] / |A| from hat tau_i (N, n), in place."""
    elected = np.sign(taus.sum(axis=0))
    agree = taus * elected > 0
    num_agree = np.maximum(agree.sum(axis=0), 1).astype(taus.dtype)
    taus *= agree
    taus *= len(taus) / num_agree


def magnitudes(vectors: np.ndarray) -> np.ndarray:
    """|v| in float32, which thresholds are compared with."""
    return np.abs(vectors).astype(np.float32, copy=False)


def kth_largest(
    walk: Callable[[], Iterable[np.ndarray]], count: int, share: float
) -> tuple[np.ndarray, np.ndarray]:
    """The k-th largest magnitude of `count` vectors (N,), and which of them are finite (N,).

    walk: gives the pieces (N, n) of the vectors, twice.   k = int(share * size), at least 1, as in
    the authors' code and in mergekit.
    """
    high = np.zeros((count, NUM_HIGH), np.int64)
    for piece in walk():
        for vector, histogram in zip(piece, high, strict=True):
            bits = magnitudes(vector).view(np.uint32)
            histogram += np.bincount(bits >> LOW_BITS, minlength=NUM_HIGH)
    k = max(1, int(share * high[0].sum()))
    places = [_bin_of(histogram, k) for histogram in high]
    low = np.zeros((count, NUM_LOW), np.int64)
    for piece in walk():
        for vector, histogram, (place, _) in zip(piece, low, places, strict=True):
            bits = magnitudes(vector).view(np.uint32)
            within = bits[bits >> LOW_BITS == place] & (NUM_LOW - 1)
            histogram += np.bincount(within, minlength=NUM_LOW)
    found = [
        place << LOW_BITS | _bin_of(histogram, rank)[0]
        for histogram, (place, rank) in zip(low, places, strict=True)
    ]
    are_finite = high[:, NOT_FINITE:].sum(axis=1) == 0
    return np.array(found, np.uint32).view(np.float32), are_finite


def _bin_of(histogram: np.ndarray, k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest, and its rank among those within."""
    from_top = np.cumsum(histogram[::-1])
    index = int(np.searchsorted(from_top, k))
    place = len(histogram) - 1 - index
    return place, int(k - (from_top[index] - histogram[place]))


def dare(inputs: Inputs, *, density: float, seed: int) -> Method:
    """Task vectors with a random share `density` of their elements."""
    if density == 1:
        return linear(inputs)

    def drop_and_rescale(name: str, start: int, taus: np.ndarray) -> None:
        for expert, tau in zip(inputs.experts, taus, strict=True):
            tau *= keeps(
                start, len(tau), seed=seed, expert=expert.fingerprint, name=name,
                density=density,
            )  # fmt: skip
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

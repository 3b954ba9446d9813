"""Which unlabelled pictures to label next.

* ``entropy``, ``margin``, ``confidence``: where the model is least sure (Settles, Active Learning Literature Survey,
  2009, section 3.1).
* ``coreset``: pictures such that every other one is near to a labelled one (k-centre greedy, Sener & Savarese, ICLR
  2018); needs vectors only, and does not ask for ten views of one object.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from vitrail.errors import UserError

Uncertainty = Literal["entropy", "margin", "confidence"]
Strategy = Literal["entropy", "margin", "confidence", "coreset"]

UNCERTAINTIES: tuple[Uncertainty, ...] = get_args(Uncertainty)
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)

_BLOCK_ELEMENTS = 16_000_000  # Distances at a time, 128 MB.


class Ranked(NamedTuple):
    """What to label, the most wanted first.

    Attributes:
        rows: int64 ``(n,)``.
        scores: float64 ``(n,)``; of ``coreset`` the distance to the nearest picture that is labelled or stands
            before, else how unsure the model is; higher is more wanted.
    """

    rows: NDArray[np.int64]
    scores: NDArray[np.float64]


def uncertainty(probability: NDArray[np.float64], by: Uncertainty) -> NDArray[np.float64]:
    """How unsure a model is of each sample.

    Args:
        probability: float64 ``(N, C)``; each row sums to 1.
        by: ``entropy`` in nats (0 to ln C), ``margin`` as 1 less the lead of the best class over the next (0 to 1), or
            ``confidence`` as 1 less the probability of the best class.

    Returns:
        float64 ``(N,)``, higher is less sure.
    """
    if by == "entropy":
        logs = np.log(probability, out=np.zeros_like(probability), where=probability > 0)
        # Not below 0 by rounding, and no -0.
        entropy: NDArray[np.float64] = np.maximum(-(probability * logs).sum(axis=1), 0.0) + 0.0
        return entropy
    ordered = np.sort(probability, axis=1)
    if by == "confidence":
        return 1 - ordered[:, -1]
    second = ordered[:, -2] if probability.shape[1] > 1 else 0.0
    return 1 - (ordered[:, -1] - second)


def most_uncertain(probability: NDArray[np.float64], by: Uncertainty, n: int) -> Ranked:
    """The n samples that the model is least sure of; of equal ones the earlier first.

    Args:
        probability: float64 ``(N, C)``.
        by: see ``uncertainty``.
        n: at most so many.
    """
    scores = uncertainty(probability, by)
    rows = np.argsort(-scores, kind="stable")[:n]
    return Ranked(rows.astype(np.int64), scores[rows])


def k_centre_greedy(vectors: NDArray[Any], n: int, covered: NDArray[Any] | None = None) -> Ranked:
    """Takes again and again the sample that is farthest from all that are labelled or taken.

    The largest distance that is left is at most twice the smallest possible one (Gonzalez, 1985).

    Args:
        vectors: ``(N, D)``, finite.
        n: at most so many.
        covered: ``(M, D)``, samples that are labelled; without any the first one taken is the one nearest to the mean,
            and its score is infinite.
    """
    points = np.asarray(vectors, np.float64)
    count = min(n, len(points))
    squares = (points**2).sum(axis=1)
    nearest = np.full(len(points), np.inf)
    if covered is not None and len(covered):
        nearest = _squared_to_nearest(points, squares, np.asarray(covered, np.float64))
    taken, scores = np.zeros(count, np.int64), np.zeros(count)
    for place in range(count):
        if np.isinf(nearest).all():
            row = int(((points - points.mean(axis=0)) ** 2).sum(axis=1).argmin())
        else:
            row = int(nearest.argmax())
        taken[place], scores[place] = row, np.sqrt(nearest[row])
        np.minimum(nearest, np.maximum(squares - 2 * points @ points[row] + squares[row], 0), out=nearest)
        nearest[taken[: place + 1]] = -1  # Taken once, even where all others lie on the same spot.
    return Ranked(taken, scores)


def unit(vectors: NDArray[Any]) -> NDArray[np.float64]:
    """The vectors' directions, float64 ``(N, D)``; a vector of length 0 stays."""
    points = np.asarray(vectors, np.float64)
    lengths = np.linalg.norm(points, axis=1, keepdims=True)
    directions: NDArray[np.float64] = np.divide(points, lengths, out=np.zeros_like(points), where=lengths > 0)
    return directions


def checked_probabilities(logits: NDArray[Any], name: str) -> NDArray[np.float64]:
    """Softmax of logits.

    Args:
        logits: ``(N, C)``.
        name: what messages call the model.

    Returns:
        float64 ``(N, C)``.

    Raises:
        UserError: for logits that are not finite, and for a single class, of which every model is sure.
    """
    from scipy.special import softmax

    values = np.asarray(logits, np.float64)
    if values.shape[1] < 2:
        raise UserError(f"{name}: knows one class only, so it is never unsure; rank by coreset")
    if bad := int((~np.isfinite(values).all(axis=1)).sum()):
        raise UserError(f"{name}: logits of {bad} of {len(values)} pictures are not finite; has it diverged?")
    result: NDArray[np.float64] = softmax(values, axis=1)
    return result


def _squared_to_nearest(
    points: NDArray[np.float64], squares: NDArray[np.float64], covered: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Squared distance of each point to the nearest covered one, float64 ``(N,)``."""
    nearest = np.full(len(points), np.inf)
    block = max(1, _BLOCK_ELEMENTS // max(len(points), 1))
    for start in range(0, len(covered), block):
        part = covered[start : start + block]
        distance = squares[:, None] - 2 * points @ part.T + (part**2).sum(axis=1)[None, :]
        np.minimum(nearest, distance.min(axis=1), out=nearest)
    squared: NDArray[np.float64] = np.maximum(nearest, 0)
    return squared

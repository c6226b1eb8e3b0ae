"""Topics: why the experts of a synthetic model repeat as those of a real one do.

Independent embeddings would route every token afresh, and a cache would hit at slots/experts.
So an embedding is part topic, part common to all, part its own. The topics are orthogonal, and
constant over each group of inputs, so that the biases of an affine quantization hold them. The
output layer follows the topic at hand; some of its tokens embed as another topic, and the text
moves on. Nothing else tells tokens of a topic apart but the rest of the residual stream.
"""

from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

# Shares of an embedding's variance; its own is the rest. Chosen with `routing_statistics.py`.
TOPIC = 0.64
COMMON = 0.12
TOPICS = 31
DWELL = 16  # tokens a text stays with a topic, on average
PULL = 4.0  # of the topic at hand on the next token, in deviations of the logits


class Routing(StrEnum):
    """``REAL``: experts repeat as in published models. ``UNIFORM``: every token afresh."""

    REAL = "real"
    UNIFORM = "uniform"


def own_share(routing: Routing) -> float:
    """Of an embedding's variance, what its random weights hold."""
    return 1 - TOPIC - COMMON if routing is Routing.REAL else 1.0


def of_embedding(rows: NDArray[np.int64], groups: int) -> Floats:
    """What the topics add to the biases of token embeddings. rows: [n] -> [n, groups]."""
    table = _directions(groups)
    return np.sqrt(np.float32(TOPIC)) * table[_topic(rows, groups)] + (
        np.sqrt(np.float32(COMMON)) * table[0]
    )


def of_output(rows: NDArray[np.int64], groups: int, inputs: int) -> Floats:
    """What the topics add to the biases of the output layer. rows: [n] -> [n, groups]."""
    return np.float32(PULL / inputs) * _directions(groups)[_follows(rows, groups)]


def _topic(rows: NDArray[np.int64], groups: int) -> NDArray[np.int64]:
    return 1 + rows % _count(groups)


def _follows(rows: NDArray[np.int64], groups: int) -> NDArray[np.int64]:
    """The topic a token follows: its own, but one in DWELL comes from elsewhere."""
    count = _count(groups)
    visit, moves = rows // count, (rows // count) % DWELL == 0
    elsewhere = rows + 1 + (visit // DWELL) % max(count - 1, 1)
    return 1 + np.where(moves, elsewhere, rows) % count


def _count(groups: int) -> int:
    return min(TOPICS, groups - 1)


def _directions(groups: int) -> Floats:
    """Rows of mean square 1, orthogonal: the cosines of a DCT-II. [groups, groups]."""
    k, j = np.arange(groups)[:, None], np.arange(groups) + 0.5
    table = np.sqrt(2) * np.cos(np.pi * k * j / groups)
    table[0] = 1
    return table.astype(np.float32)

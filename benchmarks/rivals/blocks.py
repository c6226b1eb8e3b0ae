"""MLX's affine 4-bit groups as GGML blocks: the same nibbles, scales and biases re-coded.

An affine group of 64 weights is ``w = scale * q + bias``. It becomes two sub-blocks of a Q4_K
block of 256, ``w = d * sc * q - dmin * m`` with 6-bit ``sc`` and ``m``, or two Q4_1 blocks of
32, ``w = d * q + m``. Layouts: ``block_q4_K`` and ``block_q4_1`` in GGML's ``ggml-common.h``.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

GROUP = 64
MIDDLE = 7.5  # of the 16 values of q
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

Q4_1_BYTES = 20
Q4_K_BYTES = 144
TINY = np.float32(2**-24)  # the smallest half above zero


def fits_q4_k(columns: int, scales: Floats, biases: Floats) -> bool:
    """Whether Q4_K can hold a tensor: rows of whole blocks, and no bias above zero."""
    return columns % 256 == 0 and bool((biases <= 0).all()) and bool((scales >= 0).all())


def q4_k(nibbles: Bytes, scales: Floats, biases: Floats) -> Bytes:
    """Q4_K blocks of affine groups.

    Args:
        nibbles: [n, 32], two weights a byte, the first one low.
        scales, biases: [n]; n is a multiple of 4.

    Returns:
        [n / 4, 144].
    """
    scales, biases = scales.reshape(-1, 4), biases.reshape(-1, 4)
    d, sc = _six_bits(scales)
    # A scale's rounding would shift its whole group; m takes that back about the middle.
    dmin, m = _six_bits(MIDDLE * d * sc - (biases + MIDDLE * scales))
    blocks = np.empty((len(scales), Q4_K_BYTES), np.uint8)
    blocks[:, 0:2] = d.astype(np.float16).view(np.uint8)
    blocks[:, 2:4] = dmin.astype(np.float16).view(np.uint8)
    blocks[:, 4:16] = _packed(sc.astype(np.uint8), m.astype(np.uint8))
    blocks[:, 16:] = _halves_beside(nibbles, 16).reshape(-1, 128)
    return blocks


def q4_1(nibbles: Bytes, scales: Floats, biases: Floats) -> Bytes:
    """Q4_1 blocks of affine groups, arguments as ``q4_k``. Returns [2 n, 20]."""
    blocks = np.empty((2 * len(scales), Q4_1_BYTES), np.uint8)
    for half, values in ((slice(0, 2), scales), (slice(2, 4), biases)):
        stored = np.repeat(values.astype(np.float16), 2)
        blocks[:, half] = stored.view(np.uint8).reshape(-1, 2)
    blocks[:, 4:] = _halves_beside(nibbles, 8).reshape(-1, 16)
    return blocks


def _six_bits(values: Floats) -> tuple[Floats, Floats]:
    """A half-precision unit a row and multiples of it up to 63. [n, 4] -> [n, 1], [n, 4]."""
    most = np.ascontiguousarray(values.T).max(axis=0)[:, None]  # ten times faster than by rows
    unit = np.maximum((most / 63).astype(np.float16).astype(np.float32), TINY)
    return unit, np.clip(np.rint(values / unit), 0, 63)


def _packed(sc: Bytes, m: Bytes) -> Bytes:
    """The twelve bytes that ``get_scale_min_k4`` reads. [n, 4], one a group of 64 -> [n, 12].

    Sub-blocks 0 to 3 have six bits in a byte of their own. Of 4 to 7, the low four bits are
    in the last bytes and the high two above those of 0 to 3.
    """
    sc, m = np.repeat(sc, 2, axis=1), np.repeat(m, 2, axis=1)
    first = sc[:, :4] | (sc[:, 4:] >> 4 << 6)
    second = m[:, :4] | (m[:, 4:] >> 4 << 6)
    last = (sc[:, 4:] & 15) | (m[:, 4:] << 4)
    return np.concatenate([first, second, last], axis=1)


def _halves_beside(nibbles: Bytes, half: int) -> Bytes:
    """Moves neighbours apart: MLX's byte has weights 2i and 2i + 1, GGML's i and i + 2 half.

    Args:
        nibbles: Whole runs of 2 * half bytes.
        half: Bytes from a run's first half to its second.
    """
    runs = nibbles.reshape(-1, 2, half)
    low, high = np.ascontiguousarray(runs[:, 0]), np.ascontiguousarray(runs[:, 1])
    even = (low & 15) | (high << 4)
    odd = (low >> 4) | (high & 0xF0)
    return (even.astype("<u2") | (odd.astype("<u2") << 8)).view(np.uint8)


def dequantize(nibbles: Bytes, scales: Floats, biases: Floats) -> Floats:
    """The weights of affine groups. nibbles: [n, 32], scales, biases: [n] -> [n, 64]."""
    q: Any = np.stack([nibbles & 15, nibbles >> 4], axis=-1).reshape(-1, GROUP)
    return scales[:, None] * q + biases[:, None]

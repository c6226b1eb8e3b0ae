"""The seam: an mlx-lm switch layer whose expert axis holds slots.

Slot ids are data, so the stock layer computes on them unchanged. The reference path reads the
router's indices once per streamed layer, on any build of MLX. With a ``NativeStore`` a decode step
leaves that to a node of MLX's graph.
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from numpy.typing import NDArray

from .store import ExpertStore, NativeStore

LARGE_OUTPUT_BYTES = 1 << 20
PROJECTIONS = (SwitchLinear, QuantizedSwitchLinear)


class StreamedSwitch(nn.Module):
    """Run an mlx-lm switch layer over the experts that are in its slots.

    Stands where ``SwitchGLU`` or ``SwitchMLP`` stood and answers the same call.

    Args:
        switch (nn.Module): The mlx-lm layer, its weights [num_slots, ...].
        store (ExpertStore | NativeStore): Brings routed experts into those slots.
    """

    def __init__(self, switch: nn.Module, store: ExpertStore | NativeStore):
        super().__init__()
        self.switch = switch
        # What else a model hangs on the layer, such as a norm that it calls itself.
        for name, part in switch.items():
            if name not in self and not isinstance(part, PROJECTIONS):
                self[name] = part
        self._store = store
        self._pending: mx.array | None = None

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        # x: [..., D], indices: [..., top_k] -> [..., top_k, D]
        return self._computed(x, indices, self.switch, lambda parts: parts)

    def _computed(
        self,
        x: mx.array,
        indices: mx.array,
        on_slots: Callable[[mx.array, mx.array], mx.array],
        after_waves: Callable[[mx.array], mx.array],
    ) -> mx.array:
        # on_slots: of x and slots, all at once; after_waves: of [..., top_k, D], where that fails
        if isinstance(self._store, NativeStore) and indices.size <= self._store.num_slots:
            # What was computed on these slots before has to come first.
            slots = self._store.place_in_graph(indices, self._pending)
            self._pending = on_slots(x, slots)
            return self._pending
        routed = np.array(indices)  # the one sync: disk reads need real ids
        experts = np.unique(routed)
        self._settle()
        y: mx.array
        if len(experts) <= self._store.num_slots:
            y = on_slots(x, self._slots(experts, routed))
        else:
            y = after_waves(self._in_waves(x, routed, experts))
        self._pending = y
        if y.nbytes > LARGE_OUTPUT_BYTES:
            self._settle()  # a prompt's output: keep nothing of it alive
        return y

    def _settle(self) -> None:
        # A slot may be overwritten once every earlier reader of it has run. Most have:
        # the router depends on them. An abandoned or batched graph may not have.
        if self._pending is not None:
            mx.eval(self._pending)
            self._pending = None

    def _slots(self, experts: NDArray[np.generic], routed: NDArray[np.generic]) -> mx.array:
        # experts: sorted, distinct; routed: any shape -> slot ids of the same shape
        slots = np.array(self._store.place(experts.tolist()), dtype=np.uint32)
        return mx.array(slots[np.searchsorted(experts, routed)])

    def _in_waves(
        self, x: mx.array, routed: NDArray[np.generic], experts: NDArray[np.generic]
    ) -> mx.array:
        # More experts than slots: take them a slot-full at a time, every (token, expert)
        # pair in exactly one wave. What is resident goes first, before it is evicted.
        top_k = routed.shape[-1]
        rows = x.reshape(-1, 1, x.shape[-1])  # [tokens, 1, D]
        pairs = routed.reshape(-1)
        resident = np.isin(experts, self._store.resident())
        queue = np.concatenate([experts[resident], experts[~resident]])
        outputs, order = [], []
        for i in range(0, len(queue), self._store.num_slots):
            wave = np.sort(queue[i : i + self._store.num_slots])
            members = np.flatnonzero(np.isin(pairs, wave))
            slots = self._slots(wave, pairs[members])
            y = self.switch(rows[mx.array(members // top_k)], slots[:, None, None])
            mx.eval(y)  # the next wave overwrites these slots
            outputs.append(y)
            order.append(members)
        back = np.argsort(np.concatenate(order))
        y = mx.concatenate(outputs)[mx.array(back)]
        return y.reshape(*routed.shape, -1)


class StreamedSum(StreamedSwitch):
    """A ``StreamedSwitch`` whose layer also takes the weighted sum over a token's experts."""

    def weighted(
        self,
        x: mx.array,
        indices: mx.array,
        scores: mx.array,
        shared: mx.array | None = None,
        shared_gate: mx.array | None = None,
    ) -> mx.array:
        """``(self(x, indices) * scores[..., None]).sum(axis=-2)`` and a shared expert's part.

        Args:
            x: [..., D]
            indices: [..., top_k]
            scores: [..., top_k]
            shared: [..., D], added.
            shared_gate: [..., 1] logits; their sigmoid multiplies ``shared``.

        Returns:
            [..., D] in the dtype of ``x``, summed in float32.
        """

        def at_once(x: mx.array, slots: mx.array) -> mx.array:
            rest = [part for part in (shared, shared_gate) if part is not None]
            y: mx.array = self.switch.weighted(x, slots, scores, *rest)
            return y

        def of_parts(parts: mx.array) -> mx.array:
            y = (parts * scores.astype(mx.float32)[..., None]).sum(axis=-2)
            if shared is not None:
                y = y + (shared if shared_gate is None else mx.sigmoid(shared_gate) * shared)
            return y.astype(x.dtype)

        return self._computed(x, indices, at_once, of_parts)

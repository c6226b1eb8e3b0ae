"""What a run has cost: times, hits, bytes, and the peak against the budget."""

import time
from dataclasses import asdict, dataclass, field
from typing import Any

from mlx_lm.generate import GenerationResponse

from ..machine import peak_rss_bytes
from ..streaming.model import StreamedModel
from ..streaming.plan import Plan, size
from ..streaming.store import StoreStats


@dataclass
class Figures:
    """Counters of one generation. Seconds, bytes, tokens."""

    model: StreamedModel
    load_s: float
    prompt_tokens: int
    generated_tokens: int = 0
    finish_reason: str | None = None
    text: str = ""
    begun_at: float = field(default_factory=time.perf_counter)
    first_at: float | None = None
    last_at: float | None = None
    prefill_stats: StoreStats = field(default_factory=StoreStats)
    prefill_bytes: int = 0

    @property
    def plan(self) -> Plan:
        return self.model.plan

    def begin(self) -> None:
        """Start the clock: the model is loaded, the prompt comes next."""
        self.begun_at = time.perf_counter()

    def token(self, response: GenerationResponse) -> None:
        """Record one more token of mlx-lm's ``stream_generate``."""
        self.last_at = time.perf_counter()
        if self.first_at is None:
            self.first_at = self.last_at
            self.prefill_stats = self.model.stats()
            self.prefill_bytes = self.model.reader.bytes_read
        self.text += response.text
        self.generated_tokens = response.generation_tokens
        self.finish_reason = response.finish_reason

    def summary(self) -> dict[str, Any]:
        """Every figure by name. Rates are None where nothing was measured."""
        decode, bytes_read, read_s = self._decode_stats(), *self._read()
        first_s = self.first_at - self.begun_at if self.first_at else None
        steps = self.generated_tokens - 1
        decode_s = self.last_at - self.first_at if self.last_at and self.first_at else 0.0
        peak = peak_rss_bytes()
        return {
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
            "finish_reason": self.finish_reason,
            "load_s": self.load_s,
            "time_to_first_token_s": first_s,
            "prompt_tokens_per_s": self.prompt_tokens / first_s if first_s else None,
            "decode_tokens_per_s": steps / decode_s if steps > 0 and decode_s else None,
            "expert_hit_rate": _rate(decode),
            "prefill_expert_hit_rate": _rate(self.prefill_stats),
            "evictions": self.model.stats().evictions,
            "bytes_read": bytes_read,
            "bytes_read_per_token": (
                (bytes_read - self.prefill_bytes) / steps if steps > 0 else None
            ),
            "read_bytes_per_s": bytes_read / read_s if read_s else None,
            "residency": self.plan.residency,
            "expert_bytes": self.plan.expert_bytes,
            "slot_bytes": self.plan.slot_bytes,
            "whole_layers": self.plan.whole_layers,
            "layers": len(self.plan.layers),
            "layers_in_ram": sum(not self.plan.streams(path) for path in self.plan.layers),
            "peak_rss_bytes": peak,
            "ram_bytes": self.plan.ram_bytes,
            "within_budget": peak <= self.plan.ram_bytes,
        }

    def _read(self) -> tuple[int, float]:
        return self.model.reader.bytes_read, self.model.reader.read_s

    def _decode_stats(self) -> StoreStats:
        before, now = asdict(self.prefill_stats), asdict(self.model.stats())
        return StoreStats(**{name: now[name] - before[name] for name in now})


def _rate(stats: StoreStats) -> float | None:
    routed = stats.hits + stats.misses
    return stats.hits / routed if routed else None


def lines(summary: dict[str, Any]) -> list[str]:
    """The summary for people."""
    prompt = f"{summary['prompt_tokens']} tokens"
    if summary["time_to_first_token_s"] is not None:
        prompt += (
            f", {summary['prompt_tokens_per_s']:.1f} tok/s, "
            f"first token after {summary['time_to_first_token_s']:.2f} s"
        )
    decode = f"{summary['generated_tokens']} tokens"
    if summary["decode_tokens_per_s"] is not None:
        decode += f", {summary['decode_tokens_per_s']:.1f} tok/s"
    held = f"{size(summary['slot_bytes'])} of {size(summary['expert_bytes'])} in RAM"
    unit = "layers " if summary["whole_layers"] else "experts"
    if summary["whole_layers"] and summary["residency"] < 1:
        experts = f"{held}: {summary['layers_in_ram']} of {summary['layers']}"
    elif summary["expert_hit_rate"] is None:
        experts = f"{held}, all resident" if summary["residency"] == 1 else held
    else:
        experts = f"{held}, hit rate {summary['expert_hit_rate']:.1%}"
    result = [f"prompt   {prompt}", f"decode   {decode}", f"{unit}  {experts}"]
    if summary["bytes_read"]:
        disk = f"{size(summary['bytes_read'])} read"
        if summary["bytes_read_per_token"] is not None:
            disk += f", {size(summary['bytes_read_per_token'])} per token"
        result.append(f"disk     {disk}, {summary['read_bytes_per_s'] / 1e6:.0f} MB/s")
    verdict = "" if summary["within_budget"] else "   OVER BUDGET, please report this"
    result.append(
        f"memory   peak {size(summary['peak_rss_bytes'])} of a {size(summary['ram_bytes'])} "
        f"budget{verdict}"
    )
    return result


def plan_lines(plan: Plan) -> list[str]:
    """How the budget was divided, for ``-v``."""
    fixed = plan.fixed
    return [
        f"budget   {size(plan.ram_bytes)}, {size(plan.total_bytes)} planned",
        f"process  {size(fixed.process_bytes)}",
        f"resident {size(fixed.resident_bytes)}",
        f"state    {size(fixed.state_bytes)} for {plan.context} tokens",
        f"scratch  {size(fixed.scratch_bytes)} for {plan.prefill_tokens} prompt tokens at a time",
        _layers_line(plan) if plan.whole_layers else _experts_line(plan),
    ]


def _experts_line(plan: Plan) -> str:
    slots = sorted(plan.slots.values())
    per_layer = f"{slots[0]}" if slots[0] == slots[-1] else f"{slots[0]} to {slots[-1]}"
    return (
        f"experts  {size(plan.slot_bytes)}: {per_layer} in each of {len(slots)} layers, "
        f"{plan.residency:.0%} of {size(plan.expert_bytes)}"
    )


def _layers_line(plan: Plan) -> str:
    """What a model without experts reads for every token is known before it runs."""
    held, count = sum(plan.slots.values()), len(plan.slots)
    line = f"layers   {size(plan.slot_bytes + plan.ring_bytes)}: {held} of {count} in RAM"
    if not plan.streamed_bytes:
        return line
    return (
        f"{line}, {size(plan.ring_bytes)} to read ahead; every token reads the other "
        f"{count - held}: {size(plan.streamed_bytes)}"
    )

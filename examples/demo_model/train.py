"""Train the demo model on a CPU: resumable, for a number of tokens or until a time.

Data parallel over single-threaded processes: on two shared cores that is twice as fast as two
threads in one.

`python train.py RUN --tokens 30e6` trains in the folder RUN (tokenizer, checkpoints, log) and ends
with RUN/final.pt.
Interrupted, the same command goes on from the last checkpoint. `--until HH:MM` (UTC) ends at a time
instead.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from model import build, text_config
from optimizer import Muon, rounded_weights, split_parameters
from packing import Batch, Encoder, batch
from tokenizer import train as train_tokenizer
from torch.nn import functional
from transformers import AutoTokenizer

ROWS, LENGTH = 8, 512  # of a step, over all workers
MUON_LR, ADAM_LR = 5e-3, 3e-3
WARMUP_STEPS = 60
BALANCE = 0.01  # weight of the load balancing loss
ROUNDING_FROM = 0.9  # share of the run after which the forward pass sees 4-bit weights
CHECKPOINT_SECONDS = 240


@dataclass
class Schedule:
    """How far the run is, 0..1: by tokens, or by time when it must end at one."""

    tokens: float
    start: float
    until: float | None

    def progress(self, seen: int) -> float:
        if self.until is None:
            return min(1.0, seen / self.tokens)
        return min(1.0, (time.time() - self.start) / (self.until - self.start))


class Balance:
    """Collects what the routers do in a forward pass and turns it into a loss (Fedus et al., 2021,
    eq. 4)."""

    def __init__(self, model: torch.nn.Module):
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(
                lambda gate, args, out: self.seen.append((out[0], out[2]))
            )

    def loss(self) -> tuple[torch.Tensor, int]:
        """(mean over layers, the fewest tokens any expert of any layer got)."""
        total, fewest = torch.zeros(()), 1 << 30
        for logits, chosen in self.seen:
            counts = chosen.reshape(-1).bincount(minlength=logits.shape[-1])
            share = counts / counts.sum()
            total = total + logits.shape[-1] * (share * logits.float().softmax(-1).mean(0)).sum()
            fewest = min(fewest, int(counts.min()))
        layers = len(self.seen)
        self.seen.clear()
        return total / layers, fewest


class Trainer:
    """Model, optimizers, position; knows how to take a step and to save itself."""

    def __init__(self, run: Path, seed: int, rank: int = 0, workers: int = 1):
        tokenizer = _tokenizer(run)
        self.run, self.seed, self.rank, self.workers = run, seed, rank, workers
        self.encoder = Encoder(tokenizer)
        self.model = build(text_config(len(tokenizer), self.encoder.end, self.encoder.pad), seed)
        self.balance = Balance(self.model)
        matrices, rest = split_parameters(self.model)
        self.muon = Muon(matrices, lr=MUON_LR)
        self.adam = torch.optim.AdamW(
            rest, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self.step, self.trained_s, self.start = 0, 0.0, time.time()
        if (run / "checkpoint.pt").exists():
            self._load(torch.load(run / "checkpoint.pt", weights_only=True))

    @property
    def tokens(self) -> int:
        return self.step * ROWS * LENGTH

    def batch(self, step: int) -> Batch:
        """This worker's rows of a step."""
        return batch(
            self.encoder, self.seed, step * self.workers + self.rank, ROWS // self.workers, LENGTH
        )

    def average_gradients(self) -> None:
        """Mean over the workers, in one message."""
        if self.workers == 1:
            return
        grads = [p.grad for p in self.model.parameters()]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat)
        flat /= self.workers
        for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(mean.view_as(grad))

    def agree(self, value: float) -> float:
        """The first worker's value, for all."""
        if self.workers == 1:
            return value
        box = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(box, 0)
        return box.item()

    def take_step(self, data: Batch, progress: float) -> dict[str, float]:
        rate = min(1.0, (self.step + 1) / WARMUP_STEPS) * max(0.02, 1 - progress)
        for optimizer, peak in ((self.muon, MUON_LR), (self.adam, ADAM_LR)):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate
        targets = data.tokens[:, 1:]
        learned = data.learned[:, 1:]
        with rounded_weights(self.model, 4 if progress >= ROUNDING_FROM else None):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                hidden = self.model.model(
                    input_ids=data.tokens, attention_mask=data.masks(), use_cache=False
                ).last_hidden_state
                logits = self.model.lm_head(hidden[:, :-1][learned])
            loss = functional.cross_entropy(logits.float(), targets[learned])
            balance, fewest = self.balance.loss()
            (loss + BALANCE * balance).backward()
        self.average_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.adam.param_groups[0]["params"], 1.0)
        for optimizer in (self.muon, self.adam):
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return {
            "loss": loss.item(),
            "balance": balance.item(),
            "fewest": fewest,
            "norm": norm.item(),
        }

    def save(self, name: str = "checkpoint.pt") -> None:
        state = {
            "model": self.model.state_dict(),
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
            "step": self.step,
            "trained_s": self.trained_s,
            "start": self.start,
        }
        torch.save(state, self.run / "partial.pt")
        (self.run / "partial.pt").replace(self.run / name)

    def _load(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        self.step, self.trained_s, self.start = state["step"], state["trained_s"], state["start"]


def _tokenizer(run: Path):
    folder = run / "tokenizer"
    if not folder.exists():
        train_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def _until(text: str | None) -> float | None:
    """The next HH:MM in UTC, as seconds since 1970."""
    if text is None:
        return None
    now = dt.datetime.now(dt.UTC)
    hour, minute = map(int, text.split(":"))
    end = now.replace(hour=hour, minute=minute, second=0)
    return (end if end > now else end + dt.timedelta(days=1)).timestamp()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--tokens", type=float, default=30e6)
    parser.add_argument(
        "--until", help="HH:MM in UTC; decays to this time instead of a number of tokens"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    args = parser.parse_args()
    args.run.mkdir(parents=True, exist_ok=True)
    _tokenizer(args.run)
    (args.run / "rendezvous").unlink(missing_ok=True)
    mp.spawn(work, args=(args,), nprocs=args.workers)


def work(rank: int, args: argparse.Namespace) -> None:
    """One worker, from checkpoint to end."""
    torch.set_num_threads(1)
    if args.workers > 1:
        rendezvous = f"file://{(args.run / 'rendezvous').absolute()}"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=args.workers)
    trainer = Trainer(args.run, args.seed, rank, args.workers)
    schedule = Schedule(args.tokens, trainer.start, _until(args.until))
    with (
        ThreadPoolExecutor(1) as pool,
        Path(args.run / "log.jsonl" if rank == 0 else os.devnull).open("a") as log,
    ):
        train(trainer, schedule, pool, log)
    if rank == 0:
        trainer.save()
        trainer.save("final.pt")


def train(trainer: Trainer, schedule: Schedule, pool: ThreadPoolExecutor, log: TextIO) -> None:
    """Steps until the schedule ends, the next batch being made while this one is learned."""
    ahead = pool.submit(trainer.batch, trainer.step)
    saved = time.time()
    while (progress := trainer.agree(schedule.progress(trainer.tokens))) < 1:
        began = time.time()
        data = ahead.result()
        ahead = pool.submit(trainer.batch, trainer.step + 1)
        row = trainer.take_step(data, progress)
        trainer.trained_s += time.time() - began
        if trainer.step % 10 == 0:
            row |= {
                "step": trainer.step,
                "tokens": trainer.tokens,
                "progress": progress,
                "trained_s": trainer.trained_s,
            }
            print(
                json.dumps({key: round(value, 4) for key, value in row.items()}),
                file=log,
                flush=True,
            )
        if trainer.rank == 0 and time.time() - saved > CHECKPOINT_SECONDS:
            trainer.save()
            saved = time.time()


if __name__ == "__main__":
    main()

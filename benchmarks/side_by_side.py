"""mlx-flash, stock mlx-lm and llama.cpp: one model, one machine, the same memory caps."""

import json
import platform
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rivals import agreement, gguf_writer, report
from rivals.caps import Image, NoLoopError, memory_cap
from rivals.runs import Measured, Phase, Setup, measure, runtimes
from tqdm import tqdm

from mlx_flash.architectures import text_config
from mlx_flash.cli import bench_run, ceilings
from mlx_flash.cli.bench import _commit
from mlx_flash.machine import Machine, cores, cpu_name
from mlx_flash.opening import open_lazily

RAM = "ram"
VERSIONS = "import json, llama_cpp as l; print(json.dumps([l.__version__, {}]))".format(
    "l.llama_print_system_info().decode()"
)


def main(
    model: Annotated[
        Path, typer.Argument(help="A Qwen3.5-MoE folder by make_checkpoint.py: 4 bit, group 64.")
    ],
    llama_python: Annotated[
        str, typer.Option(help="An interpreter that has llama-cpp-python. [default: this one]")
    ] = sys.executable,
    image: Annotated[
        Path | None,
        typer.Option(help="File for llama.cpp's copy of the model. [default: MODEL.gguf.img]"),
    ] = None,
    phases: Annotated[
        str, typer.Option(help="ram: everything in RAM; a number: a cap, in % of the checkpoint.")
    ] = "ram,75,50,25",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; in each, every run once.")] = 3,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode in a run.")] = 200,
    seconds: Annotated[
        float, typer.Option(help="Of a decode of a rival; the rate is of what it did by then.")
    ] = 60,
    limit: Annotated[float, typer.Option(help="Seconds after which a run is ended.")] = 900,
    prompt_tokens: Annotated[int, typer.Option(min=8, help="Of the prompt before a decode.")] = 128,
    long_prompt_tokens: Annotated[int, typer.Option(help="Of another prompt, in RAM only.")] = 512,
    threads: Annotated[
        int | None, typer.Option(min=1, help="For each runtime but mlx-lm. [default: the cores]")
    ] = None,
    stock_tokens: Annotated[
        int, typer.Option(help="For mlx-lm, slow on a CPU; 0 leaves it out.")
    ] = 4,
    stock_prompt_tokens: Annotated[int, typer.Option(min=2, help="As much of the prompt.")] = 16,
    check: Annotated[int, typer.Option(help="Tokens to compare logits on; 0: don't.")] = 32,
    seed: Annotated[int, typer.Option(help="Of the prompts' random tokens.")] = 0,
    csv: Annotated[Path | None, typer.Option(help="A line per run, written as they end.")] = None,
) -> None:
    """Measure mlx-flash beside llama.cpp and mlx-lm within the same memory caps.

    llama.cpp gets the same model: the checkpoint's 4-bit integers, in the
    Q4_K blocks of a GGUF. Before anything is timed the logits of both are
    compared. It runs with its best settings: in RAM mapped, and read and
    repacked; under a cap mapped, with the disk's own read-ahead and with
    128 KiB, which may be ten times faster. For that its copy lies in a file
    system of its own on a loop device, so that the machine's setting stays.

    Runs take turns. Each is a process of its own, under a cap in a memory
    control group, which counts the page cache too. It starts with an empty
    page cache, warms up, computes the prompt and decodes.

    This needs Linux, root, and llama-cpp-python, built from source so that
    it uses this processor's instructions:

        pip install --no-binary llama-cpp-python llama-cpp-python

    Where every repacked run ends with a signal, the virtual machine promises
    AMX and does not have it. Build with CFLAGS and CXXFLAGS set to
    "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16".

    The real thing takes 60 GB of disk, 24 GB of RAM and hours:

        python benchmarks/make_checkpoint.py --shape qwen3.5-35b-a3b --out qwen

        python benchmarks/side_by_side.py qwen --csv out.csv

    To see that it works, 16 layers in a quarter of an hour:

        python benchmarks/side_by_side.py qwen-16 --repeats 1 --seconds 15

    With few layers, what every token needs does not fit into 25 %: mlx-flash
    then says so. The image with the GGUF stays for the next time.
    """
    caps = phases_of(phases, checkpoint_bytes(model))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # or the image would stay mounted
    with ExitStack() as stack:
        try:
            facts = describe(llama_python)
            if any(phase.cap_bytes for phase in caps):
                with memory_cap(1 << 30):
                    pass
            gguf, made = ready_gguf(model, image or Path(f"{model}.gguf.img"), stack)
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            sys.exit(f"error: {error}")
        lazy = open_lazily(model)
        vocabulary = text_config(lazy.config)["vocab_size"]
        lengths = (prompt_tokens, long_prompt_tokens)
        setup = Setup(
            model=model,
            shards=shards_of(model),
            gguf=gguf,
            image=made,
            llama_python=llama_python,
            prompts=[prompt_of(length, vocabulary, seed) for length in lengths],
            seed=seed,
            tokens=tokens,
            seconds=seconds,
            limit_s=limit,
            threads=threads or cores(),
            stock_prompt_tokens=stock_prompt_tokens,
            stock_tokens=stock_tokens,
            experts=ceilings.sample_experts(lazy),
            facts={"model": str(model), "active_bytes": ceilings.active_bytes(lazy)},
        )
        facts |= {"gguf_bytes": gguf.stat().st_size, "model_bytes": checkpoint_bytes(model)}
        print(about(facts, setup))
        if check:
            agreed = agreement.check(setup, check)
            print(agreed)
            if not agreed.same:
                sys.exit("error: nothing to compare. --check 0 measures anyway.")
        say(run_all(setup, caps, repeats, csv, facts), caps)


def phases_of(text: str, nbytes: int) -> list[Phase]:
    """Of "ram,75": everything in RAM, then a cap of 75 % of the bytes."""
    phases = []
    for word in (word.strip() for word in text.split(",")):
        if word == RAM:
            phases.append(Phase("in RAM", None, None))
        elif word.isdigit() and int(word) > 0:
            phases.append(Phase(f"cap {word} %", int(nbytes * int(word) / 100), int(word)))
        else:
            raise typer.BadParameter(f"{word!r} is neither ram nor a percentage.")
    return phases


def shards_of(model: Path) -> list[Path]:
    return sorted(model.glob("model*.safetensors"))


def checkpoint_bytes(model: Path) -> int:
    if not shards_of(model):
        raise typer.BadParameter(f"{model} holds no checkpoint. Make one: make_checkpoint.py")
    return sum(path.stat().st_size for path in shards_of(model))


def prompt_of(tokens: int, vocabulary: int, seed: int) -> list[int]:
    """The one that mlx-flash's own process makes of this seed."""
    job = bench_run.Job("", {}, tokens, 1, 1, (), seed)
    return bench_run._prompt(job, vocabulary).tolist()


def describe(llama_python: str) -> dict[str, Any]:
    """The machine and the versions. Fails where there is no llama-cpp-python."""
    asked = subprocess.run([llama_python, "-c", VERSIONS], capture_output=True, text=True)
    if asked.returncode:
        raise ValueError(
            f"{llama_python} has no llama-cpp-python that runs: {asked.stderr.splitlines()[-1]}. "
            "Name an interpreter that has: --llama-python"
        )
    llama, features = json.loads(asked.stdout)
    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "machine_ram_bytes": Machine.probe().ram_bytes,
        "system": f"{platform.system()} {platform.release()}",
        "mlx_flash": version("mlx-flash"),
        "commit": _commit(),
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
        "llama_cpp_python": llama,
        "llama_features": features.strip(" |"),
    }


def about(facts: dict[str, Any], setup: Setup) -> str:
    commit = f" ({facts['commit']})" if facts["commit"] else ""
    lines = [
        f"{facts['cpu']}, {facts['cores']} cores, {facts['machine_ram_bytes'] / 1e9:.1f} GB, "
        f"{facts['system']}",
        f"mlx-flash {facts['mlx_flash']}{commit}, MLX {facts['mlx']}, mlx-lm {facts['mlx_lm']}, "
        f"llama-cpp-python {facts['llama_cpp_python']} ({facts['llama_features']})",
        f"{setup.model.name}: {facts['model_bytes'] / 1e9:.2f} GB, as GGUF "
        f"{facts['gguf_bytes'] / 1e9:.2f} GB; {len(setup.prompts[0])} tokens of prompt, "
        f"{setup.tokens} decoded, {setup.threads} threads",
    ]
    if setup.image:
        lines.append(f"read-ahead of this disk: {setup.image.default_read_ahead_kib()} KiB")
    return "\n".join(lines)


def ready_gguf(model: Path, path: Path, stack: ExitStack) -> tuple[Path, Image | None]:
    """The checkpoint for llama.cpp, written if there is none as new as it is.

    Where no image can be mounted, a plain file beside it.
    """
    tensors = gguf_writer.prepare(model)
    nbytes = sum(tensor.nbytes for tensor in tensors)
    made: Image | None = None
    try:
        made = Image(path, nbytes)
        stack.callback(made.close)
        gguf = made.folder / "model.gguf"
    except NoLoopError as error:
        print(f"no runs with another read-ahead than the disk's: {error}", file=sys.stderr)
        gguf = path.with_suffix("")
    newest = max(shard.stat().st_mtime for shard in shards_of(model))
    if not gguf.exists() or gguf.stat().st_mtime < newest:
        if not made and shutil.disk_usage(path.parent).free < nbytes:
            raise OSError(f"{gguf}: no room for {nbytes / 1e9:.2f} GB")
        with tqdm(total=nbytes, unit="B", unit_scale=True, desc="GGUF", disable=None) as bar:
            gguf_writer.write(model, gguf, tensors, bar.update)
    return gguf, made


def run_all(
    setup: Setup, phases: list[Phase], repeats: int, csv: Path | None, facts: dict[str, Any]
) -> list[Measured]:
    """Round by round, so that a slow hour of the machine is one for all; every other backwards."""
    measured: list[Measured] = []
    for repeat in range(repeats):
        for phase in phases:
            for runtime in runtimes(phase, setup)[:: -1 if repeat % 2 else 1]:
                print(f"round {repeat + 1}, {phase.name}, {runtime} ...", file=sys.stderr)
                measured.append(measure(runtime, phase, repeat, setup))
                print(f"    {report.line(measured[-1])}", file=sys.stderr)
                report.set_ceilings(measured)
                if csv:
                    report.write_csv(csv, measured, facts)
    return measured


def say(measured: list[Measured], phases: list[Phase]) -> None:
    print(f"\n{report.table(measured, phases)}\n")
    for ratio in report.ratios(measured, phases):
        print(ratio)


if __name__ == "__main__":
    typer.run(main)

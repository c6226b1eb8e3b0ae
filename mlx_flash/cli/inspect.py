"""`mlx-flash inspect`: what a model is, and what would happen to it here, from headers alone."""

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import typer

from ..anatomy import Anatomy, Part, anatomy, as_json
from ..budget import floor, make_plan
from ..computing import who_computes
from ..config import StreamConfig
from ..errors import BudgetError
from ..machine import Machine
from ..opening import LazyModel, open_lazily
from ..streaming.plan import LayerExperts, Plan, floor_bytes, size
from . import inputs
from . import options as opt
from .bench_options import Model
from .figures import plan_lines
from .generate import one_line_errors, say_untested

OTHERS = 4  # names of tensors that nothing uses: so many are said


def inspect(
    model: Model = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python that the checkpoint brings.")
    ] = False,
    ram: opt.Ram = str(StreamConfig.ram),
    slots: opt.Slots = None,
    context: Annotated[
        int,
        typer.Option(
            min=1, help="Tokens of context to leave room for.", rich_help_panel=opt.STREAMING
        ),
    ] = StreamConfig.context,
    kernels: opt.Kernels = StreamConfig.kernels,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object, sizes in bytes.")
    ] = False,
    debug: Annotated[bool, typer.Option("-v", "--debug", help="Show tracebacks.")] = False,
) -> None:
    """Say what a model is made of, and what would stream within --ram.

    Reads config.json and the headers of the weights: it takes seconds,
    whatever the model's size. A Hub repository is downloaded first, as for
    generate.

    mlx-flash inspect ./my-model --ram 8GB

    checkpoint   whether it streams as it is: in MLX's layout, or in Hugging
                 Face's, whole or in strided pieces; else what to convert
    ignored      tensors on disk that the model does not use
    experts      what streams: so many layers x experts, bytes of each, and
                 bytes that a token reads where none of its own is in RAM
    resident     what every token needs, and so stays in RAM
    kernels      who would compute here, and why not the compiled kernels
    floor        the smallest --ram that this model runs in
    """
    given = SimpleNamespace(**locals())
    with one_line_errors(debug):
        found = _look(given)
        say_untested(found.lazy)
        typer.echo(json.dumps(_facts(found)) if as_json else "\n".join(_lines(found)))


@dataclass(frozen=True)
class _Found:
    """A model and everything that there is to say of it."""

    name: str
    ram: str
    lazy: LazyModel
    made_of: Anatomy
    kernels: tuple[str, str]
    floor_bytes: int
    plan: Plan | None
    refused: str

    @property
    def files(self) -> list[Path]:
        return sorted({info.span.path for info in self.lazy.checkpoint.values()})

    @property
    def disk_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    @property
    def token_bytes(self) -> int:
        """Of routed experts, that one token reads at most."""
        return floor_bytes({path: self.lazy.layers[path] for path in self.lazy.switches})

    @property
    def routed(self) -> dict[LayerExperts, int]:
        """How many layers have experts of one number and size."""
        return Counter(self.lazy.layers[path] for path in self.lazy.switches)


def _look(given: SimpleNamespace) -> _Found:
    knobs = StreamConfig(
        ram=given.ram, slots=given.slots, context=given.context, kernels=given.kernels
    )
    Machine.probe().budget(given.ram)  # one that is no size is refused
    folder = inputs.model_folder(given, None)
    lazy = open_lazily(folder, trust_remote_code=given.trust_remote_code)
    decided, refused, least = None, "", floor(lazy, knobs)
    try:
        decided = make_plan(lazy, knobs)
    except BudgetError as error:
        refused = str(error)
    kernels = who_computes(lazy, knobs)
    made_of = anatomy(lazy)
    name = given.model or "demo"
    return _Found(name, given.ram, lazy, made_of, kernels, least, decided, refused)


def _facts(found: _Found) -> dict[str, Any]:
    """Everything by name, for machines. Names stay; new ones may come."""
    lazy, made_of = found.lazy, found.made_of
    return {
        "model": found.name,
        "model_type": lazy.config["model_type"],
        "class": _class(lazy),
        "tested": found.lazy.architecture.tested,
        "checkpoint": {
            "layout": "mlx" if made_of.in_mlx_layout else "huggingface",
            "streams": not made_of.conversion,
            "reads": made_of.reads or None,
            "conversion": made_of.conversion or None,
            "files": len(found.files),
            "bytes": found.disk_bytes,
            "ignored": {
                "tensors": made_of.unused_tensors,
                "bytes": sum(made_of.unused.values()),
                "names": made_of.unused,
            },
        },
        "layers": dict(made_of.layers),
        "experts": {
            **as_json(made_of.experts),
            "bytes_per_token": found.token_bytes,
            "layers": [{"layers": n, **asdict(e)} for e, n in found.routed.items()],
        },
        "resident": {name: as_json(part) for name, part in made_of.parts.items()},
        "kernels": {"run": found.kernels[0], "why_not_native": found.kernels[1] or None},
        "floor_bytes": found.floor_bytes,
        "plan": _plan_facts(found.plan) if found.plan else None,
        "refused": found.refused or None,
    }


def _plan_facts(plan: Plan) -> dict[str, Any]:
    return {
        "ram_bytes": plan.ram_bytes,
        "planned_bytes": plan.total_bytes,
        "context": plan.context,
        "prefill_tokens": plan.prefill_tokens,
        **asdict(plan.fixed),
        "slot_bytes": plan.slot_bytes,
        "residency": plan.residency,
        "slots": dict(plan.slots),
    }


def _lines(found: _Found) -> list[str]:
    """The same for people, a topic a line."""
    lazy, made_of = found.lazy, found.made_of
    tested = "tested" if lazy.architecture.tested else "untested"
    files = "1 file" if len(found.files) == 1 else f"{len(found.files)} files"
    runs, why_not = found.kernels
    lines = [
        ("model", f"{lazy.config['model_type']}, {tested}, {_class(lazy)}"),
        ("checkpoint", f"{_form(made_of)}, {files}, {size(found.disk_bytes)}"),
    ]
    if made_of.unused:
        lines.append(("ignored", _ignored(made_of)))
    kinds = ", ".join(f"{n} {kind}" for kind, n in made_of.layers.most_common())
    lines.append(("layers", f"{sum(made_of.layers.values())}: {kinds}"))
    lines += _routed_lines(found)
    resident = sum(part.nbytes for part in made_of.parts.values())
    lines.append(("resident", f"{size(resident)} that every token needs"))
    width = max(map(len, made_of.parts), default=0)
    lines += [
        ("", f"{name:{width}}  {size(part.nbytes):>9}  {_formats(part)}")
        for name, part in made_of.parts.items()
    ]
    lines.append(("kernels", f"{runs}: {why_not}" if why_not else runs))
    lines.append(("floor", f"--ram {math.ceil(found.floor_bytes / 1e6)}MB"))
    lines.append(("plan", found.refused or f"for --ram {found.ram}"))
    said = [f"{title:10}  {text}" for title, text in lines]
    return [*said, *(f"{'':10}  {line}" for line in (plan_lines(found.plan) if found.plan else ()))]


def _class(lazy: LazyModel) -> str:
    return f"{type(lazy.model).__module__}.{type(lazy.model).__name__}"


def _form(made_of: Anatomy) -> str:
    if made_of.conversion:
        return f"needs a conversion: `{made_of.conversion}`"
    if made_of.in_mlx_layout:
        return "MLX layout"
    pieces = " in strided pieces" if made_of.reads == "strided" else ""
    return f"Hugging Face layout, streamed as it is{pieces}"


def _ignored(made_of: Anatomy) -> str:
    names = [f"{name}.*" for name in made_of.unused]
    more = f" and {len(names) - OTHERS} more" if len(names) > OTHERS else ""
    tensors = "1 tensor" if made_of.unused_tensors == 1 else f"{made_of.unused_tensors} tensors"
    nbytes = size(sum(made_of.unused.values()))
    return f"{tensors}, {nbytes}: {', '.join(names[:OTHERS])}{more}"


def _routed_lines(found: _Found) -> list[tuple[str, str]]:
    experts, lazy = found.made_of.experts, found.lazy
    if not lazy.switches:
        layers = size(sum(layer.nbytes for layer in lazy.layers.values()))
        return [("experts", f"none: layers stream whole, {layers} of them")]
    lines = [
        ("", f"{n} x {e.count}, {e.top_k} per token, {size(e.nbytes_each)} each")
        for e, n in found.routed.items()
    ]
    total = f"{size(experts.nbytes)}, {_formats(experts)}"
    return [("experts", f"{total}; a token reads up to {size(found.token_bytes)}"), *lines]


def _formats(part: Part) -> str:
    """The formats by their bytes: how much of each where there are several."""
    if len(part.formats) == 1:
        return str(next(iter(part.formats)))
    return ", ".join(f"{form} {size(n)}" for form, n in part.formats.most_common())

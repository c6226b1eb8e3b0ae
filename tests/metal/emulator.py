"""Metal kernels on a CPU: the source that MLX generates, compiled by g++ and run lane by lane.

``metal_kernel`` stands in for ``mx.fast.metal_kernel``. It has MLX write the kernel, which inside
``mx.export_function`` needs no Metal and with ``verbose=True`` is printed, puts MLX's own
``utils.h`` in front as MLX does, and compiles that against ``emulation/metal_stdlib``;
``emulation/lanes.cpp`` runs it. A fault that it finds is a ``MetalFault``.

What this cannot tell: how fast a kernel is, what Metal's compiler would refuse (``dialect.py``
looks for that), and the last bits of functions such as ``exp``, which are a GPU's own.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

HERE = Path(__file__).parent / "emulation"
MLX_INCLUDE = Path(mx.__file__).parent / "include"
COMPILER = shutil.which("g++")
BUILDS = Path(tempfile.gettempdir()) / f"metal-emulation-{os.getuid()}"

MODES = {
    "plain": ["-O2"],
    # A variable that nobody set holds a huge number or -inf, so that no sum is right by chance.
    # Frame pointers and no threaded jumps: lanes.cpp knows a place by the calls that lead there.
    "checked": [
        "-O1",
        "-fsanitize=thread",
        "-DCHECKED",
        "-ftrivial-auto-var-init=pattern",
        "-fno-omit-frame-pointer",
        "-fno-thread-jumps",
    ],
    "sanitized": ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
}
PRELUDE = '#include "metal_stdlib"\n#include "mlx/backend/metal/kernels/utils.h"\n'
"""In front of every kernel: the library, and what MLX puts there."""
FLAGS = [
    "-std=gnu++17",
    "-w",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-gnu-unique",
    "-fno-threadsafe-statics",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    f"-I{HERE}",
]

launches: list["Launch"] = []
"""What was run, in order, while ``recording()``."""


class MetalFault(AssertionError):  # noqa: N818 (the word GPUs have for it)
    """A kernel did what a GPU forbids or leaves undefined."""


class CompileError(Exception):
    """A kernel is no C++. Not a fault: a test that breaks a kernel has to break what it does."""


@dataclass(frozen=True)
class Launch:
    """One kernel launch: sizes in threads, bytes of whole buffers."""

    name: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    input_bytes: int
    output_bytes: int


@dataclass
class Buffer:
    """Memory that a launch sees: an array, whether the kernel may write, whether it is filled."""

    name: str
    data: np.ndarray
    writable: bool = False
    initialized: bool = True


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("writable", ctypes.c_int32),
        ("initialized", ctypes.c_int32),
    )


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    compile_options: dict[str, Any] | None = None,
    *,
    mode: str = "checked",
) -> Callable[..., list[mx.array]]:
    """As ``mx.fast.metal_kernel``; ``mode`` is a key of ``MODES``."""
    real = _real_metal_kernel(
        name=name,
        input_names=list(input_names),
        output_names=list(output_names),
        source=source,
        header=header,
        ensure_row_contiguous=ensure_row_contiguous,
        atomic_outputs=atomic_outputs,
    )
    generated: dict[Any, str] = {}

    def run(
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Sequence[tuple[str, Any]] | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
    ) -> list[mx.array]:
        arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        key = (
            tuple((a.dtype, a.ndim, a.size < 8, not ensure_row_contiguous) for a in arrays),
            tuple(map(str, template or ())),
            tuple(output_dtypes),
        )
        if key not in generated:
            generated[key] = _generate(
                real, arrays, output_shapes, output_dtypes, grid, threadgroup, template
            )
        if verbose:
            sys.stdout.write(generated[key])
        shapes = [tuple(shape) for shape in output_shapes]
        outputs = [_empty(shape, d) for shape, d in zip(shapes, output_dtypes, strict=True)]
        if init_value is not None:
            for i, dtype in enumerate(output_dtypes):
                outputs[i] = _host(mx.full(shapes[i], init_value, dtype))
        given = {}
        for label, array in zip(input_names, arrays, strict=True):
            given[label] = _host(array)
            given[f"{label}_shape"] = np.array(array.shape or (0,), np.int32)
            given[f"{label}_strides"] = np.array(_strides(array.shape) or (0,), np.int64)
            given[f"{label}_ndim"] = np.array([array.ndim], np.int32)
        given |= dict(zip(output_names, outputs, strict=True))
        names = _buffer_names(generated[key])
        run_source(
            generated[key],
            [
                Buffer(n, given[n], n in output_names, init_value is not None or n in input_names)
                for n in names
            ],
            grid,
            threadgroup,
            mode,
        )
        used = sum(a.nbytes for a in arrays)
        if _recording:
            made = sum(o.nbytes for o in outputs)
            launches.append(Launch(name, tuple(grid), tuple(threadgroup), used, made))
        return [
            _to_mlx(o, shape, d) for o, shape, d in zip(outputs, shapes, output_dtypes, strict=True)
        ]

    return run


def run_source(
    source: str,
    buffers: Sequence[Buffer],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    mode: str = "checked",
    include: Sequence[Path] = (),
) -> None:
    """Run one kernel of a complete Metal source; it writes into the writable buffers.

    Args:
        source: Metal, with one kernel: the last ``[[host_name]]`` instance, or the function.
        buffers: In the order of the kernel's buffer parameters.
        grid: Threads in x, y and z.
        threadgroup: Threads of a group in x, y and z.
        mode: A key of ``MODES``.
        include: More folders for the source's own includes.

    Raises:
        CompileError: If it does not compile.
        MetalFault: If it does what a GPU forbids.
    """
    built = build(source, mode, tuple(include))
    if mode == "sanitized":
        _run_alone(built, buffers, grid, threadgroup)
        return
    library = _load(built)
    table = (_Buffer * len(buffers))(
        *(
            _Buffer(b.name.encode(), b.data.ctypes.data, b.data.nbytes, b.writable, b.initialized)
            for b in buffers
        )
    )
    untouched = ctypes.c_uint64()
    three = ctypes.c_uint32 * 3
    fault = library.lanes_launch(
        table, len(buffers), three(*grid), three(*threadgroup), ctypes.byref(untouched)
    )
    if fault:
        raise MetalFault(fault.decode())
    if mode == "checked" and untouched.value:
        raise MetalFault(f"unwritten: {untouched.value} bytes of output that no thread wrote")


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect the launches made inside."""
    global _recording
    launches.clear()
    _recording = True
    try:
        yield launches
    finally:
        _recording = False


@functools.cache
def build(source: str, mode: str, include: tuple[Path, ...] = ()) -> Path:
    """The shared object, or with ``sanitized`` the program, of a complete Metal source.

    Raises:
        CompileError: With the compiler's first lines.
    """
    text = _translation(source)
    flags = [*FLAGS, *MODES[mode], *(f"-I{folder}" for folder in include), f"-I{MLX_INCLUDE}"]
    files = [f.read_bytes() for f in sorted(HERE.rglob("*")) if f.is_file()]
    library = _digest(flags, mx.__version__, *files)
    built = BUILDS / f"{_digest(library, text.encode())}.{mode}"
    if built.exists():
        return built
    BUILDS.mkdir(exist_ok=True)
    header, machine = _library(library, flags, mode == "sanitized")
    kernel = BUILDS / f"{built.name}.cpp"
    _write(kernel, text)
    _compile(kernel.with_suffix(".o"), [*flags, "-include", str(header), "-c", str(kernel)])
    link = (
        ["-fsanitize=address,undefined"] if mode == "sanitized" else ["-shared", "-Wl,-Bsymbolic"]
    )
    _compile(built, [*link, str(kernel.with_suffix(".o")), str(machine)])
    return built


def _library(name: str, flags: list[str], alone: bool) -> tuple[Path, Path]:
    """What every kernel includes, compiled once (half of a kernel's time), and lanes.cpp."""
    header, machine = BUILDS / f"{name}.h", BUILDS / f"{name}.lanes.o"
    compiled = BUILDS / f"{name}.h.gch"
    if not compiled.exists():
        _write(header, PRELUDE)
        _compile(compiled, [*flags, "-x", "c++-header", str(header)])
    if not machine.exists():
        ours = [flag for flag in flags if flag != "-fsanitize=thread"]
        main = ["-DSTANDALONE"] if alone else []
        _compile(machine, [*ours, *main, "-c", str(HERE / "lanes.cpp")])
    return header, machine


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def _write(target: Path, text: str) -> None:
    made = target.with_name(f"{target.name}.{os.getpid()}")
    made.write_text(text)
    made.rename(target)


def _compile(target: Path, arguments: list[str]) -> None:
    """Compile or link; the target appears whole, for others may be building the same."""
    assert COMPILER, "the emulator needs g++"
    made = target.with_name(f"{target.name}.{os.getpid()}")
    done = subprocess.run([COMPILER, *arguments, "-o", str(made)], capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line][:4]
        raise CompileError("does not compile: " + "\n".join(errors or [done.stderr[:2000]]))
    made.rename(target)


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.lanes_launch.restype = ctypes.c_char_p
    return library


def _run_alone(
    program: Path,
    buffers: Sequence[Buffer],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
) -> None:
    head = struct.pack("7I", len(buffers), *grid, *threadgroup)
    with tempfile.NamedTemporaryFile(dir=BUILDS) as file:
        file.write(head)
        for b in buffers:
            file.write(struct.pack("2Q", b.data.nbytes, b.writable + 2 * b.initialized))
            file.write(b.data.tobytes())
        file.flush()
        done = subprocess.run(
            [str(program), file.name],
            capture_output=True,
            text=True,
            env={"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"},
        )
        if done.returncode:
            lines = done.stderr.splitlines()
            telling = [x for x in lines if "ERROR: " in x or "runtime error: " in x]
            raise MetalFault("\n".join(telling[:1] or lines[-1:] or [f"exit {done.returncode}"]))
        file.seek(len(head))
        for b in buffers:
            file.seek(16, os.SEEK_CUR)
            data = file.read(b.data.nbytes)
            if b.writable:
                b.data[...] = np.frombuffer(data, np.uint8).view(b.data.dtype).reshape(b.data.shape)


# From Metal to C++ ----------------------------------------------------------------------------

_FUNCTION = re.compile(r"\[\[kernel\]\]\s*(?:\[\[[^\]]*\]\]\s*)*void\s+(\w+)\s*\(")
_INSTANCE = re.compile(r"\bdecltype\(((?:[^()]|\([^()]*\))*)\)[^;]*;")
_PARAMETER = re.compile(r"\[\[\s*(\w+)\s*(?:\(\s*(\d+)\s*\))?\s*\]\]")
# Variables, at the beginning of a statement: neither parameters nor pointers.
ARRAY = r"\w+(?:\s*\[[^\];]*\])*"
THREADGROUP_VARIABLES = re.compile(
    rf"([;{{}}]\s*)threadgroup(\s+[\w:]+(?:\s*<[^;<>]*>)?\s+)({ARRAY}(?:\s*,\s*{ARRAY})*)\s*;"
)
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)


def _translation(source: str) -> str:
    """The Metal source as a C++ translation unit with an ``enter_kernel`` for lanes.cpp."""
    text = _COMMENT.sub(lambda m: "\n" * m[0].count("\n") or " ", source)
    for _ in range(2):  # neighbours share a semicolon
        text = THREADGROUP_VARIABLES.sub(_static, text)
    instances = _INSTANCE.findall(text)
    name = instances[-1] if instances else _FUNCTION.findall(text)[-1]
    # `template [[host_name(...)]] [[kernel]] decltype(f<T>) f<T>;` only names an instance.
    text = re.sub(r"\btemplate\s*\[\[\s*host_name[^;]*;", "", text)
    arguments = []
    buffers = 0
    for i, (attribute, _) in enumerate(_attributes(text, name)):
        parameter = f"std::tuple_element_t<{i}, P>"
        if attribute == "buffer":
            arguments.append(f"emulation::from_buffer<{parameter}>(buffers[{buffers}])")
            buffers += 1
        else:
            field = _ATTRIBUTES.get(attribute, f"at.{attribute}")
            arguments.append(f"emulation::attribute<{parameter}>({field})")
    return (
        f"{text}\n"
        "void enter_kernel(void* const* buffers, const Place& at) {\n"
        f"  using P = decltype(emulation::parameters(&{name}));\n"
        f"  {name}({', '.join(arguments)});\n"
        "}\n"
    )


def _static(match: re.Match[str]) -> str:
    # Set to a constant: else the compiler would guard a template's variable with a flag.
    variables = re.sub(rf"({ARRAY})", r"\1 = {}", match[3])
    return f"{match[1]}static{match[2]}{variables};"


_ATTRIBUTES = {
    "threads_per_simdgroup": "uint32_t(kSimd)",
    "thread_execution_width": "uint32_t(kSimd)",
}


def _attributes(text: str, name: str) -> list[tuple[str, str]]:
    """(attribute, its number) of each parameter of a kernel, in order."""
    function = name.split("<")[0].strip()
    begin = next(m for m in _FUNCTION.finditer(text) if m[1] == function).end()
    depth, end = 1, begin
    while depth:
        depth += {"(": 1, ")": -1}.get(text[end], 0)
        end += 1
    return _PARAMETER.findall(text[begin : end - 1])


def _buffer_names(source: str) -> list[str]:
    return re.findall(r"(\w+)\s*\[\[buffer\(\d+\)\]\]", source)


# What MLX generates ---------------------------------------------------------------------------

_real_metal_kernel = mx.fast.metal_kernel
_recording = False


def _generate(
    kernel: Any,
    arrays: Sequence[mx.array],
    output_shapes: Any,
    output_dtypes: Any,
    grid: Any,
    threadgroup: Any,
    template: Any,
) -> str:
    """The source that MLX makes for this call. It prints it from C++, so to a descriptor."""

    def call(*inputs: mx.array) -> Any:
        return kernel(
            inputs=list(inputs),
            output_shapes=output_shapes,
            output_dtypes=output_dtypes,
            grid=grid,
            threadgroup=threadgroup,
            template=template,
            verbose=True,
        )

    examples = [mx.zeros(a.shape, a.dtype) for a in arrays]
    libc = ctypes.CDLL(None)
    with tempfile.TemporaryFile() as printed, tempfile.NamedTemporaryFile() as exported:
        sys.stdout.flush()
        saved = os.dup(1)
        os.dup2(printed.fileno(), 1)
        try:
            mx.export_function(exported.name, call, *examples)
        finally:
            libc.fflush(None)
            os.dup2(saved, 1)
            os.close(saved)
        printed.seek(0)
        text = printed.read().decode()
    return text.split("```\n")[1].split("\n```")[0] + "\n"


def _host(array: mx.array) -> np.ndarray:
    mx.eval(array)
    if array.size == 0:
        return np.zeros(0, np.uint8)
    return np.frombuffer(mx.contiguous(array), np.uint8).copy()


def _empty(shape: tuple[int, ...], dtype: mx.Dtype) -> np.ndarray:
    return np.full(int(np.prod(shape)) * dtype.size, 0xA5, np.uint8)


def _to_mlx(data: np.ndarray, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    return mx.array(data).view(dtype).reshape(shape)


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides = [1]
    for n in reversed(shape[1:]):
        strides.append(strides[-1] * n)
    return tuple(reversed(strides[: len(shape)]))

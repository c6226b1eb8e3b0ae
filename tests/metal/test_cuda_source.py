"""The CUDA kernels' text, run on a CPU lane by lane. Whether nvcc takes it, nobody has seen.

A warp is a simdgroup and a block a threadgroup, so the Metal emulator runs them: ``cuda_shim.h``
has the rest. The function around a body is as MLX's CUDA backend writes it.
"""

from pathlib import Path

import emulator
import mlx.core as mx
import pytest
import test_delta
import test_mamba2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import ArraysCache
from recurrences import delta64, exact, mamba64, near

from mlx_flash.kernels import cuda
from mlx_flash.kernels.metal import sources

SHIM = (Path(__file__).parent / "cuda_shim.h").read_text()
TYPES = {mx.float32: "float", mx.float16: "__half", mx.bfloat16: "__nv_bfloat16"}
PLACES = {
    "threadIdx": "thread_position_in_threadgroup",
    "blockIdx": "threadgroup_position_in_grid",
    "blockDim": "threads_per_threadgroup",
    "gridDim": "threadgroups_per_grid",
}
DELTA_FORMS = ["smallest", "one to one", "one to two", "odd", "grouped bfloat16"]
calmly = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
launched = []


def cuda_kernel(name, input_names, output_names, source, header=""):
    """As ``mx.fast.cuda_kernel``."""

    def run(*, inputs, template, grid, threadgroup, output_shapes, output_dtypes):
        assert all(g % t == 0 for g, t in zip(grid, threadgroup, strict=True)), "MLX adds a block"
        arrays = [mx.array(x) for x in inputs]
        dtypes = {x.dtype for x in arrays if x.ndim}
        assert dtypes <= {x for _, x in template} | {mx.float32}, "a type the cache cannot tell"
        values = [emulator._host(x) for x in arrays]
        made = [emulator._empty(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]
        kinds = [f"const {TYPES[x.dtype]}*" for x in arrays]
        kinds += [f"{TYPES[dtype]}*" for dtype in output_dtypes]
        names = [*input_names, *output_names]
        parameters = [
            f"{kind} {label} [[buffer({i})]]"
            for i, (kind, label) in enumerate(zip(kinds, names, strict=True))
        ]
        parameters += [f"uint3 {label} [[{place}]]" for label, place in PLACES.items()]
        constants = [
            f"using {label} = {TYPES[value]};\n"
            if isinstance(value, mx.Dtype)
            else f"constexpr {type(value).__name__} {label} = {str(value).lower()};\n"
            for label, value in template
        ]
        body = source.replace("__shared__", "threadgroup")
        text = (
            f"{SHIM}\n{header}\nnamespace mlx::core::cu {{\n[[kernel]] void {name}("
            f"{', '.join(parameters)}) {{\n{''.join(constants)}{body}\n}}\n}}\n"
            f"using mlx::core::cu::{name};\n"
        )
        buffers = [
            emulator.Buffer(label, data, i >= len(values), i < len(values))
            for i, (label, data) in enumerate(zip(names, [*values, *made], strict=True))
        ]
        emulator.run_source(text, buffers, grid, threadgroup)
        launched.append(name)
        rows = zip(made, output_shapes, output_dtypes, strict=True)
        return [emulator._to_mlx(*row) for row in rows]

    return run


@pytest.fixture
def on_cpu(metal, monkeypatch):
    monkeypatch.setattr(mx.fast, "cuda_kernel", cuda_kernel)
    launched.clear()


@pytest.mark.parametrize("form", DELTA_FORMS)
@settings(max_examples=4, deadline=None, suppress_health_check=calmly)
@given(batch=st.integers(1, 3), seed=st.integers(0, 2**32 - 1), fresh=st.booleans())
def test_a_delta_step_is_float64s(on_cpu, form, batch, seed, fresh):
    given = test_delta.arguments(form, batch, seed, fresh=fresh)
    test_delta.agrees(cuda.delta_step(*given), delta64(*given), form)


@pytest.mark.parametrize("form", test_mamba2.FORMS)
@settings(max_examples=4, deadline=None, suppress_health_check=calmly)
@given(batch=st.integers(1, 3), seed=st.integers(0, 2**32 - 1), fresh=st.booleans())
def test_a_mamba2_step_is_float64s(on_cpu, form, batch, seed, fresh):
    given = test_mamba2.arguments(form, batch, seed, fresh=fresh)
    test_mamba2.agrees(cuda.mamba2_step(*given), mamba64(*given), form)


@pytest.mark.parametrize("value", [1e4, -17.0, -1e4])
def test_gates_beyond_exp(on_cpu, value):
    given = test_delta.arguments("one to one", 1)
    for i in (2, 3):
        extreme = list(given)
        extreme[i] = mx.full(given[i].shape, value).astype(given[i].dtype)
        test_delta.agrees(cuda.delta_step(*extreme), delta64(*extreme), "one to one")
    given = test_mamba2.arguments("one group", 1)
    given[6] = mx.full(given[6].shape, value)
    test_mamba2.agrees(cuda.mamba2_step(*given), mamba64(*given), "one group")


MAKERS = {
    "qwen3_5": lambda: test_delta.net_of("qwen3_5"),
    "qwen3_next": lambda: test_delta.net_of("qwen3_next"),
    "nemotron_h": test_mamba2.mixer_of,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_decoding_is_mlx_lms(on_cpu, kind):
    stock, net = MAKERS[kind](), MAKERS[kind]()
    cuda.use_cuda(net)
    assert type(net) is (cuda.DELTA_NETS | cuda.MIXERS)[type(stock)]
    caches = ArraysCache(2), ArraysCache(2)
    for tokens in (5, 1, 1):
        x = mx.random.normal((2, tokens, 64))
        near(net(x, None, caches[1]), exact(stock(x, None, caches[0])), -1)
        near(caches[1][1], exact(caches[0][1]), (-2, -1))
    assert launched == ["mamba2_step" if kind == "nemotron_h" else "delta_step"] * 2


def test_without_cuda_nothing_is_made_until_it_is_called():
    if mx.cuda.is_available():
        pytest.skip("SKIPPED LOUDLY: this MLX has CUDA")
    with pytest.raises(RuntimeError, match="CUDA"):
        cuda.delta_step(*test_delta.arguments("smallest", 1))


def test_they_say_that_they_are_unrun():
    texts = [path.read_text() for path in (sources().parent / "cuda").glob("*.cu")]
    assert len(texts) == 2
    assert all("UNRUN" in text for text in [*texts, cuda.__doc__])


MUTATIONS = {
    "first barrier": ("delta_step", "__syncthreads();\n\nfloat4 q[N]", "\nfloat4 q[N]"),
    "second barrier": ("delta_step", "__syncthreads();\n\nif (me < Dv)", "\nif (me < Dv)"),
    "history": ("delta_step", "row + (t - 1) * CHANNELS", "row + t * CHANNELS"),
    "key head": ("delta_step", "head / REPEAT", "head % Hk"),
    "barrier": ("mamba2_step", "__syncthreads();\n", ""),
    "stride": ("mamba2_step", "shared_mixed[Ds / 4 + 8 * n", "shared_mixed[Ds / 4 + 4 * n"),
    "group": ("mamba2_step", "head / (H / G)", "head % G"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_kernel_is_found(on_cpu, mutation, monkeypatch):
    name, old, new = MUTATIONS[mutation]

    def broken(source, **others):
        assert source.count(old) == 1
        return cuda_kernel(source=source.replace(old, new), **others)

    monkeypatch.setattr(mx.fast, "cuda_kernel", broken)
    with pytest.raises(AssertionError):
        if name == "delta_step":
            given = test_delta.arguments("grouped", 2)
            test_delta.agrees(cuda.delta_step(*given), delta64(*given), "grouped")
        else:
            given = test_mamba2.arguments("Nemotron 3 Nano's", 2)
            test_mamba2.agrees(cuda.mamba2_step(*given), mamba64(*given), "Nemotron 3 Nano's")

"""Every family against an oracle that nobody here wrote, streamed at a third of its experts.

The oracle is transformers, in float32, on checkpoints that it wrote (`oracle.py`); where weights
are quantized, stock mlx-lm with everything resident. What comes out is the table of
`docs/architectures.md`: `pytest tests/test_architectures.py --write-tables` makes it anew.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import families
import mlx.core as mx
import numpy as np
import oracle
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from mlx_flash import PrefixCache, dense, loader
from mlx_flash.config import StreamConfig
from mlx_flash.errors import CheckpointError, UsageError
from mlx_flash.layout import Layout
from mlx_flash.opening import open_lazily
from mlx_flash.streaming.store import ExpertStore

TABLE = Path(__file__).parents[1] / "docs" / "architectures.md"
TOLERANCE = 1e-3  # of the largest logit of a position

FORMS = {
    "hf": None,
    "mlx": None,
    "4bit": {"group_size": 32, "bits": 4},
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
}
KERNELS = ("reference", "native")
NOTES = "Where transformers and mlx-lm disagree, and what of a tiny checkpoint hides it:"
DENSE = ("llama", "qwen3", "nemotron", "mamba2", "nemotron_h-dense")
NEEDS_CONVERSION = {("qwen3_vl_moe", "hf"), ("llama4", "hf")}  # published transposed

pytestmark = [
    pytest.mark.skipif(bool(oracle.missing()), reason=oracle.missing()),
]


@dataclass
class Told:
    """What the oracle said of a prompt of 64 tokens and the 32 that it decoded."""

    tokens: list[int]
    logits: np.ndarray  # [96, VOCAB]


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """Folders of all families, written by transformers."""
    root = tmp_path_factory.mktemp("families")
    oracle.run(root)
    return root


@pytest.fixture(scope="session")
def told(written):
    def of(name):
        found = np.load(written / name / "oracle.npz")
        return Told(found["tokens"].tolist(), found["logits"])

    return of


@pytest.fixture(scope="session")
def checkpoint(written):
    """The folder of a family in one of the forms."""

    def of(name, form):
        folder = written / name / form
        if not folder.exists():
            families.write_mlx(written / name / "hf", folder, FORMS[form])
        return folder

    return of


@pytest.fixture(scope="session")
def resident(checkpoint, told):
    """Logits of stock mlx-lm with everything in RAM, computed once."""
    answers = {}

    def of(name, form):
        if (name, form) not in answers:
            model, _ = load_model(checkpoint(name, form))
            answers[name, form] = families.logits(model, told(name).tokens)
        return answers[name, form]

    return of


@pytest.fixture(scope="session")
def table():
    """Outcomes by (family, form, kernels), for the page that is made of them."""
    return {}


def stream(folder, kernels):
    """The model with a third of its experts in RAM, or of its layers where it has none."""
    lazy = open_lazily(folder)
    slots = max(max(e.top_k, -(-e.count // 3)) for e in lazy.layers.values())
    if not lazy.switches:
        slots = len(lazy.layers) // 3
    model = loader.stream(lazy, StreamConfig("4GB", slots, context=128, kernels=kernels))
    assert model.plan.residency <= 0.4
    return model


def distance(ours, theirs):
    """Largest error of each position's logits, relative to their largest; and its top-1."""
    error = np.abs(ours - theirs).max(-1) / np.abs(theirs).max(-1)
    return error.max(), bool((ours.argmax(-1) == theirs.argmax(-1)).all())


def check_streamed(model):
    if model.ring is None:
        assert model.stats().evictions > 0, "a third of the experts, and none lost its slot"
    else:
        assert model.ring.stats.calls > 0, "no layer passed through the ring"


@pytest.fixture(autouse=True)
def stream_small_weights(monkeypatch):
    monkeypatch.setattr(dense, "LEAST_BYTES", 1)  # those of tiny layers all are


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("form", ["hf", "mlx"])
@pytest.mark.parametrize("name", families.FAMILIES)
def test_streams_what_transformers_says(checkpoint, told, table, name, form, kernels):
    expected = told(name)
    if (name, form) in NEEDS_CONVERSION:
        with pytest.raises(CheckpointError, match=r"mlx_lm\.convert --hf-path"):
            stream(checkpoint(name, form), kernels)
        table[name, form, kernels] = "convert"
        return
    model = stream(checkpoint(name, form), kernels)
    error, same = distance(families.logits(model, expected.tokens), expected.logits)
    assert same, "another token than transformers' somewhere"
    assert error <= TOLERANCE
    check_streamed(model)
    table[name, form, kernels] = "yes"


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("form", ["4bit", "mxfp4"])
@pytest.mark.parametrize("name", families.FAMILIES)
def test_quantized_streams_what_mlx_lm_says(checkpoint, told, resident, table, name, form, kernels):
    model = stream(checkpoint(name, form), kernels)
    ours, theirs = families.logits(model, told(name).tokens), resident(name, form)
    if kernels == "reference":
        assert np.array_equal(ours, theirs), "MLX's own kernels, and other bits"
    error, same = distance(ours, theirs)
    assert same
    assert error <= TOLERANCE
    check_streamed(model)
    table[name, form, kernels] = "yes"


def reverse_slots(monkeypatch):
    place = ExpertStore.place
    monkeypatch.setattr(ExpertStore, "place", lambda store, e: place(store, e)[::-1])


def swap_two_experts(monkeypatch):
    rows = Layout.rows

    def swapped(layout, name, count, row_bytes):
        first, second, *rest = rows(layout, name, count, row_bytes)
        return [second, first, *rest]

    monkeypatch.setattr(Layout, "rows", swapped)


def swap_layers(monkeypatch):
    span = Layout.span

    def swapped(layout, name, nbytes):
        number = re.search(r"layers\.(\d)\.", name)
        others = (f"layers.{int(number[1]) + step}." for step in (3, -1, 0))
        return next(
            filter(None, (span(layout, name.replace(number[0], o), nbytes) for o in others))
        )

    monkeypatch.setattr(Layout, "span", swapped)


def keep_one_state(model, prompt):
    """A cache that is new but for one layer, which remembers another prompt."""
    old, new = make_prompt_cache(model), make_prompt_cache(model)
    model(mx.array([prompt]), cache=old)
    mx.eval([cache.state for cache in old if cache is not None])
    return [old[0], *new[1:]]


MUTATIONS = [
    (name, mutation)
    for name in families.FAMILIES
    for mutation in ([swap_layers] if name in DENSE else [reverse_slots, swap_two_experts])
]


@pytest.mark.parametrize(("name", "mutation"), MUTATIONS)
def test_what_is_misplaced_would_show(checkpoint, told, monkeypatch, name, mutation):
    expected = told(name)
    mutation(monkeypatch)
    model = stream(checkpoint(name, "mlx"), "reference")
    error, _ = distance(families.logits(model, expected.tokens), expected.logits)
    assert error > TOLERANCE


@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_state_that_was_not_reset_would_show(checkpoint, told, name):
    expected = told(name)
    model = stream(checkpoint(name, "mlx"), "reference")
    stale = keep_one_state(model, families.prompt(seed=99, length=40))
    try:
        ours = families.logits(model, expected.tokens, cache=stale)
    except ValueError as error:  # one mask does for all layers, and that one has more behind it
        assert "cannot be broadcast" in str(error)
    else:
        assert distance(ours, expected.logits)[0] > TOLERANCE
    ours = families.logits(model, expected.tokens)
    assert distance(ours, expected.logits)[0] <= TOLERANCE


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_restored_state_goes_on_as_a_fresh_run(checkpoint, name, kernels):
    model = stream(checkpoint(name, "mlx"), kernels)
    prefix, *tails = (families.prompt(seed, length) for seed, length in ((1, 40), (2, 6), (3, 6)))
    prefixes = PrefixCache(model, max_bytes=10**9)
    if name == "llama4":  # its chunked cache is not known to PrefixCache, which leaves it alone
        with pytest.raises(UsageError, match="ChunkedKVCache"):
            prefixes.prefill(prefix)
        return
    prefixes.prefill(prefix)

    def go_on(cache, tokens):
        steps = [model(mx.array([[token]]), cache=cache) for token in tokens]
        return np.array(mx.concatenate(steps, axis=1))

    for tail in (*tails, tails[0]):
        fresh = make_prompt_cache(model)
        mx.eval(model(mx.array([prefix]), cache=fresh))
        cache, rest = prefixes.restore([*prefix, *tail])
        assert rest == tail
        assert np.array_equal(go_on(cache, rest), go_on(fresh, tail))


def rows_of(table):
    """The table's rows, from the outcomes of this session."""
    columns = ("family", "oracle", "MLX layout", "HF layout", "4 bit", "mxfp4")
    yield f"| {' | '.join((*columns, 'reference path', 'native path'))} |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, family in families.FAMILIES.items():
        outcomes = {(form, k): table[name, form, k] for form in FORMS for k in KERNELS}
        cells = [name, "transformers" if family.hf else "mlx-lm"]
        for form in ("mlx", "hf", "4bit", "mxfp4"):
            if form == "hf" and not family.hf:
                cells.append("not written")
            else:
                (cell,) = {outcomes[form, k] for k in KERNELS}
                cells.append(cell)
        for kernels in KERNELS:
            said = {outcomes[form, kernels] for form in FORMS}
            cells.append("yes" if said <= {"yes", "convert"} else "no")
        yield f"| {' | '.join(cells)} |"


def test_the_table_says_what_the_tests_said(request, table):
    if len(table) < len(families.FAMILIES) * len(FORMS) * len(KERNELS):
        pytest.skip("the table is of a whole run of this file")
    head, mark, _ = TABLE.read_text().partition("<!-- made by the tests -->\n")
    notes = "".join(
        f"- {name}: {family.differs}.\n"
        for name, family in families.FAMILIES.items()
        if family.differs
    )
    page = f"{head}{mark}\n{chr(10).join(rows_of(table))}\n\n{NOTES}\n\n{notes}"
    if request.config.getoption("--write-tables"):
        TABLE.write_text(page)
    assert TABLE.read_text() == page, "run this file with --write-tables, and commit the page"

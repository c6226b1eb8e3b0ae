"""A package that adds a family, a policy and a reader; and packages that are not what they say."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import door
import mlx.core as mx
import mlx_lm
import pytest
import tiny
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, load_tokenizer
from test_exactness import decode

import mlx_flash
from mlx_flash import architectures, plugins
from mlx_flash.errors import PluginError
from mlx_flash.kernels import native

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "your_architecture"
CONFIG = {
    "model_type": "pocket_moe",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
    "vocab_size": tiny.VOCAB,
}
THEIRS = ("--policy", "fifo", "--reader", "plain", "--slots", 6, "--ram", "4GB")
PROMPT = "Where is it?"


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """Where pip has put the example, away from the environment."""
    root = tmp_path_factory.mktemp("outside")
    shutil.copytree(EXAMPLE, root / "source")  # setuptools builds in place
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    pip += ["--no-build-isolation", "--target", root / "target", root / "source"]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stderr}\npip install -e '.[dev]' brings what it needs"
    return root / "target"


@pytest.fixture
def installed(target, monkeypatch):
    """The example can be imported here, as in an environment that it is installed in."""
    monkeypatch.syspath_prepend(str(target))
    yield
    for name in [n for n in sys.modules if n.startswith("your_architecture")]:
        del sys.modules[name]


@pytest.fixture
def pocket(installed, tmp_path):
    """A tiny checkpoint in the layout that the family is published in."""
    classes = architectures.lookup("pocket_moe").classes
    weights = {}
    for name, array in tree_flatten(tiny.build(CONFIG, classes=classes).parameters()):
        block, _, part = name.replace("layers.", "blocks.").partition(".experts.switch_mlp.")
        if not part:
            weights[block] = array
        for e in range(CONFIG["num_experts"] if part else 0):
            expert = f"{block}.expert.{e}"
            if part == "down_proj.weight":
                weights[f"{expert}.w_out"] = array[e]
            elif part == "gate_proj.weight":
                weights[f"{expert}.w_in"] = array[e]
            else:
                weights[f"{expert}.w_in"] = mx.concatenate([weights[f"{expert}.w_in"], array[e]])
    folder = tmp_path / "pocket"
    folder.mkdir()
    weights = {name: mx.contiguous(array) for name, array in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tiny.write_tokenizer(folder)
    return folder


def stock(folder):
    """The same class in mlx-lm's hands, every expert in RAM."""
    return load_model(folder, get_model_classes=architectures.lookup("pocket_moe").classes)[0]


@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_a_package_of_its_own_runs_by_the_command(pocket, target, kernels):
    expected = mlx_lm.generate(
        stock(pocket), load_tokenizer(pocket), PROMPT, max_tokens=40, verbose=False
    )
    command = [sys.executable, "-m", "mlx_flash", "generate", "--model", pocket, *THEIRS]
    command += ["--kernels", kernels, "-m", 40, "--ignore-chat-template", "--json", PROMPT]
    path = os.pathsep.join([str(target), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [str(word) for word in command],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["text"] == expected
    assert len(set(expected)) > 8, "a model that says one thing would hide a broken store"
    assert said["evictions"] > 0
    assert said["bytes_read"] > said["slot_bytes"]


@pytest.mark.parametrize("given", [{"policy": "fifo"}, {"reader": "plain"}, {}], ids=str)
def test_they_say_what_stock_says(pocket, given):
    tokens, logprobs = decode(stock(pocket), range(40, 100), 40, prefill_step_size=24)
    knobs = {"ram": "4GB", "slots": 6, "context": 256, **given}
    model, _ = mlx_flash.load(pocket, kernels="reference", **knobs)
    streamed_tokens, streamed = decode(model, range(40, 100), 40, prefill_step_size=24)
    assert streamed_tokens == tokens
    assert mx.array_equal(streamed, logprobs)
    assert model.stats().evictions > 0
    assert (type(model.reader) is plugins.OutsideReader) == ("reader" in given)
    if native() is not None:
        model, _ = mlx_flash.load(pocket, **knobs)
        streamed_tokens, streamed = decode(model, range(40, 100), 40, prefill_step_size=24)
        assert streamed_tokens == tokens
        assert mx.max(mx.abs(streamed - logprobs)).item() < 1e-3


@pytest.mark.parametrize("given", [{"policy": "fifo"}, {"reader": "plain"}], ids=str)
@pytest.mark.parametrize("form", ["qwen3_5_moe-4bit", "nemotron_h-mxfp4"])
def test_families_of_ours_take_them_too(installed, checkpoints, form, given):
    knobs = {"ram": "4GB", "slots": 6, "context": 256}
    for kernels in ("reference", "auto"):
        usual, _ = mlx_flash.load(checkpoints(form), kernels=kernels, **knobs)
        tokens, logprobs = decode(usual, range(40, 100), 40, prefill_step_size=24)
        model, _ = mlx_flash.load(checkpoints(form), kernels=kernels, **knobs, **given)
        their_tokens, theirs = decode(model, range(40, 100), 40, prefill_step_size=24)
        assert their_tokens == tokens
        assert model.stats().evictions > 0
        if kernels == "reference" or native() is None:
            assert mx.array_equal(theirs, logprobs)
        else:  # Python fetches, so blocks are not fused and add up in another order
            assert mx.max(mx.abs(theirs - logprobs)).item() < 1e-3


# One of the many random layouts: a read per piece is slow, and that is no fault.
SOME = "fifo or (plain and not any_layout) or plain-7"


def test_they_are_held_to_the_contracts_of_ours(target):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        SOME,
    ]
    path = os.pathsep.join([str(target), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, "tests/test_eviction.py", "tests/test_reader.py"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed) >= 28, done.stdout


def test_without_the_package_its_names_are_not_known(checkpoints):
    for option in ("--policy", "--reader"):
        said = door.run(
            "generate", "--model", checkpoints("qwen3_5_moe-4bit"), option, "fifo", "hi"
        )
        assert said.code == 2
        assert "no " in said.err and "'fifo'" in said.err


def test_errors_and_help_list_what_is_installed(installed, checkpoints, target):
    for option, there in (("--policy", "s3fifo, fifo"), ("--reader", "direct, plain")):
        said = door.run("generate", "--model", checkpoints("qwen3_5_moe-4bit"), option, "no", "hi")
        assert (said.code, there in said.err) == (2, True), said.err
    for command in ("generate", "bench"):
        path = os.pathsep.join([str(target), os.environ.get("PYTHONPATH", "")])
        said = door.finish(door.start(command, "--help", env={"PYTHONPATH": path}))
        assert "s3fifo, fifo" in said.out
        assert "plain" in said.out


# Packages that are not what they say

SOUND = """
class Policy:
    def __init__(self): self.order = []
    def touch(self, expert): pass
    def insert(self, expert): self.order.append(expert)
    def evict(self, pinned):
        victim = next(e for e in self.order if e not in pinned)
        self.order.remove(victim)
        return victim

class Reader:
    bytes_read, read_s = 0, 0.0
    def __init__(self, paths, threads): pass
    def read_into(self, jobs):
        for span, buffer in jobs:
            with open(span.path, "rb") as file:
                file.seek(span.offset)
                buffer[:] = file.read(span.nbytes)
    def close(self): pass
"""
KINDS = {"Policy": plugins.POLICIES, "Reader": plugins.READERS}


@pytest.fixture
def offers(tmp_path, monkeypatch):
    """Install a package of one module that offers ``broken``."""

    def install(kind, source, package="somebody"):
        root = tmp_path / package
        info = root / f"{package}-1.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[{KINDS[kind]}]\nbroken = {package}:{kind}\n")
        (root / f"{package}.py").write_text(source)
        monkeypatch.syspath_prepend(str(root))
        monkeypatch.delitem(sys.modules, package, raising=False)
        return f"--{kind.lower()}"

    return install


def changed(old, new):
    assert old in SOUND
    return SOUND.replace(old, new)


NEXT = "next(e for e in self.order if e not in pinned)"
EVICT = "self.order.remove(victim)\n        return victim"
READ = "file.read(span.nbytes)"
BROKEN = {
    "does not import": ("Policy", "import nothing_of_that_name", ["does not import", "nothing_of"]),
    "is not there": ("Policy", "", ["does not import", "Policy"]),
    "is no callable": ("Policy", "Policy = 3", ["is a int", "called"]),
    "wants arguments": ("Policy", changed("def __init__(self):", "def __init__(self, size):"),
                        ["failed", "TypeError", "size"]),
    "has no evict": ("Policy", changed("def evict", "def expel"), ["Policy", "lacks evict()"]),
    "evicts who is pinned": ("Policy", changed(NEXT, "max(self.order, key=lambda e: e in pinned)"),
                             ["gives up expert", "this call needs"]),
    "evicts who is not there": ("Policy", changed(EVICT, "return victim + 100"),
                                ["gives up expert 1", "is not in RAM"]),
    "evicts one twice": ("Policy", changed(EVICT, "return victim"), ["is not in RAM"]),
    "evicts nobody": ("Policy", changed(EVICT, "pass"), ["'broken' failed", "TypeError"]),
    "forgets who there is": ("Policy", changed("self.order.append(expert)", "pass"),
                             ["'broken' failed", "StopIteration"]),
    "fails to touch": ("Policy", changed("touch(self, expert): pass", "touch(self): pass"),
                       ["'broken' failed", "TypeError"]),
    "fails to insert": ("Policy", changed("self.order.append(expert)", "self.order[expert]"),
                        ["'broken' failed", "IndexError"]),
    "a reader that is a module": ("Reader", "import os as Reader", ["is a module", "called"]),
    "opens nothing": ("Reader", changed("paths, threads", "paths"), ["failed", "TypeError"]),
    "has no close": ("Reader", changed("def close", "def shut"), ["Reader", "lacks close()"]),
    "counts nothing": ("Reader", changed("bytes_read, read_s", "a, b"),
                       ["lacks bytes_read and read_s"]),
    "reads too little": ("Reader", changed(READ, "file.read(span.nbytes - 1)"),
                         ["'broken' failed", "ValueError"]),
    "finds no file": ("Reader", changed("open(span.path", "open('/nowhere'"),
                      ["'broken' failed", "FileNotFoundError"]),
    "says what is wrong itself": (
        "Reader",
        "from mlx_flash.errors import ReadError\n"
        + changed("for span, buffer in jobs:", "raise ReadError(5, 'the disk is asleep', 'a')")
        .replace("            with", "        if 0:\n            with"),
        ["error: a: the disk is asleep."],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_package_is_one_line(checkpoints, offers, name):
    kind, source, named = BROKEN[name]
    option = offers(kind, source)
    args = ("--model", checkpoints("qwen3_5_moe-4bit"), "--slots", 5, "--ram", "4GB", "-m", 40)
    said = door.run("generate", *args, option, "broken", PROMPT)
    assert said.code == 2, said
    assert said.err.startswith("mlx-flash: error: ")
    assert said.err.count("\n") == 1, said.err
    assert said.err.rstrip().endswith(".")
    for words in named:
        assert words in said.err


@pytest.mark.parametrize("kind", KINDS)
def test_the_package_was_sound_before_it_was_broken(checkpoints, offers, kind):
    option = offers(kind, SOUND)
    args = ("--model", checkpoints("qwen3_5_moe-4bit"), "--slots", 5, "--ram", "4GB", "-m", 40)
    usual = door.run("generate", *args, "--kernels", "reference", PROMPT)
    said = door.run("generate", *args, "--kernels", "reference", option, "broken", PROMPT)
    assert (said.code, said.out) == (0, usual.out), said.err


@pytest.mark.parametrize("kind", KINDS)
def test_two_packages_that_offer_the_same(offers, kind):
    offers(kind, SOUND, "somebody")
    offers(kind, SOUND, "another")
    knob = {kind.lower(): "broken"}
    with pytest.raises(
        PluginError, match=r"twice, by .*another.* and .*somebody|somebody.*another"
    ):
        mlx_flash.load(mlx_flash.demo.FOLDER, slots=12, context=64, **knob)


def test_a_name_of_ours_stays_ours(checkpoints, offers, tmp_path):
    offers("Policy", "raise ImportError('must not be imported')")
    points = tmp_path / "somebody" / "somebody-1.dist-info" / "entry_points.txt"
    points.write_text(points.read_text().replace("broken", "lru"))
    assert plugins.names(plugins.POLICIES) == ["lru"]
    model, _ = mlx_flash.load(checkpoints("qwen3_5_moe-4bit"), ram="4GB", slots=5, context=64)
    assert model.stores


@pytest.mark.parametrize("kind", KINDS)
def test_what_only_python_can_run_is_not_for_the_graph(offers, kind):
    option = offers(kind, SOUND)
    said = door.run("generate", option, "broken", "--kernels", "graph", "hi")
    assert said.code == 2
    assert said.err.count("\n") == 1
    assert "--kernels graph" in said.err and f"{option} broken" in said.err


def test_the_direct_reader_takes_no_policy_from_outside(offers):
    offers("Policy", SOUND)
    said = door.run("generate", "--policy", "broken", "--reader", "direct", "hi")
    assert said.code == 2
    assert "--reader direct" in said.err and "--policy broken" in said.err
    assert "--reader pread" in said.err

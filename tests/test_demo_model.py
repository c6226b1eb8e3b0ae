"""The embedded demo model: small, in mlx-lm's form, and worth watching.

Runs through plain mlx-lm: what is measured here is the checkpoint, not the streaming runtime.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from pathlib import Path

import pytest

import mlx_flash.demo

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "demo_model"
sys.path.insert(0, str(EXAMPLE))

import corpus  # noqa: E402
import evaluate  # noqa: E402
import routing  # noqa: E402
import stories  # noqa: E402
import tools  # noqa: E402
import world  # noqa: E402

DEMO = Path(mlx_flash.demo.__file__).parent
HELD_OUT = Path(__file__).parent / "data" / "heldout.jsonl"
SCHEMA_FLOOR = 0.95
SAMPLE = {"tool": 20, "question": 30, "story": 2}


@pytest.fixture(scope="module")
def demo():
    return evaluate.mlx_lm.load(str(DEMO))


def held_out_rows(kinds: set[str] | None = None) -> list[dict]:
    return [row for row in evaluate.load_rows(HELD_OUT) if kinds is None or row["kind"] in kinds]


def sample_rows() -> list[dict]:
    """The same few prompts of each kind in every run, spread over the file."""
    out = []
    for kind, count in SAMPLE.items():
        rows = held_out_rows({kind})
        out += random.Random(0).sample(rows, count)
    return out


def rate(result: dict[str, tuple[int, int]], column: str) -> float:
    passed, asked = result[column]
    return passed / asked


def test_fits_in_the_wheel():
    assert sum(path.stat().st_size for path in DEMO.iterdir() if path.is_file()) <= 20e6


def test_has_the_files_and_keys_mlx_lm_writes():
    names = {path.name for path in DEMO.iterdir()}
    assert names >= {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((DEMO / "config.json").read_text())
    text = config["text_config"]
    assert config["model_type"] == "qwen3_5_moe"
    assert config["architectures"] == ["Qwen3_5MoeForConditionalGeneration"]
    assert {key: config["quantization"][key] for key in ("bits", "group_size", "mode")} == {
        "bits": 4,
        "group_size": 64,
        "mode": "affine",
    }
    assert text["layer_types"] == (["linear_attention"] * 3 + ["full_attention"]) * 2
    assert (text["num_experts"], text["num_experts_per_tok"]) == (32, 4)
    assert text["shared_expert_intermediate_size"] > 0


def test_index_names_every_tensor():
    index = json.loads((DEMO / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == evaluate.mx.load(str(DEMO / "model.safetensors")).keys()


def test_template_renders_tools_thinking_and_results(demo):
    _, tokenizer = demo
    row = held_out_rows({"result"})[0]
    text = tokenizer.apply_chat_template(
        row["messages"], tools=row["tools"], add_generation_prompt=True, tokenize=False
    )
    assert json.dumps(row["tools"][0]) in text
    assert "<tool_response>" in text
    assert text.endswith("<|im_start|>assistant\n<think>\n")
    silent = tokenizer.apply_chat_template(
        row["messages"], add_generation_prompt=True, tokenize=False, enable_thinking=False
    )
    assert silent.endswith("<think>\n\n</think>\n\n")
    assert tokenizer.has_tool_calling and tokenizer.has_thinking


def test_held_out_prompts_are_the_generators(tmp_path):
    """The fixed file is what corpus.py writes: world and split have not drifted apart."""
    import held_out

    held_out.write(tmp_path / "heldout.jsonl")
    assert (tmp_path / "heldout.jsonl").read_text() == HELD_OUT.read_text()


def test_held_out_prompts_are_not_in_the_corpus():
    held = {
        row["messages"][0]["content"] for row in held_out_rows({"tool", "question", "sum", "story"})
    }
    trained = Counter()
    for index in range(5_000):
        doc = corpus.document(random.Random(f"0:{index}"))
        trained.update(message["content"] for message in doc.messages if message["role"] == "user")
    assert not held & trained.keys()


def test_held_out_keys_cannot_be_drawn():
    rng = random.Random(1)
    for _ in range(300):
        assert not world.held_out(*stories.story_key(*stories.pair(rng)))
        item = tools.training_instance(rng, rng.choice(list(tools.TOOLS)))
        assert not world.held_out(*tools.call_key(item))
    held = {
        world.ask(fact, template)
        for fact in world.FACTS
        for template in range(len(world.QUESTIONS[fact.relation]))
        if world.held_out(*world.question_key(fact, template))
    }
    assert not held & {corpus.world_turn(rng)[0] for _ in range(3_000)}


def test_answers_a_sample_of_the_held_out_prompts(demo):
    model, tokenizer = demo
    result = evaluate.measure(model, tokenizer, sample_rows())
    assert rate(result, "tool parses") >= 0.95
    assert rate(result, "schema holds") >= 0.95
    assert rate(result, "question") >= 0.9
    assert rate(result, "story ends") == 1
    assert rate(result, "story loops") == 0


def test_a_story_at_temperature_ends_without_looping(demo):
    model, tokenizer = demo
    result = evaluate.measure(model, tokenizer, held_out_rows({"story"})[:1], temperature=0.7)
    assert result == {"story ends": (1, 1), "story loops": (0, 1)}


def test_no_dead_experts(demo):
    model, tokenizer = demo
    for ids in routing.record(model, tokenizer, 8):
        assert routing.usage(ids, 32).min() > 0


@pytest.mark.slow
def test_answers_every_held_out_prompt(demo):
    model, tokenizer = demo
    result = evaluate.measure(model, tokenizer, held_out_rows())
    assert rate(result, "tool parses") >= 0.95
    assert rate(result, "schema holds") >= SCHEMA_FLOOR
    assert rate(result, "question") >= 0.9
    assert rate(result, "story ends") == 1
    assert rate(result, "story loops") == 0


@pytest.mark.slow
def test_stories_at_temperature_end_without_looping(demo):
    model, tokenizer = demo
    result = evaluate.measure(model, tokenizer, held_out_rows({"story"}), temperature=0.7)
    assert rate(result, "story ends") == 1
    assert rate(result, "story loops") == 0

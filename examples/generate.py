"""Stream a model's experts in anyone's mlx-lm workflow: change one line, the load.

python examples/generate.py [MODEL]
"""

import sys

import mlx_lm

import mlx_flash
from mlx_flash import demo


def main(model_path: str) -> None:
    model, tokenizer = mlx_flash.load(model_path, slots=12)
    messages = [{"role": "user", "content": "Tell me a story about a lantern."}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    print(mlx_lm.generate(model, tokenizer, prompt, max_tokens=120))
    stats = model.stats()
    print(f"\n{stats.hits} expert hits, {stats.misses} misses, {stats.evictions} evictions")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(demo.FOLDER))

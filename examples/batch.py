"""Several conversations at once over one streamed model, through mlx-lm's batch generator.

python examples/batch.py [MODEL]
"""

import sys

from mlx_lm.generate import batch_generate

import mlx_flash
from mlx_flash import demo

QUESTIONS = ("Tell me a story.", "What is 12 plus 30?", "Hello, who are you?")


def main(model_path: str) -> None:
    model, tokenizer = mlx_flash.load(model_path, slots=12)
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True)
        for q in QUESTIONS
    ]
    answers = batch_generate(model, tokenizer, prompts, max_tokens=60)
    for question, text in zip(QUESTIONS, answers.texts, strict=True):
        print(f"> {question}\n{text.strip()}\n")
    print(f"{model.stats().evictions} evictions in one store for all")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(demo.FOLDER))

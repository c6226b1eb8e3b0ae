#!/usr/bin/env bash
# Redo the embedded demo model from nothing: tokenizer, training, conversion, held-out prompts, measurements.
# usage: make_demo.sh [RUN_FOLDER] [TOKENS]      Interrupted, the same command goes on from the last checkpoint.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
run=${1:-demo_run}
tokens=${2:-30e6}
python=${PYTHON:-python}

if [ ! -f "$run/final.pt" ]; then
    "$python" "$here/train.py" "$run" --tokens "$tokens"
fi
"$python" "$here/corpus.py" --held-out "$root/tests/data/heldout.jsonl"
"$python" "$here/convert.py" "$run" "$root/mlx_flash/demo"
"$python" "$here/evaluate.py"
"$python" "$here/evaluate.py" --float "$run/hf" --bits 4 3 2 --top-k 4 3 2 1 --limit 12
"$python" "$here/routing.py"

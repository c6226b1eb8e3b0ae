"""Every example runs as its own docstring says, on the embedded model."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("generate.py", r"\w+ .*\n+\d+ expert hits, [1-9]\d* misses, [1-9]\d* evictions"),
        ("perplexity.py", r"perplexity \d+\.\d+ \+- \d+\.\d+, experts 25% in RAM"),
        ("batch.py", r"> What is 12 plus 30\?\n.*42[\s\S]*[1-9]\d* evictions"),
    ],
)
def test_example(script, expected):
    result = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", EXAMPLES / script],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert re.search(expected, result.stdout), result.stdout


def test_every_example_is_tested():
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    assert scripts == {"generate.py", "perplexity.py", "batch.py"}

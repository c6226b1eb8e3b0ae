"""GPT-OSS: mxfp4 experts with biases, gate and up rows interleaved, sinks, sliding windows."""

from . import Architecture

architecture = Architecture()

"""DeepSeek-V3.2: DeepSeek-V3 with attention to the keys that an indexer chooses."""

from . import Architecture

architecture = Architecture()

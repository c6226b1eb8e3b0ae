"""What mlx-flash must know of the family: where its classes are. The rest it reads off them."""

from typing import Any

import mlx.nn as nn

from mlx_flash.architectures import Architecture

from .model import Model, ModelArgs


class PocketMoe(Architecture):
    """Of a model that mlx-lm has, not even this: its classes are found by ``model_type``."""

    def classes(self, config: dict[str, Any]) -> tuple[type[nn.Module], type]:
        return Model, ModelArgs


architecture = PocketMoe()

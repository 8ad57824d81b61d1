"""EncoderDecoder: a backbone and a decode head, which the YAML composes."""

from collections.abc import Callable
from typing import Any

import jittor as jt
import numpy as np
from jaxtyping import Float, Int, Shaped

from segmill.checkpoint.keys import Rule
from segmill.jittor import load


class EncoderDecoder(jt.Module):
    """Logits of the decode head, which is called with `in_channels` to build it."""

    def __init__(self, *, backbone: jt.Module, decode_head: Callable[..., Any]) -> None:
        self.backbone = backbone
        self.decode_head = decode_head(in_channels=backbone.channels)

    def execute(self, image: Float[jt.Var, "B C H W"]) -> Float[jt.Var, "B K _h _w"]:
        return self.decode_head(self.backbone(image))

    def losses(
        self, image: Float[jt.Var, "B C H W"], label: Int[jt.Var, "B H W"]
    ) -> dict[str, Float[jt.Var, "1"]]:
        """`decode.*`: MMSegmentation's names."""
        terms = self.decode_head.losses(self.backbone(image), label)
        return {f"decode.{name}": term for name, term in terms.items()}

    def key_rules(self) -> dict[str, tuple[Rule, ...]]:
        """Origin -> the rules of the backbone; the head's weights load by name."""
        return self.backbone.key_rules()

    def named_arrays(self) -> dict[str, Shaped[np.ndarray, "..."]]:
        """What a file of this network holds, copied."""
        return load.named_arrays(self)

    def trainable(self) -> dict[str, jt.Var]:
        """What an optimizer may update."""
        return load.trainable(self)

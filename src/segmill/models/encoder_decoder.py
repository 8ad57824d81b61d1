"""EncoderDecoder: a backbone, perhaps a neck, a decode head, perhaps auxiliary heads.

Most families are one head, and every head goes with every backbone: the YAML composes them. Heads
and necks arrive as `_partial_`, because the sizes of their input follow from what comes before.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Integer
from torch import Tensor, nn

from segmill.checkpoint.choose import HasKeyRules
from segmill.checkpoint.keys import Rule
from segmill.errors import SegmillError
from segmill.models.layers import Backbone, HasLosses, Neck, Part, head_losses


@runtime_checkable
class FullSizeHead(Protocol):
    """A head whose logits are made at the image's size: mask classification upsamples masks."""

    def logits_at(
        self, features: Sequence[Float[Tensor, "B _D _h _w"]], size: Sequence[int]
    ) -> Float[Tensor, "B K H W"]: ...


class EncoderDecoder(nn.Module):
    """Logits of the decode head; auxiliary heads only take part in the losses.

    Parts have MMSegmentation's names: `backbone`, `neck`, `decode_head`, `auxiliary_head`, the last
    one numbered where a list is given. `class_weight` has one factor for each class.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        decode_head: Part,
        neck: Part | None = None,
        auxiliary_head: Part | Sequence[Part] | None = None,
        auxiliary_weight: float | None = None,
        class_weight: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if (auxiliary_head is None) != (auxiliary_weight is None):
            raise SegmillError(
                "model.network needs auxiliary_head and auxiliary_weight together, or neither."
            )
        self.backbone = backbone
        self.neck: Neck | None = None if neck is None else neck(in_channels=backbone.channels)
        channels = backbone.channels if self.neck is None else self.neck.channels
        self.decode_head: nn.Module = decode_head(in_channels=channels)
        self.auxiliary_head: nn.Module | None = None
        if isinstance(auxiliary_head, Sequence):
            heads = (head(in_channels=channels) for head in auxiliary_head)
            self.auxiliary_head = nn.ModuleList(heads)
        elif auxiliary_head is not None:
            self.auxiliary_head = auxiliary_head(in_channels=channels)
        self.auxiliary_weight = 0.0 if auxiliary_weight is None else auxiliary_weight
        self.class_weight = class_weight
        if class_weight is not None and isinstance(self.decode_head, HasLosses):
            raise SegmillError(
                f"{type(self.decode_head).__name__} has losses of its own, so that "
                "model.network.class_weight would have no effect. Set it to null."
            )

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K _h _w"]:
        features = self.features(image)
        if isinstance(self.decode_head, FullSizeHead):
            return self.decode_head.logits_at(features, image.shape[-2:])
        return self.decode_head(features)

    def features(self, image: Float[Tensor, "B C H W"]) -> Sequence[Float[Tensor, "B _D _h _w"]]:
        """What the heads see: the maps of the neck if there is one, else of the backbone."""
        features = self.backbone(image)
        return features if self.neck is None else self.neck(features)

    def losses(
        self, image: Float[Tensor, "B C H W"], label: Integer[Tensor, "B H W"]
    ) -> dict[str, Float[Tensor, ""]]:
        """`decode.*` and `aux.*` (`aux_0.*`, ...): MMSegmentation's names."""
        features = self.features(image)
        terms = _prefixed(
            "decode", head_losses(self.decode_head, features, label, self.class_weight)
        )
        for name, head in self._auxiliary_heads():
            own = head_losses(head, features, label, self.class_weight)
            weighted = {key: self.auxiliary_weight * term for key, term in own.items()}
            terms |= _prefixed(name, weighted)
        return terms

    def key_rules(self) -> dict[str, tuple[Rule, ...]]:
        """Origin -> the rules of all parts; a part without some has its weights by name."""
        parts = (self.decode_head, self.auxiliary_head, self.neck, self.backbone)
        rules: dict[str, tuple[Rule, ...]] = {"mmseg": ()}
        for part in parts:
            if isinstance(part, HasKeyRules):
                for origin, own in part.key_rules().items():
                    rules[origin] = (*rules.get(origin, ()), *own)
        return rules

    def _auxiliary_heads(self) -> list[tuple[str, nn.Module]]:
        if self.auxiliary_head is None:
            return []
        if not isinstance(self.auxiliary_head, nn.ModuleList):
            return [("aux", self.auxiliary_head)]
        return [(f"aux_{index}", head) for index, head in enumerate(self.auxiliary_head)]


def _prefixed(name: str, terms: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}.{key}": term for key, term in terms.items()}

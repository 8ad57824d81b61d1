"""Any timm model as a backbone: feature maps, their channels and strides, and key rules.

Follows: MMSegmentation 1.2.2 `ResNetV1c` equals timm's ResNet with the deep stem of widths 32, 32,
         64 (`resnet50c`), dilated by `output_stride`; only the names in the stem differ.
Weights: MMSegmentation's `backbone.*` of ResNet and ResNetV1c; timm's own.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import timm
from jaxtyping import Float
from timm.layers.format import Format
from torch import Tensor, nn

from segmill.checkpoint.keys import Rename, Rule
from segmill.errors import SegmillError

KEYS_FROM_MMSEG: tuple[Rule, ...] = (
    # ResNetV1c's stem is one list; timm keeps its last norm outside of it.
    Rename(r"backbone\.stem\.7\.(.+)", r"backbone.trunk.bn1.\1"),
    Rename(r"backbone\.stem\.(\d)\.(.+)", r"backbone.trunk.conv1.\1.\2"),
    Rename(r"backbone\.((?:conv1|bn1|layer\d)\..+)", r"backbone.trunk.\1"),
)


class TimmBackbone(nn.Module):
    """A timm model that returns feature maps (B, D, h, w), the finest first.

    `out_indices` counts timm's levels (a ResNet's level 0 is its stem). `options` go to the model's
    constructor. Weights are never downloaded here. Parameters whose whole name matches a pattern of
    `frozen` are not trained. With `norm_eval` BatchNorms keep their statistics while training.
    """

    def __init__(
        self,
        *,
        name: str,
        in_channels: int,
        out_indices: Sequence[int],
        output_stride: int,
        options: Mapping[str, Any],
        frozen: Sequence[str] = (),
        norm_eval: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.in_channels = name, in_channels
        if not timm.is_model(name):
            close = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=3))
            raise SegmillError(
                f"timm {timm.__version__} has no model {name!r}. Close names: {close or 'none'}. "
                f"timm.list_models() prints all of them."
            )
        # Most transformers know no `output_stride`; 32 is every model's natural one.
        dilation = {} if output_stride == 32 else {"output_stride": output_stride}
        trunk: Any = timm.create_model(
            name,
            pretrained=False,
            features_only=True,
            in_chans=in_channels,
            out_indices=tuple(out_indices),
            **dilation,
            **options,
        )
        self.trunk = trunk
        self.norm_eval = norm_eval
        freeze(trunk, frozen)
        self.channels: tuple[int, ...] = tuple(trunk.feature_info.channels())
        self.strides: tuple[int, ...] = tuple(trunk.feature_info.reduction())
        # timm's own wrapper of EfficientNets has no `output_fmt`: it is always channels first.
        self.channels_last = getattr(trunk, "output_fmt", None) == Format.NHWC

    def forward(self, image: Float[Tensor, "B C H W"]) -> list[Float[Tensor, "B _D _h _w"]]:
        features = self.trunk(image)
        if self.channels_last:
            return [feature.permute(0, 3, 1, 2).contiguous() for feature in features]
        return list(features)

    def train(self, mode: bool = True) -> "TimmBackbone":
        """As every module's; with `norm_eval` BatchNorms stay in evaluation mode."""
        super().train(mode)
        for module in self.trunk.modules():
            if self.norm_eval and isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def key_rules(self) -> dict[str, tuple[Rule, ...]]:
        """Rules to `backbone.*` from MMSegmentation's files and from timm's own."""
        return {"mmseg": KEYS_FROM_MMSEG, "timm": self._keys_from_timm()}

    def _keys_from_timm(self) -> tuple[Rule, ...]:
        """For features, timm wraps some models as `model.` and flattens others: `stages_0`.

        What the feature maps do not need, the classifier for one, keeps its name: it is left over.
        """
        children = [name for name, _ in self.trunk.named_children()]
        wrapped = children == ["model"]
        inside = "model." if wrapped else ""
        first = {key.removeprefix(inside).split(".")[0] for key in self.trunk.state_dict()}
        flattened = (re.fullmatch(r"(.+)_(\d+)", name) for name in children)
        return (
            *(
                Rename(rf"{part[1]}\.{part[2]}\.(.+)", rf"backbone.trunk.{part[0]}.\1")
                for part in flattened
                if part
            ),
            Rename(rf"((?:{'|'.join(sorted(first))})(?:\..+)?)", rf"backbone.trunk.{inside}\1"),
        )


def freeze(network: nn.Module, patterns: Sequence[str]) -> None:
    """Take the gradient from every parameter whose whole name matches one of the patterns."""
    for pattern in patterns:
        matching = [p for name, p in network.named_parameters() if re.fullmatch(pattern, name)]
        if not matching:
            examples = ", ".join([name for name, _ in network.named_parameters()][:3])
            raise SegmillError(
                f"The pattern {pattern!r} of backbone.frozen matches no parameter's whole name. "
                f"Names are such as {examples}."
            )
        for parameter in matching:
            parameter.requires_grad_(False)

"""ImageClassifier: any classifier of timm, as a network whose map of logits is one pixel.

Weights: timm's own files load as they are, `weights=timm` fetches those of `model_name`, which
         names a tag (`convnext_large.fb_in1k`): without one timm takes its newest weights.
"""

import difflib
from collections.abc import Mapping
from typing import Any

import timm
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from segmill.data.labelled_image import NO_LABEL
from segmill.errors import SegmillError

Image = Float[Tensor, "B 3 H W"]


class ImageClassifier(nn.Module):
    """Images (B, 3, H, W) become logits (B, K, 1, 1); labels are (B, 1, 1), -1 does not count.

    `options` go to timm's constructor. Weights are never downloaded here.
    """

    in_channels = 3

    def __init__(self, *, model_name: str, num_classes: int, options: Mapping[str, Any]) -> None:
        super().__init__()
        if not timm.is_model(model_name):
            close = ", ".join(difflib.get_close_matches(model_name, timm.list_models(), n=3))
            raise SegmillError(
                f"timm {timm.__version__} has no model {model_name!r} (network.model_name). Close "
                f"names: {close or 'none'}. timm.list_models() prints all of them."
            )
        published(model_name)  # refuses an unknown tag
        self.name, self.num_classes = model_name, num_classes
        try:
            self.backbone: Any = timm.create_model(
                model_name, pretrained=False, num_classes=num_classes, **options
            )
        except TypeError as error:
            raise SegmillError(
                f"timm's {model_name} does not take network.options={dict(options)} ({error}). "
                "They are keywords of timm's constructor of this model."
            ) from error

    def forward(self, image: Image) -> Float[Tensor, "B K 1 1"]:
        # A copy: of a view, sharding (FSDP2) cannot see changes in place, and says so every time.
        return self.backbone(image)[:, :, None, None].clone()

    def features(self, image: Image) -> Float[Tensor, "B D"]:
        """What the last layer classifies: pooled, and normalised where the model does so."""
        return self.backbone.forward_head(self.backbone.forward_features(image), pre_logits=True)

    def losses(self, image: Image, label: Int[Tensor, "B 1 1"]) -> dict[str, Float[Tensor, ""]]:
        """Cross-entropy, mean over the images that have a label."""
        label = label.flatten()
        logits = self.backbone(image)
        total = F.cross_entropy(logits, label, ignore_index=NO_LABEL, reduction="sum")
        return {"classifier.loss_ce": total / (label != NO_LABEL).sum().clamp(min=1)}


def published(model_name: str) -> Any:
    """timm's data config of a model's weights, None if it has none; an unknown tag is refused."""
    architecture, _, tag = model_name.partition(".")
    tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]
    if tag and timm.is_model(architecture) and tag not in tags:
        raise SegmillError(
            f"timm {timm.__version__} has no {architecture} with the tag {tag!r} "
            f"(network.model_name={model_name}). Its tags: {', '.join(tags) or 'none'}."
        )
    return timm.get_pretrained_cfg(model_name)

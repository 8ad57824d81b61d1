"""JointLoss: the loss that joins a discriminative model and a guide, for tensors of any origin.

The score of an image is the mean of its class-conditional scores under p(class | image); so are
the predictions of a guide, which are affine in the score. With the discriminative model's
probabilities in the place of p this is a loss for both models (DUSA, NeurIPS 2024):

    mean over latent pixels of || target - sum_k p_k(image) * prediction(noisy latent, t, k) ||^2
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from segmill.errors import SegmillError
from segmill.models.class_sets import ClassSets, class_sets
from segmill.models.class_split import ClassSplit


@dataclass(frozen=True, kw_only=True)
class JointLoss:
    """Settings of the loss, and its parts as functions of tensors at latent resolution."""

    topk: int  # classes of each latent pixel that enter the window's class set
    classes_threshold: int  # largest class set of a window
    min_classes: int  # smaller sets are filled up by drawing
    temperature: float
    logits: Literal["normed", "raw"]  # normed: unit length over the classes
    mask_reduction: Literal["valid", "all"]  # what the mean over elements counts
    timestep_range: tuple[float, float]  # share of noise, drawn uniformly
    class_chunk: int | None  # classes a forward pass; null: all
    windows_at_once: int | Literal["processes"] | None  # windows a pass; null: all
    buckets: tuple[int, ...]  # class counts are rounded up to one of these

    def __post_init__(self) -> None:
        positive = [self.topk, self.classes_threshold, *self.buckets]
        positive += [
            each for each in (self.class_chunk, self.windows_at_once) if isinstance(each, int)
        ]
        if min(positive) < 1 or self.temperature <= 0:
            raise SegmillError(
                "model.loss: topk, classes_threshold, class_chunk, windows_at_once, buckets and "
                f"temperature are above 0; found {self}."
            )
        if not 0 <= self.min_classes <= self.classes_threshold:
            raise SegmillError(
                f"model.loss.min_classes={self.min_classes} is not between 0 and "
                f"model.loss.classes_threshold={self.classes_threshold}."
            )
        if len(self.timestep_range) != 2 or not (
            0 <= self.timestep_range[0] <= self.timestep_range[1] <= 1
        ):
            raise SegmillError(
                f"model.loss.timestep_range={list(self.timestep_range)}: give the smallest and "
                "the largest share of noise, between 0 (data) and 1 (noise); equal = fixed."
            )

    def scaled(self, logits: Float[Tensor, "B K h w"]) -> Float[Tensor, "B K h w"]:
        """The logits as they enter class sets and weights, at the network's own stride."""
        if self.logits == "raw":
            return logits.float()
        return F.normalize(logits.float(), dim=1)

    def class_sets(
        self,
        window_logits: Float[Tensor, "N K h w"],
        generator: torch.Generator,
        split: ClassSplit,
    ) -> ClassSets:
        """Classes of each window under these settings."""
        return class_sets(
            window_logits,
            topk=self.topk,
            max_classes=self.classes_threshold,
            min_classes=self.min_classes,
            buckets=self.buckets,
            generator=generator,
            split=split,
        )

    def weights(
        self, window_logits: Float[Tensor, "N K h w"], sets: ClassSets
    ) -> Float[Tensor, "N M h w"]:
        """Probabilities of a window's classes at every latent pixel; 0 for padding."""
        _, _, height, width = window_logits.shape
        classes = sets.classes[:, :, None, None].expand(-1, -1, height, width)
        chosen = window_logits.gather(1, classes).float() / self.temperature
        padding = ~sets.valid[:, :, None, None]
        return chosen.masked_fill(padding, -torch.inf).softmax(dim=1)

    def draw_t(self, count: int, generator: torch.Generator) -> Float[Tensor, " N"]:
        """Times, one for each window."""
        low, high = self.timestep_range
        return low + (high - low) * torch.rand(count, generator=generator, device=generator.device)

    def losses(
        self,
        predicted: Float[Tensor, "N C h w"],
        target: Float[Tensor, "N C h w"],
        mask: Bool[Tensor, "N h w"],
    ) -> Float[Tensor, " N"]:
        """Mean squared error of each window."""
        inside = mask[:, None].float()
        squared = ((predicted - target) * inside).square()
        if self.mask_reduction == "all":
            return squared.mean(dim=(1, 2, 3))
        return squared.sum(dim=(1, 2, 3)) / (inside.sum(dim=(1, 2, 3)) * target.shape[1])


def mean_prediction(
    weights: Float[Tensor, "N M h w"], predictions: Float[Tensor, "N M C h w"]
) -> Float[Tensor, "N C h w"]:
    """Sum over classes of weight times prediction, in float32 whatever autocast says."""
    return (weights[:, :, None] * predictions.float()).sum(dim=1)

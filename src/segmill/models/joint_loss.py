"""JointLoss: the loss that joins a discriminative model and a guide, for tensors of any origin.

The score of an image is the mean of its class-conditional scores under p(class | image); so are
the predictions of a guide, which are affine in the score. With the discriminative model's
probabilities in the place of p this is a loss for both models (DUSA, NeurIPS 2024):

    mean over latent pixels of || target - sum_k p_k(image) * prediction(noisy latent, t, k) ||^2

Beside this `mse` there are two terms of the same difference, for flows: `norm_l2`, each window's
error over its own root, held constant, so that no window outweighs the others, and `cosine`, one
minus the cosine between prediction and target. The loss is their weighted sum.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from segmill.draws import Generators, drawn
from segmill.errors import SegmillError
from segmill.models.class_sets import ClassSets, class_sets
from segmill.models.class_split import ClassSplit

ROOM = 1e-3  # added to an error under the root of norm_l2


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
    fill: Literal["uniform", "softmax"] = "uniform"  # which classes fill a small set up
    mse: float = 1.0
    norm_l2: float = 0.0
    cosine: float = 0.0

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
        terms = (self.mse, self.norm_l2, self.cosine)
        if min(terms) < 0 or max(terms) == 0:
            raise SegmillError(
                f"model.loss.mse={self.mse}, norm_l2={self.norm_l2} and cosine={self.cosine} are "
                "weights of a sum: 0 or more each, and one of them above 0."
            )
        if len(self.timestep_range) != 2 or not (
            0 <= self.timestep_range[0] <= self.timestep_range[1] <= 1
        ):
            raise SegmillError(
                f"model.loss.timestep_range={list(self.timestep_range)}: give the smallest and "
                "the largest share of noise, between 0 (data) and 1 (noise); equal = fixed."
            )

    @property
    def passes_vary(self) -> bool:
        """Whether the guide's passes in a step depend on how many windows and classes there are."""
        few = self.class_chunk is not None and self.min_classes < self.classes_threshold
        return few or self.windows_at_once is not None

    def scaled(self, logits: Float[Tensor, "B K h w"]) -> Float[Tensor, "B K h w"]:
        """The logits as they enter class sets and weights, at the network's own stride."""
        if self.logits == "raw":
            return logits.float()
        return F.normalize(logits.float(), dim=1)

    def class_sets(
        self,
        window_logits: Float[Tensor, "N K h w"],
        generator: Generators,
        split: ClassSplit,
        raw: Float[Tensor, "N K h w"] | None = None,
    ) -> ClassSets:
        """Classes of each window under these settings.

        `raw` are the logits of `window_logits` before `scaled`, and are needed by `fill: softmax`:
        a class is drawn by its mean probability over the window's pixels.
        """
        log_prob = None
        if self.fill == "softmax":
            assert raw is not None, "fill: softmax draws by the raw logits"
            log_prob = raw.detach().float().log_softmax(dim=1).flatten(2).logsumexp(dim=2)
        return class_sets(
            window_logits,
            topk=self.topk,
            max_classes=self.classes_threshold,
            min_classes=self.min_classes,
            buckets=self.buckets,
            generator=generator,
            split=split,
            log_prob=log_prob,
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

    def draw_t(self, count: int, generator: Generators) -> Float[Tensor, " N"]:
        """Times, one for each window."""
        low, high = self.timestep_range
        share = drawn(
            lambda rows, own: torch.rand(rows, generator=own, device=own.device), count, generator
        )
        return low + (high - low) * share

    def losses(
        self,
        predicted: Float[Tensor, "N C h w"],
        target: Float[Tensor, "N C h w"],
        mask: Bool[Tensor, "N h w"],
    ) -> Float[Tensor, " N"]:
        """The weighted sum of each window."""
        error = self._errors(predicted, target, mask)
        loss = self.mse * error
        if self.norm_l2:
            loss = loss + self.norm_l2 * error / (error.detach() + ROOM).sqrt()
        if self.cosine:
            inside = mask[:, None]
            ours, theirs = (predicted * inside).flatten(1), (target * inside).flatten(1)
            loss = loss + self.cosine * (1 - F.cosine_similarity(ours, theirs, dim=1))
        return loss

    def _errors(
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

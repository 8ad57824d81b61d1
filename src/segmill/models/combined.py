"""CombinedModel: a discriminative model, a generative guide, and the loss that joins them.

The score of an image is the mean of its class-conditional scores under p(class | image); so are
the predictions of a guide, which are affine in the score. With the discriminative model's
probabilities in the place of p this is a loss for both models (DUSA, NeurIPS 2024):

    mean over latent pixels of || target - sum_k p_k(image) * prediction(noisy latent, t, k) ||^2

One time, one noise. Nothing here calls backward; tta/ does.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn

from segmill.errors import SegmillError
from segmill.models.class_sets import ClassSets, class_sets
from segmill.models.class_split import ClassSplit
from segmill.models.discriminative import Discriminative
from segmill.models.generative.guide import Guide
from segmill.optim import NORMS

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Update:
    """Which weights adaptation may change."""

    discriminative: bool
    generative: bool
    update_norm_only: bool  # of both: only the parameters of normalisation layers

    def names(self, model: nn.Module) -> list[str]:
        """Names of the trainable parameters of a CombinedModel that are to be updated."""
        prefixes = [
            *(["discriminative."] if self.discriminative else []),
            *(["generative.network."] if self.generative else []),
        ]
        norms = {
            id(parameter)
            for layer in model.modules()
            if is_norm(layer)
            for parameter in layer.parameters(recurse=False)
        }
        return [
            name
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
            and name.startswith(tuple(prefixes))
            and (id(parameter) in norms or not self.update_norm_only)
        ]


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
    windows_at_once: int | None  # windows a forward and backward pass; null: all
    buckets: tuple[int, ...]  # class counts are rounded up to one of these

    def __post_init__(self) -> None:
        positive = [self.topk, self.classes_threshold, *self.buckets]
        positive += [each for each in (self.class_chunk, self.windows_at_once) if each is not None]
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


@dataclass(frozen=True)
class NoisyWindows:
    """What the guide is asked about, before any class is chosen. `size`: of the resized image."""

    noisy_latent: Float[Tensor, "N C h w"]
    target: Float[Tensor, "N C h w"]
    t: Float[Tensor, " N"]
    size: tuple[int, int]


@dataclass(frozen=True)
class Windows:
    """Windows with their classes and weights; `widths` are the class counts that each one needs."""

    noisy_latent: Float[Tensor, "N C h w"]
    target: Float[Tensor, "N C h w"]
    t: Float[Tensor, " N"]
    classes: Int64[Tensor, "N M"]
    weights: Float[Tensor, "N M h w"]
    mask: Bool[Tensor, "N h w"]
    widths: tuple[int, ...]

    def part(self, chosen: slice) -> Self:
        """Some of the windows, and no more classes than the widest of them needs."""
        widths = self.widths[chosen]
        return replace(
            self,
            noisy_latent=self.noisy_latent[chosen],
            target=self.target[chosen],
            t=self.t[chosen],
            classes=self.classes[chosen, : max(widths)],
            weights=self.weights[chosen, : max(widths)],
            mask=self.mask[chosen],
            widths=widths,
        )

    def parts(self, count: int | None) -> Iterator[Self]:
        """`count` windows at a time; null: all of them."""
        step = count or len(self.widths)
        for start in range(0, len(self.widths), step):
            yield self.part(slice(start, start + step))


class CombinedModel(nn.Module):
    """A model to adapt and, unless `generative` is null, the guide that helps.

    Weights that are trainable when this is built are those that `update` chooses from.
    """

    def __init__(
        self,
        *,
        discriminative: Discriminative,
        generative: Guide | None,
        update: Update,
        loss: JointLoss,
    ) -> None:
        super().__init__()
        self.discriminative, self.generative = discriminative, generative
        self.update, self.loss = update, loss
        self._updated = frozenset(update.names(self))
        self.updates_discriminative = self._updates("discriminative.")
        self.updates_generative = self._updates("generative.")
        if generative is None:
            return
        if update.generative and not self.updates_generative:
            log.warning(
                "model.update.generative=true has no effect: with update_norm_only=true there is "
                "nothing to update, as the guide's normalisation layers have no weights."
            )
        if loss.topk > generative.num_classes:
            raise SegmillError(
                f"model.loss.topk={loss.topk}, but the guide knows {generative.num_classes} "
                "classes. Choose a smaller one."
            )

    @property
    def guide(self) -> Guide:
        """The generative part, where a method cannot do without."""
        if self.generative is None:
            raise SegmillError(
                "This method needs a generative guide and model.generative is null. Choose one "
                "with model/generative=NAME."
            )
        return self.generative

    def forward(
        self, image: UInt8[Tensor, "B C H W"] | Float[Tensor, "B C H W"]
    ) -> Float[Tensor, "B K h w"]:
        """The discriminative model's logits."""
        return self.discriminative(image)

    def parameters_to_update(self) -> dict[str, nn.Parameter]:
        """What `update` chooses; empty where it says that nothing is updated."""
        guided = self.update.generative and self.generative is not None
        if (self.update.discriminative or guided) and not self._updated:
            raise SegmillError(
                f"Nothing to update: model.update.discriminative={self.update.discriminative}, "
                f"model.update.generative={self.update.generative}, model.update.update_norm_only="
                f"{self.update.update_norm_only}, and no normalisation layer there has weights. "
                "Set model.update.update_norm_only=false."
            )
        return {name: each for name, each in self.named_parameters() if name in self._updated}

    def noisy_windows(
        self,
        image: UInt8[Tensor, "1 3 H W"] | Float[Tensor, "1 3 H W"],
        generator: torch.Generator,
    ) -> NoisyWindows:
        """Windows of an RGB image as noisy latents; times are drawn first, then the noise."""
        guide = self.guide
        latent = guide.encode(guide.view.windows(image))
        t = self.loss.draw_t(len(latent), generator).to(latent.device)
        noise = torch.randn(latent.shape, generator=generator, device=generator.device)
        noisy_latent, target = guide.noisy(latent, noise.to(latent.device), t)
        size = guide.view.size(image.shape[2], image.shape[3])
        return NoisyWindows(noisy_latent, target, t, size)

    def weighted_windows(
        self,
        logits: Float[Tensor, "1 K a b"],
        noisy: NoisyWindows,
        generator: torch.Generator,
    ) -> Windows:
        """Classes and weights of every window; the gradient goes through the weights."""
        guide = self.guide
        if logits.shape[1] != guide.num_classes:
            raise SegmillError(
                f"model.discriminative has {logits.shape[1]} classes and model.generative "
                f"{guide.num_classes}. Both are for the classes of one data set."
            )
        window_logits = guide.view.sample(
            self.loss.scaled(logits), size=noisy.size, cell=guide.cell
        )
        sets = self.loss.class_sets(window_logits, generator, ClassSplit.of_processes())
        return Windows(
            noisy_latent=noisy.noisy_latent,
            target=noisy.target,
            t=noisy.t,
            classes=sets.classes,
            weights=self.loss.weights(window_logits, sets),
            mask=sets.mask,
            widths=sets.widths,
        )

    def class_chunks(self, windows: Windows) -> Sequence[Int64[Tensor, "N m"]]:
        """This process's classes of each window, as many at a time as `class_chunk` says."""
        own = ClassSplit.of_processes().share(windows.classes)
        return own.split(self.loss.class_chunk or own.shape[1], dim=1)

    def predictions(
        self, windows: Windows, classes: Int64[Tensor, "N m"]
    ) -> Float[Tensor, "N m C h w"]:
        """The guide's predictions under these classes."""
        return self.guide.predict(windows.noisy_latent, windows.t, classes).float()

    def losses(
        self, windows: Windows, predictions: Float[Tensor, "N m C h w"]
    ) -> Float[Tensor, " N"]:
        """Loss of each window, of this process's `predictions` and the other processes'.

        Its gradients are those of this process's classes; see `ClassSplit`.
        """
        split = ClassSplit.of_processes()
        own = mean_prediction(split.share(windows.weights), predictions)
        return self.loss.losses(split.total(own), windows.target, windows.mask)

    def _updates(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self._updated)


def is_norm(layer: nn.Module) -> bool:
    """Whether the layer normalises, by its type: adaptive layers' projections do not.

    diffusers and transformers have RMSNorm classes of their own.
    """
    return isinstance(layer, (*NORMS, nn.RMSNorm)) or type(layer).__name__ == "RMSNorm"

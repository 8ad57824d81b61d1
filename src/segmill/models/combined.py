"""CombinedModel: a discriminative model and the generative guide that helps to adapt it.

It answers what a step of adaptation asks (noisy windows, their classes and weights, predictions,
losses) and never calls backward; tta/ does.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn

from segmill.draws import Generators, drawn
from segmill.errors import SegmillError
from segmill.models.class_split import ClassSplit
from segmill.models.discriminative import Discriminative
from segmill.models.generative.guide import Guide
from segmill.models.joint_loss import JointLoss, mean_prediction
from segmill.optim import NORMS

log = logging.getLogger(__name__)

DISCRIMINATIVE, GENERATIVE = PARTS = ("discriminative.network.", "generative.network.")


@dataclass(frozen=True, kw_only=True)
class Update:
    """Which weights adaptation may change."""

    discriminative: bool
    generative: bool
    update_norm_only: bool  # of both: only the parameters of normalisation layers


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

    def part(self, chosen: slice) -> "Windows":
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

    def parts(self, count: int | None) -> Iterator["Windows"]:
        """`count` windows at a time; null: all of them."""
        step = count or len(self.widths)
        for start in range(0, len(self.widths), step):
            yield self.part(slice(start, start + step))


class CombinedModel(nn.Module):
    """A model to adapt and, unless `generative` is null, the guide that helps.

    `update` and `loss` may be exchanged between two runs. What `update` chooses from are the
    weights that are trainable when this is built. Several processes split the classes of an image
    (`ClassSplit`) while `shares_classes`; otherwise each has images of its own.
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
        self.shares_classes = True
        trainable = [name for name, each in self.named_parameters() if each.requires_grad]
        norms = norm_parameters(self)
        self._trainable = {
            part: (
                frozenset(name for name in trainable if name.startswith(part)),
                frozenset(name for name in trainable if name.startswith(part) and name in norms),
            )
            for part in PARTS
        }

    @property
    def guide(self) -> Guide:
        """The generative part, where a method cannot do without."""
        if self.generative is None:
            raise SegmillError(
                "This method needs a generative guide and model.generative is null. Choose one "
                "with model/generative=NAME."
            )
        return self.generative

    @property
    def split(self) -> ClassSplit:
        """This process's part of a window's classes."""
        return ClassSplit.of_processes() if self.shares_classes else ClassSplit(0, 1)

    def forward(
        self, image: UInt8[Tensor, "B C H W"] | Float[Tensor, "B C H W"]
    ) -> Float[Tensor, "B K h w"]:
        """The discriminative model's logits."""
        return self.discriminative(image)

    @property
    def updates_discriminative(self) -> bool:
        """Whether the discriminative model has weights to update."""
        return bool(self._chosen(DISCRIMINATIVE))

    @property
    def updates_generative(self) -> bool:
        """Whether the guide has weights to update."""
        return bool(self._chosen(GENERATIVE))

    def parameters_to_update(self) -> dict[str, nn.Parameter]:
        """What `update` chooses, by name; empty where it says that nothing is updated."""
        chosen = self._chosen(DISCRIMINATIVE) | self._chosen(GENERATIVE)
        guided = self.update.generative and self.generative is not None
        if not chosen and (self.update.discriminative or guided):
            raise SegmillError(
                f"Nothing to update: model.update.discriminative={self.update.discriminative}, "
                f"model.update.generative={self.update.generative}, model.update.update_norm_only="
                f"{self.update.update_norm_only}, and no normalisation layer there has weights. "
                "Set model.update.update_norm_only=false."
            )
        return {name: each for name, each in self.named_parameters() if name in chosen}

    def check_guided(self) -> None:
        """Refuse settings under which the joint loss cannot work, before anything starts."""
        if self.loss.topk > self.guide.num_classes:
            raise SegmillError(
                f"model.loss.topk={self.loss.topk}, but the guide knows {self.guide.num_classes} "
                "classes. Choose a smaller one."
            )
        if self.update.generative and not self.updates_generative:
            log.warning(
                "model.update.generative=true has no effect: with update_norm_only=true there is "
                "nothing to update, as the guide's normalisation layers have no weights."
            )

    def noisy_windows(
        self,
        image: UInt8[Tensor, "B 3 H W"] | Float[Tensor, "B 3 H W"],
        generator: Generators,
    ) -> NoisyWindows:
        """Windows of RGB images as noisy latents; times are drawn first, then the noise.

        An image's windows lie side by side. With a generator for each image its draws do not
        depend on the others.
        """
        guide = self.guide
        latent = guide.encode(guide.view.windows(image))
        t = self.loss.draw_t(len(latent), generator).to(latent.device)
        noise = drawn(
            lambda rows, own: torch.randn(
                rows, *latent.shape[1:], generator=own, device=own.device
            ),
            len(latent),
            generator,
        )
        noisy_latent, target = guide.noisy(latent, noise.to(latent.device), t)
        size = guide.view.size(image.shape[2], image.shape[3])
        return NoisyWindows(noisy_latent, target, t, size)

    def weighted_windows(
        self,
        logits: Float[Tensor, "B K a b"],
        noisy: NoisyWindows,
        generator: Generators,
    ) -> Windows:
        """Classes and weights of every window; the gradient goes through the weights."""
        guide = self.guide
        if logits.shape[1] != guide.num_classes:
            raise SegmillError(
                f"model.discriminative has {logits.shape[1]} classes and model.generative "
                f"{guide.num_classes}. Both are for the classes of one data set."
            )
        scaled = self.loss.scaled(logits)
        window_logits = guide.view.sample(scaled, size=noisy.size, cell=guide.cell)
        raw = None
        if self.loss.fill == "softmax":
            raw = guide.view.sample(logits.detach(), size=noisy.size, cell=guide.cell)
        sets = self.loss.class_sets(window_logits, generator, self.split, raw)
        # One pixel of a classifier holds for all cells.
        cells = noisy.noisy_latent.shape[2:]
        weights = self.loss.weights(window_logits, sets).expand(-1, -1, *cells)
        return Windows(
            noisy_latent=noisy.noisy_latent,
            target=noisy.target,
            t=noisy.t,
            classes=sets.classes,
            weights=weights,
            mask=sets.mask.expand(-1, *cells),
            widths=sets.widths,
        )

    def class_chunks(self, windows: Windows) -> Sequence[Int64[Tensor, "N m"]]:
        """This process's classes of each window, as many at a time as `class_chunk` says."""
        own = self.split.share(windows.classes)
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
        split = self.split
        own = mean_prediction(split.share(windows.weights), predictions)
        return self.loss.losses(split.total(own), windows.target, windows.mask)

    def _chosen(self, part: str) -> frozenset[str]:
        """Names of the weights of one part that `update` chooses."""
        every, norms = self._trainable[part]
        if not {DISCRIMINATIVE: self.update.discriminative, GENERATIVE: self.update.generative}[
            part
        ]:
            return frozenset()
        return norms if self.update.update_norm_only else every


def norm_parameters(module: nn.Module) -> set[str]:
    """Names of the parameters of normalisation layers, by type: no projection is one.

    diffusers, transformers and timm (RmsNorm, RmsNorm2d) have classes of their own for RMSNorm.
    """
    return {
        f"{prefix}.{name}"
        for prefix, layer in module.named_modules()
        if isinstance(layer, NORMS) or "rmsnorm" in type(layer).__name__.lower()
        for name, _ in layer.named_parameters(recurse=False)
    }

"""GuideClassifier: a guide as the network of `segmill train`, and as a classifier of its cells.

Training uses the loss of adaptation with the label in the place of the model's probabilities: at
every latent cell, the mean of the predictions under the label's classes should be the target. The
class whose prediction comes nearest to the target is then the guide's own answer, so the scores of
validation say how well it knows the classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, Integer
from torch import Tensor, nn

from segmill.data.labelled_image import NO_LABEL
from segmill.data.sample import IGNORE
from segmill.errors import SegmillError
from segmill.models.generative.guide import Guide

Image = Float[Tensor, "B 3 H W"]


@dataclass(frozen=True, kw_only=True)
class ReadOut:
    """How the guide is asked for classes: shares of noise, each with a noise drawn from `seed`."""

    times: Sequence[float]
    seed: int


class GuideClassifier(nn.Module):
    """Images in -1..1 (mean and std 0.5) become minus the squared errors under each class.

    `t_range` are the shares of noise that are trained, `classes_per_image` how many of an image's
    classes (null: all), and `unconditional` the share of images trained without a class. The loss
    alone lets a network that sees the class in the noisy image ignore the one it is told;
    `contrast` weighs a cross-entropy over the classes' errors, which does not (0: none). With the
    `answer` of an image, errors are those of all its cells together and the map is one pixel.
    """

    def __init__(
        self,
        *,
        guide: Guide,
        t_range: tuple[float, float],
        classes_per_image: int | None,
        unconditional: float,
        contrast: float,
        read_out: ReadOut,
        # Last and with a default, so that files of older runs still fit.
        answer: Literal["cell", "image"] = "cell",
    ) -> None:
        super().__init__()
        shares = (*t_range, *read_out.times)
        if not (read_out.times and min(shares) >= 0 and max(shares) <= 1):
            raise SegmillError(
                f"network.t_range={list(t_range)}, network.read_out.times={list(read_out.times)}: "
                "times are shares of noise between 0 and 1, and at least one is read out."
            )
        self.guide = guide
        self.t_range, self.unconditional = t_range, unconditional
        self.classes_per_image, self.read_out = classes_per_image, read_out
        self.contrast, self.answer = contrast, answer

    @property
    def backbone(self) -> nn.Module:
        """What training and prediction share, for trainer.compile."""
        return self.guide.network

    def forward(self, image: Image) -> Float[Tensor, "B K h w"]:
        """Minus the squared errors, mean over the times; images are resized to whole patches."""
        latent = self.guide.encode(self._whole_patches(image))
        generator = torch.Generator("cpu").manual_seed(self.read_out.seed)
        classes = torch.arange(self.guide.num_classes, device=latent.device)
        errors = [
            self._errors(latent, classes.expand(len(latent), -1), time, generator)
            for time in self.read_out.times
        ]
        logits = -torch.stack(errors).mean(dim=0)
        return logits.sum(dim=(2, 3), keepdim=True) if self.answer == "image" else logits

    def losses(
        self, image: Image, label: Integer[Tensor, "B _H _W"]
    ) -> dict[str, Float[Tensor, ""]]:
        """Squared error of the mean prediction under the label's classes, over labelled cells.

        A label of one pixel (B, 1, 1) is that of the whole image; there `NO_LABEL` is ignored.
        """
        multiple = self.guide.view.multiple
        height, width = image.shape[2:]
        if height % multiple or width % multiple:
            raise SegmillError(
                f"data.crop is {height} x {width}; this guide is trained on multiples of "
                f"{multiple} pixels (model.network.guide.view.multiple)."
            )
        whole = label.shape[1:] == (1, 1)
        if self.answer == "image" and not whole:
            raise SegmillError(
                "model.network.answer=image is for images with one class each, and this data set "
                "has a label for every pixel. Set model.network.answer=cell, or choose data with "
                "one label an image."
            )
        latent = self.guide.encode(_pixels(image))
        low, high = self.t_range
        t = low + (high - low) * torch.rand(len(latent), device=latent.device)
        noisy_latent, target = self.guide.noisy(latent, torch.randn_like(latent), t)
        shares = class_shares(
            label.expand(-1, height, width) if whole else label,
            self.guide.num_classes,
            self.guide.cell,
            ignore_index=NO_LABEL if whole else IGNORE,
        )
        classes, weights, mask = self._conditions(shares)
        predicted = self.guide.predict(noisy_latent, t, classes).float()
        error = (weights[:, :, None] * predicted).sum(dim=1) - target
        squared = error.square().mean(dim=1) * mask
        terms = {"guide.loss_mse": squared.sum() / mask.sum().clamp(min=1)}
        if self.contrast > 0:
            # The logarithm of a Gaussian's density with variance 1, as the target's parts have.
            logits = -0.5 * (predicted - target[:, None]).square().sum(dim=2)
            if self.answer == "image":
                logits = logits.sum(dim=(2, 3), keepdim=True)
                weights, mask = weights[:, :, :1, :1], mask[:, :1, :1]
            terms["guide.loss_ce"] = self.contrast * _cross_entropy(logits, weights, mask)
        return terms

    def _errors(
        self,
        latent: Float[Tensor, "B C h w"],
        classes: Int64[Tensor, "B K"],
        time: float,
        generator: torch.Generator,
    ) -> Float[Tensor, "B K h w"]:
        """Squared error of each class at one time; every image gets the same noise."""
        noise = torch.randn(latent.shape[1:], generator=generator, device="cpu")
        noise = noise.to(latent.device).expand(latent.shape)
        t = torch.full((len(latent),), time, device=latent.device)
        noisy_latent, target = self.guide.noisy(latent, noise, t)
        predicted = self.guide.predict(noisy_latent, t, classes).float()
        return (predicted - target[:, None]).square().sum(dim=2)

    def _conditions(
        self, shares: Float[Tensor, "B K h w"]
    ) -> tuple[Int64[Tensor, "B M"], Float[Tensor, "B M h w"], Bool[Tensor, "B h w"]]:
        """Classes of each image, their weights at each cell, and the cells that count.

        Of more classes than are asked for some are drawn, and the cells of the others do not
        count. An image without a condition has the unconditional class alone, and all its cells.
        """
        present = (shares.amax(dim=(2, 3)) > 0).float()
        count = self.classes_per_image or int(present.sum(dim=1).max())
        count = max(1, min(count, self.guide.num_classes))
        order = present + torch.rand_like(present)
        classes = order.topk(count, dim=1).indices
        index = classes[:, :, None, None].expand(-1, -1, *shares.shape[2:])
        weights = shares.gather(1, index)
        # Shares are quotients of pixel counts, so a sum short of 1 is short by a whole pixel.
        mask = weights.sum(dim=1) > 1 - 0.5 / self.guide.cell**2
        free = torch.rand(len(shares), device=shares.device) < self.unconditional
        classes = classes.masked_fill(free[:, None], self.guide.num_classes)
        alone = F.one_hot(torch.zeros_like(classes[:, 0]), count).float()[:, :, None, None]
        weights = torch.where(free[:, None, None, None], alone, weights)
        return classes, weights, mask | free[:, None, None]

    def _whole_patches(self, image: Image) -> Float[Tensor, "B 3 _H _W"]:
        """Pixels in 0..255, both sides rounded to the nearest multiple that the guide takes."""
        unit = self.guide.view.multiple
        size = [max(unit, (side + unit // 2) // unit * unit) for side in image.shape[2:]]
        pixels = _pixels(image)
        if size == list(image.shape[2:]):
            return pixels
        return F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True)


def _cross_entropy(
    logits: Float[Tensor, "B M h w"], weights: Float[Tensor, "B M h w"], mask: Bool[Tensor, "B h w"]
) -> Float[Tensor, ""]:
    """Mean over the cells that count; weights are the probabilities that the logits should give."""
    entropy = -(weights * logits.log_softmax(dim=1)).sum(dim=1) * mask
    return entropy.sum() / mask.sum().clamp(min=1)


def class_shares(
    label: Integer[Tensor, "B H W"], num_classes: int, cell: int, *, ignore_index: int = IGNORE
) -> Float[Tensor, "B K h w"]:
    """Share of each class in the labelled pixels of a cell; 0 for all where there are none."""
    batch, height, width = label.shape
    rows, columns = height // cell, width // cell
    known = torch.where(label == ignore_index, num_classes, label.long())
    cells = known.unflatten(1, (rows, cell)).unflatten(3, (columns, cell))
    cells = cells.permute(0, 1, 3, 2, 4).reshape(batch, rows, columns, cell * cell)
    counts = torch.zeros(batch, rows, columns, num_classes + 1, device=label.device)
    counts.scatter_add_(3, cells, torch.ones_like(cells, dtype=counts.dtype))
    counts = counts[..., :num_classes].movedim(3, 1)
    return counts / counts.sum(dim=1, keepdim=True).clamp(min=1)


def _pixels(image: Image) -> Image:
    """The pixels of 0..255 that were normalised by mean 0.5 and std 0.5."""
    return image * 127.5 + 127.5

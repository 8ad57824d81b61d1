"""CoTTA: a slow teacher's pseudo-labels, averaged over views, and small returns to the source.

Paper:   Wang et al., "Continual Test-Time Domain Adaptation", CVPR 2022,
         https://arxiv.org/abs/2203.13591
Follows: the authors' segmentation code (SegFormer, Cityscapes to ACDC), whose numbers are in
         configs/tta/cotta.yaml: everything in eval mode, hard labels, the threshold asked pixel by
         pixel, and the labels themselves as the prediction. There, views are averaged and the loss
         is taken at the image's size; here both are at the stride of the logits. The rule of its
         classification code is another: cotta_classification.py.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, distributed, nn

from segmill.errors import SegmillError
from segmill.models.combined import DISCRIMINATIVE, CombinedModel
from segmill.tta.method import Updater, Views
from segmill.tta.weight_sets import WeightSet, return_some


class CoTTA:
    """One step a batch on the cross-entropy with the teacher's labels; all weights learn.

    Where the source model is surer than `threshold`, the label is the teacher's for the image as
    it is; elsewhere its mean over the image at `ratios` of its size (sides stretched up to a
    multiple of `multiple`), with mirror images when `flip`. After each step the teacher keeps
    `momentum` of itself, and every weight of the student returns to the source with the
    probability `restore`. What is drawn does not depend on the number of processes.
    """

    def __init__(
        self,
        *,
        model: CombinedModel,
        ratios: Sequence[float],
        flip: bool,
        multiple: int,
        threshold: float,
        momentum: float,
        restore: float,
    ) -> None:
        if 1 not in ratios or min(ratios) <= 0:
            raise SegmillError(
                f"tta.method.ratios={list(ratios)} should be positive and have 1.0 among them: "
                "the image as it is."
            )
        self.model = model
        self.ratios, self.flip, self.multiple = tuple(ratios), flip, multiple
        self.threshold, self.momentum, self.restore = threshold, momentum, restore
        self._source: WeightSet | None = None
        self._teacher: WeightSet | None = None

    def parameters_to_update(self) -> dict[str, nn.Parameter]:
        """All of the discriminative model, whatever `model.update` says."""
        named = self.model.named_parameters()
        return {name: each for name, each in named if name.startswith(DISCRIMINATIVE)}

    def adapt(
        self, views: Views, updater: Updater, generator: torch.Generator
    ) -> tuple[Float[Tensor, "B K h w"], Float[Tensor, ""]]:
        """Learn from a batch; the logits are the teacher's, as `predict` gives them."""
        teacher_logits = self.predict(views)
        logits = self.model.discriminative(views.image)
        loss = F.cross_entropy(logits.float(), teacher_logits.argmax(dim=1))
        updater.backward(loss * views.weight)
        updater.step()
        parameters = self.parameters_to_update()
        source, teacher = self._weights(parameters)
        teacher.follow(parameters, momentum=self.momentum)
        return_some(parameters, source, share=self.restore, generator=generator)
        return teacher_logits, loss.detach()

    @torch.no_grad()
    def predict(self, views: Views) -> Float[Tensor, "B K h w"]:
        """Logarithms of the teacher's probabilities, of which its labels are the largest."""
        parameters = self.parameters_to_update()
        source, teacher = self._weights(parameters)
        with source.installed(parameters):
            prob = self.model.discriminative(views.image).float().softmax(dim=1)
        sure = prob.amax(dim=1, keepdim=True) > self.threshold
        size = prob.shape[2], prob.shape[3]
        with teacher.installed(parameters):
            plain, mean = self._plain_and_mean(views.image, size)
        prob = torch.where(sure, plain, mean)
        # Finite, so that it can be resized.
        return prob.clamp(min=torch.finfo(prob.dtype).tiny).log()

    def reset(self) -> None:
        """Forget the teacher; the weights at the next image are the source's, and its own."""
        self._source, self._teacher = None, None

    def _weights(self, parameters: dict[str, nn.Parameter]) -> tuple[WeightSet, WeightSet]:
        """The source's weights and the teacher's; both are the model's own at the first image."""
        if self._source is None or self._teacher is None:
            self._source, self._teacher = WeightSet(parameters), WeightSet(parameters)
        return self._source, self._teacher

    def _plain_and_mean(
        self, image: UInt8[Tensor, "B C H W"], size: tuple[int, int]
    ) -> tuple[Float[Tensor, "B K h w"], Float[Tensor, "B K h w"]]:
        """Probabilities of the image as it is, and their mean over all views of it."""
        probs: list[Tensor] = []
        for ratio in self.ratios:
            scaled = self._scaled(image, ratio)
            with self._taken(scaled, ratio):
                probs.append(self._prob(scaled, size))
            if self.flip:  # not in one batch: each view has BatchNorm statistics of its own
                probs.append(self._prob(scaled.flip(dims=(3,)), size).flip(dims=(3,)))
        plain = probs[self.ratios.index(1) * (2 if self.flip else 1)]
        return plain, torch.stack(probs).mean(dim=0)

    @contextmanager
    def _taken(
        self, view: UInt8[Tensor, "B C H W"] | Float[Tensor, "B C H W"], ratio: float
    ) -> Iterator[None]:
        """The network has taken the image as it is, so an error is about the view's size."""
        try:
            yield
        except (RuntimeError, AssertionError) as error:  # torch's, and timm's of a fixed size
            if ratio == 1 or isinstance(error, torch.OutOfMemoryError | distributed.DistError):
                raise
            network = type(self.model.discriminative.network).__name__
            reason = str(error).strip().partition("\n")[0]
            raise SegmillError(
                f"tta.method.ratios={list(self.ratios)}: {network} takes no image of "
                f"{view.shape[2]} x {view.shape[3]} pixels, which ratio {ratio:g} and "
                f"tta.method.multiple={self.multiple} make ({reason}). Leave {ratio:g} out of "
                "tta.method.ratios, or raise tta.method.multiple to what the network halves its "
                "images down to; for networks of one size tta.method.ratios=[1.0]."
            ) from error

    def _prob(
        self, view: UInt8[Tensor, "B C H W"] | Float[Tensor, "B C H W"], size: tuple[int, int]
    ) -> Float[Tensor, "B K h w"]:
        """Probabilities of a view at `size`."""
        logits = self.model.discriminative(view).float()
        if tuple(logits.shape[2:]) != size:
            logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
        return logits.softmax(dim=1)

    def _scaled(
        self, image: UInt8[Tensor, "B C H W"], ratio: float
    ) -> UInt8[Tensor, "B C H W"] | Float[Tensor, "B C _h _w"]:
        if ratio == 1:
            return image
        height, width = (
            -(-round(side * ratio) // self.multiple) * self.multiple for side in image.shape[2:]
        )
        # As OpenCV's bilinear, which has no antialiasing either.
        return F.interpolate(image.float(), (height, width), mode="bilinear", align_corners=False)

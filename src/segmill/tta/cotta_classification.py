"""CoTTA for classifiers: a slow teacher's soft labels, averaged over copies where it is unsure.

Paper:   Wang et al., "Continual Test-Time Domain Adaptation", CVPR 2022,
         https://arxiv.org/abs/2203.13591
Follows: the authors' classification code, whose numbers for ImageNet are in
         configs/tta/cotta_classification.yaml, those for CIFAR beside them; but in eval mode, as
         the segmentation code and everything here. `cotta.py` is the rule for segmentation.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from segmill.errors import SegmillError
from segmill.models.combined import DISCRIMINATIVE, CombinedModel
from segmill.tta.method import Updater, Views
from segmill.tta.selection import over_processes
from segmill.tta.sharding import world_size
from segmill.tta.strong_jitter import strongly_jittered
from segmill.tta.weight_sets import WeightSet, return_some


class CoTTAClassification:
    """One step a batch on the cross-entropy with the teacher's probabilities; all weights learn.

    Where the source is surer of the batch than `threshold`, on average, the teacher sees it as it
    is; else the label is its mean logits over `copies` jittered ones. With `symmetric` the loss is
    the mean of both directions of the cross-entropy. `momentum` and `restore` are as in `CoTTA`.
    """

    def __init__(
        self,
        *,
        model: CombinedModel,
        copies: int,
        threshold: float,
        symmetric: bool,
        momentum: float,
        restore: float,
    ) -> None:
        if copies < 1:
            raise SegmillError(f"tta.method.copies={copies} should be above 0.")
        self.model = model
        self.copies, self.threshold, self.symmetric = copies, threshold, symmetric
        self.momentum, self.restore = momentum, restore
        self.reset()

    def parameters_to_update(self) -> dict[str, nn.Parameter]:
        """All of the discriminative model, whatever `model.update` says."""
        named = self.model.named_parameters()
        return {name: each for name, each in named if name.startswith(DISCRIMINATIVE)}

    def adapt(
        self, views: Views, updater: Updater, generator: torch.Generator
    ) -> tuple[Float[Tensor, "B K h w"], Float[Tensor, ""]]:
        """Learn from a batch; the logits are the teacher's, which are the labels."""
        parameters = self.parameters_to_update()
        source, teacher = self._weights(parameters)
        labels = self._labels(views, parameters, generator)
        loss = self._loss(self.model.discriminative(views.image), labels)
        updater.backward(loss * views.weight)
        updater.step()
        teacher.follow(parameters, momentum=self.momentum)
        return_some(parameters, source, share=self.restore, generator=generator)
        return labels, loss.detach()

    @torch.no_grad()
    def predict(self, views: Views) -> Float[Tensor, "B K h w"]:
        """Logits of the teacher, for the images as they are."""
        parameters = self.parameters_to_update()
        _, teacher = self._weights(parameters)
        with teacher.installed(parameters):
            return self.model.discriminative(views.image)

    def reset(self) -> None:
        """Forget the teacher; the weights at the next image are the source's, and its own."""
        self._source: WeightSet | None = None
        self._teacher: WeightSet | None = None

    def _weights(self, parameters: dict[str, nn.Parameter]) -> tuple[WeightSet, WeightSet]:
        """The source's weights and the teacher's; both are the model's own at the first image."""
        if self._source is None or self._teacher is None:
            self._source, self._teacher = WeightSet(parameters), WeightSet(parameters)
        return self._source, self._teacher

    @torch.no_grad()
    def _labels(
        self,
        views: Views,
        parameters: dict[str, nn.Parameter],
        generator: torch.Generator,
    ) -> Float[Tensor, "B K h w"]:
        source, teacher = self._weights(parameters)
        image = views.image
        with source.installed(parameters):
            logits = self.model.discriminative(image)
        if logits.shape[2:] != (1, 1):
            raise SegmillError(
                "tta=cotta_classification averages predictions of turned and shifted copies, which "
                "fit no segmented image. The same method for segmentation is tta=cotta."
            )
        confidence = logits.float().softmax(dim=1).amax(dim=1).mean()
        # All processes decide alike, also of different images, of which one may have more.
        sure = float(over_processes(confidence * views.weight)) / world_size() >= self.threshold
        draws = views.generators(generator)
        with teacher.installed(parameters):
            if sure:
                return self.model.discriminative(image)
            total = torch.zeros_like(logits, dtype=torch.float32)
            for _ in range(self.copies):
                total += self.model.discriminative(
                    strongly_jittered(image, generator, draws)
                ).float()
        return total / self.copies

    def _loss(
        self, logits: Float[Tensor, "B K h w"], labels: Float[Tensor, "B K h w"]
    ) -> Float[Tensor, ""]:
        own, other = logits.float().log_softmax(dim=1), labels.float().log_softmax(dim=1)
        loss = -(other.exp() * own).sum(dim=1).mean()
        if not self.symmetric:
            return loss
        return 0.5 * loss - 0.5 * (own.exp() * other).sum(dim=1).mean()

"""RoTTA: a slow teacher labels a balanced memory of the past; BatchNorm's statistics move slowly.

Paper:   Yuan et al., "Robust Test-Time Adaptation in Dynamic Scenarios", CVPR 2023,
         https://arxiv.org/abs/2303.13899
Follows: the paper and its public code, whose numbers are in configs/tta/rotta.yaml. Scale and shift
         of all kinds of normalisation layers learn (there: BatchNorm's). A network without
         BatchNorm has no statistics to move; memory, teacher and the weights by age remain.
         Processes with other images each have one memory of the images of all, in the stream's
         order, and take the same steps on it: so they do what one process does.
"""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from segmill.errors import SegmillError
from segmill.models.combined import CombinedModel
from segmill.tta.class_memory import ClassMemory
from segmill.tta.entropy import pixel_entropy
from segmill.tta.method import Updater, Views
from segmill.tta.mixed_statistics import MixedStatistics
from segmill.tta.norm_layers import norm_layers
from segmill.tta.selection import rows_of_processes
from segmill.tta.strong_jitter import strongly_jittered
from segmill.tta.weight_sets import WeightSet


class RoTTA:
    """One step every `update_every` images, on all of the memory; predictions are the teacher's.

    The student sees the memory's images strongly jittered, the teacher as they are; an image's
    cross-entropy counts the less the older it is. Both have BatchNorm statistics of their own,
    which move by `statistics_share` at every step. The teacher keeps `momentum` of itself.
    `age_weight` and `entropy_weight` say what the memory drops.
    """

    def __init__(
        self,
        *,
        model: CombinedModel,
        capacity: int,
        update_every: int,
        age_weight: float,
        entropy_weight: float,
        statistics_share: float,
        momentum: float,
    ) -> None:
        if min(capacity, update_every) < 1:
            raise SegmillError(
                f"tta.method.capacity={capacity} and tta.method.update_every={update_every} "
                "should be above 0: numbers of images."
            )
        self.model = model
        self.capacity, self.update_every = capacity, update_every
        self.age_weight, self.entropy_weight = age_weight, entropy_weight
        self.statistics_share, self.momentum = statistics_share, momentum
        self._names = {name for layer in norm_layers(model) for name in layer}
        self.reset()

    def parameters_to_update(self) -> dict[str, nn.Parameter]:
        """Scale and shift of all normalisation layers of the discriminative model."""
        return {name: each for name, each in self.model.named_parameters() if name in self._names}

    def adapt(
        self, views: Views, updater: Updater, generator: torch.Generator
    ) -> tuple[Float[Tensor, "B K h w"], Float[Tensor, ""]]:
        """Remember the batch and learn when it is time; the loss of no step is 0."""
        logits = self.predict(views)
        memory = self._memory_for(logits)
        news = views.image, logits.argmax(dim=1).flatten(), pixel_entropy(logits).flatten()
        if not self.model.shares_classes:
            news = tuple(rows_of_processes(each) for each in news)
        images, predicted, entropy = news
        losses = [logits.new_zeros(())]
        for image, of_class, unsure in zip(
            images, predicted.tolist(), entropy.tolist(), strict=True
        ):
            memory.add(image.clone(), of_class, unsure)
            self._seen += 1
            if self._seen % self.update_every == 0:
                losses.append(self._step(*memory.content(), updater, generator))
        return logits, torch.stack(losses[1:] or losses).mean()

    @torch.no_grad()
    def predict(self, views: Views) -> Float[Tensor, "B K h w"]:
        """Logits of the teacher, by the statistics that it has gathered."""
        parameters = self.parameters_to_update()
        teacher, statistics = self._teachers(parameters)
        with teacher.installed(parameters), statistics.used():
            return self.model.discriminative(views.image)

    def reset(self) -> None:
        """Forget memory, teacher and statistics; the weights at the next image are the source's."""
        self._seen = 0
        self._memory: ClassMemory | None = None
        self._teacher: tuple[WeightSet, MixedStatistics] | None = None
        self._student_statistics: MixedStatistics | None = None

    def _step(
        self,
        images: UInt8[Tensor, "N C H W"],
        ages: Float[Tensor, " N"],
        updater: Updater,
        generator: torch.Generator,
    ) -> Float[Tensor, ""]:
        parameters = self.parameters_to_update()
        teacher, statistics = self._teachers(parameters)
        if self._student_statistics is None:
            self._student_statistics = self._statistics()
        with torch.no_grad(), teacher.installed(parameters), statistics.mixed(keep=True):
            prob = self.model.discriminative(images).float().softmax(dim=1)
        with self._student_statistics.mixed(keep=True):
            logits = self.model.discriminative(strongly_jittered(images, generator))
        cross_entropy = -(prob * logits.float().log_softmax(dim=1)).sum(dim=1).flatten()
        loss = (cross_entropy * (-ages).sigmoid()).mean()
        updater.backward(loss)
        updater.step()
        teacher.follow(parameters, momentum=self.momentum)
        return loss.detach()

    def _memory_for(self, logits: Float[Tensor, "B K h w"]) -> ClassMemory:
        """The memory; at first one for as many classes as there are logits."""
        if logits.shape[2:] != (1, 1):
            raise SegmillError(
                "tta=rotta keeps images by the one class that was predicted for each, so that the "
                "memory has all classes alike; a segmented image has many, and the paper has no "
                "rule for it. Choose another method for segmentation: tta=cotta has a teacher too."
            )
        if self._memory is None:
            self._memory = ClassMemory(
                capacity=self.capacity,
                num_classes=logits.shape[1],
                age_weight=self.age_weight,
                entropy_weight=self.entropy_weight,
            )
        return self._memory

    def _teachers(self, parameters: dict[str, nn.Parameter]) -> tuple[WeightSet, MixedStatistics]:
        """The teacher's weights and statistics; at first the model's own."""
        if self._teacher is None:
            self._teacher = WeightSet(parameters), self._statistics()
        return self._teacher

    def _statistics(self) -> MixedStatistics:
        network = self.model.discriminative.network
        return MixedStatistics(network, share=self.statistics_share, correction=0, gradient=True)

"""Images with one label: their probabilities under a protocol, and what is counted of them."""

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from segmill.data.labelled_image import NO_LABEL
from segmill.evaluation import EvaluationModule
from segmill.inference import predict_log_prob
from segmill.models.discriminative import Discriminative
from tiny_tasks import PROTOCOL

CLASSES = 7


class Means(nn.Module):
    """Logits (B, 7, 1, 1) that a mirror image changes."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.classify = nn.Linear(3 * 8 * 8, CLASSES)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.classify(image.flatten(1))[:, :, None, None]


def images(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 1, 3, 8, 8), generator=generator, dtype=torch.uint8)


@torch.no_grad()
def test_mirror_images_are_averaged_as_probabilities() -> None:
    network, image = Means(), images(1)[0] / 255
    plain, mirrored = (network(each).flatten(1) for each in (image, image.flip(3)))
    found = predict_log_prob(network, [image], PROTOCOL)
    torch.testing.assert_close(found, plain.log_softmax(1))
    both = predict_log_prob(network, [image], replace(PROTOCOL, flip=True))
    mean = (plain.softmax(1) + mirrored.softmax(1)) / 2
    torch.testing.assert_close(both, mean.log())


@torch.no_grad()
def test_ranks_and_confidences_are_those_of_the_logits_and_images_without_a_label_do_not_count():
    model = Discriminative(network=Means(), mean=[128.0] * 3, std=[64.0] * 3).eval()
    module = EvaluationModule(
        model=model,
        protocol=PROTOCOL,
        class_names=[str(each) for each in range(CLASSES)],
        one_label=True,
    )
    every = images(6)
    labels = [0, 1, 2, 3, 4, NO_LABEL]
    for index, (image, label) in enumerate(zip(every, labels, strict=True)):
        batch = {"inputs": [image], "label": torch.tensor([[[label]]]), "index": index}
        pred = module._ranked_pred(batch, index)
        assert pred.flatten() == model(image).argmax(1).flatten()
    counts = module.image_counts
    assert counts is not None
    prob = torch.cat([model(image) for image in every]).flatten(1).softmax(1)
    expected = [int((row > row[label]).sum()) for row, label in zip(prob, labels[:5], strict=False)]
    assert counts.rank.tolist() == [*expected, -1]
    np.testing.assert_allclose(counts.confidence, prob.amax(1), rtol=1e-6)  # float32
    assert counts.scores()["top1"] == sum(rank == 0 for rank in expected) / 5


def test_maps_of_labels_have_no_such_counts() -> None:
    model = Discriminative(network=Means(), mean=[128.0] * 3, std=[64.0] * 3)
    assert EvaluationModule(model=model, protocol=PROTOCOL, class_names=["a"]).image_counts is None

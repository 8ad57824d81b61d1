"""CoTTA's scaled views on classifiers that take no image of such a size."""

import pytest
import torch
from torch import nn

from segmill.errors import SegmillError
from segmill.models.combined import CombinedModel, Update
from segmill.models.discriminative import Discriminative
from segmill.models.families.image_classifier import ImageClassifier
from tiny_adapt import tiny_loss
from tiny_classifiers import batch_of_views
from tiny_methods import method_of

SMALL = {
    "convnext_atto": {"depths": [1, 1, 1, 1], "dims": [4, 4, 4, 4], "patch_size": 4},
    "vit_tiny_patch16_224": {"depth": 1, "embed_dim": 6, "num_heads": 2, "img_size": 32},
}


def cotta_on(name: str, **settings):
    network: nn.Module = ImageClassifier(model_name=name, num_classes=3, options=SMALL[name])
    model = CombinedModel(
        discriminative=Discriminative(network=network, mean=[0.5] * 3, std=[0.25] * 3),
        generative=None,
        update=Update(discriminative=True, generative=False, update_norm_only=False),
        loss=tiny_loss(),
    )
    return method_of("cotta", model.eval(), flip=False, threshold=1.0, **settings)


@pytest.mark.parametrize("name", list(SMALL))
def test_a_ratio_that_the_network_does_not_take_is_refused_with_the_key_to_change(name):
    method = cotta_on(name, ratios=[0.5, 1.0], multiple=16)
    with pytest.raises(SegmillError, match=r"16 x 16 pixels, which ratio 0\.5 .*multiple=16") as e:
        method.predict(batch_of_views(0, count=2, size=32))
    assert "Leave 0.5 out of tta.method.ratios" in str(e.value)
    assert "\n" not in str(e.value)


def test_weights_are_the_students_after_a_refusal():
    method = cotta_on("convnext_atto", ratios=[0.5, 1.0], multiple=16)
    before = {name: each.clone() for name, each in method.model.named_parameters()}
    with pytest.raises(SegmillError):
        method.predict(batch_of_views(0, size=32))
    assert all(torch.equal(each, before[name]) for name, each in method.model.named_parameters())


def test_an_error_at_the_images_own_size_stays_what_it_is():
    method = cotta_on("convnext_atto", ratios=[1.0], multiple=16)
    with pytest.raises(RuntimeError, match="size"):
        method.predict(batch_of_views(0, size=3))


def test_a_larger_multiple_makes_the_view_large_enough():
    method = cotta_on("convnext_atto", ratios=[0.5, 1.0], multiple=32)
    assert method.predict(batch_of_views(0, count=2, size=32)).shape == (2, 3, 1, 1)

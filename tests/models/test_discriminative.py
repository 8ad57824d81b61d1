from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import golden
from segmill.errors import SegmillError
from segmill.models.discriminative import Discriminative

IMAGENET: dict[str, Any] = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


class Echo(nn.Module):
    """Its logits are its input, its loss their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, image):
        return self.scale * image

    def losses(self, image, label):
        assert label.dtype == torch.int64
        return {"decode.loss_ce": self(image).mean()}


def rgb_inputs() -> list[torch.Tensor]:
    """The golden images as ours travel: RGB; the golden ones are BGR."""
    return [torch.from_numpy(bgr[::-1].copy()) for bgr in golden.preprocessing_inputs()]


def check(normal: torch.Tensor, case: str) -> None:
    want = golden.component("preproc")[case]
    assert list(normal.shape) == want["shape"]
    first = np.array(want["first"])
    # float32 of one subtraction and one division; the sums are those of 10^5 such values.
    np.testing.assert_allclose(
        normal[0, :, : first.shape[1], : first.shape[2]].numpy(), first, atol=1e-6
    )
    assert normal.double().sum().item() == pytest.approx(want["sum"], abs=1e-2)
    assert normal.double().abs().sum().item() == pytest.approx(want["abs"], abs=1e-2)


def test_test_images_are_normalised_as_mmsegmentation_does():
    model = Discriminative(network=Echo(), **IMAGENET)
    check(model.normalise(rgb_inputs()[0][None]), "test_default")


def test_training_crops_are_zero_beyond_what_the_image_covers():
    model = Discriminative(network=Echo(), **IMAGENET)
    images = rgb_inputs()
    batch = torch.zeros(2, 3, 128, 128, dtype=torch.uint8)
    for crop, image in zip(batch, images, strict=True):
        crop[:, : image.shape[1], : image.shape[2]] = image
    valid = torch.tensor([(0, 0, *image.shape[1:]) for image in images])
    normal = model.normalise(batch, valid)
    check(normal, "train_size128")
    assert (normal[0, :, 70:] == 0).all()
    assert (normal[0, :, :, 90:] == 0).all()


def test_bytes_and_floats_of_the_same_pixels_are_one_image():
    model = Discriminative(network=Echo(), **IMAGENET)
    image = rgb_inputs()[0][None]
    assert torch.equal(model.normalise(image), model.normalise(image.float()))


def test_the_input_is_left_as_it_was():
    model = Discriminative(network=Echo(), **IMAGENET)
    image = torch.full((1, 3, 4, 4), 100.0)
    model.normalise(image, torch.tensor([[0, 0, 2, 2]]))
    assert (image == 100).all()


def test_depth_has_statistics_of_its_own():
    model = Discriminative(
        network=Echo(), mean=[*IMAGENET["mean"], 0.48], std=[*IMAGENET["std"], 0.28]
    )
    image = torch.full((1, 4, 2, 2), 255, dtype=torch.uint8)
    assert model(image)[0, 3, 0, 0].item() == pytest.approx((1 - 0.48) / 0.28)


def test_a_network_that_expects_blue_first_gets_it_under_the_statistics_as_they_stand():
    four: dict[str, Any] = {"mean": [0.1, 0.2, 0.3, 0.4], "std": [0.5, 0.6, 0.7, 0.8]}
    model = Discriminative(network=Echo(), **four, channel_order="bgr")
    image = torch.tensor([10.0, 20.0, 30.0, 40.0]).view(1, 4, 1, 1)  # red, green, blue, depth
    expected = [(30 / 255 - 0.1) / 0.5, (20 / 255 - 0.2) / 0.6, (10 / 255 - 0.3) / 0.7]
    expected.append((40 / 255 - 0.4) / 0.8)
    assert model(image).flatten().tolist() == pytest.approx(expected)
    assert model(image.byte()).flatten().tolist() == pytest.approx(expected)
    assert image.flatten().tolist() == [10, 20, 30, 40]


def test_blue_first_needs_no_depth_and_keeps_padding_at_zero():
    image = rgb_inputs()[0][None]
    rgb = Discriminative(network=Echo(), **IMAGENET)
    bgr = Discriminative(network=Echo(), **IMAGENET, channel_order="bgr")
    valid = torch.tensor([[2, 5, 30, 40]])
    assert torch.equal(bgr.normalise(image, valid), rgb.normalise(image.flip(1), valid))


def test_losses_see_the_normalised_image_and_an_integer_label():
    model = Discriminative(network=Echo(), **IMAGENET)
    image, label = rgb_inputs()[0][None], torch.zeros(1, 70, 90, dtype=torch.uint8)
    terms = model.losses(image, label, torch.tensor([[0, 0, 70, 90]]))
    assert terms["decode.loss_ce"].item() == pytest.approx(model(image).mean().item())


def test_only_the_network_has_weights_to_save():
    model = Discriminative(network=Echo(), **IMAGENET)
    assert list(model.state_dict()) == ["network.scale"]


def test_an_image_of_other_channels_names_the_remedy():
    model = Discriminative(network=Echo(), **IMAGENET)
    with pytest.raises(SegmillError, match=r"data\.channels=4"):
        model.normalise(torch.zeros(1, 4, 2, 2, dtype=torch.uint8))


def test_statistics_of_different_length_are_refused():
    with pytest.raises(SegmillError, match=r"model\.mean has 3 values and model\.std 1"):
        Discriminative(network=Echo(), mean=IMAGENET["mean"], std=[0.2])

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import segmill
from segmill.checkpoint.load import save_safetensors
from segmill.errors import SegmillError
from segmill.segmenter import save_segmenter


def test_a_variant_is_built_by_its_name() -> None:
    segmenter = segmill.load("fcn_tiny", num_classes=7)
    logits = segmenter.network(torch.zeros(1, 3, 32, 48))
    assert logits.shape[:2] == (1, 7)
    assert not segmenter.network.training


@pytest.mark.parametrize("name", ["fcn_tiny_rgbd", "segformer_tiny_rgbd"])
def test_a_variant_of_rgbd_images_takes_four_channels(name: str) -> None:
    segmenter = segmill.load(name, num_classes=7)
    assert segmenter.channels == 4
    image = np.random.RandomState(0).randint(0, 256, (32, 48, 4)).astype(np.uint8)
    assert segmenter.predict(image).label.shape == (32, 48)


def test_classes_of_a_variant_of_rgbd_images_are_read_off_its_weights(tmp_path: Path) -> None:
    source = segmill.load("fcn_tiny_rgbd", num_classes=19)
    torch.save({"state_dict": source.network.state_dict()}, tmp_path / "w.pth")
    assert len(segmill.load("fcn_tiny_rgbd", weights=tmp_path / "w.pth").classes) == 19


@pytest.mark.parametrize(("name", "order"), [("dformer-tiny", "bgr"), ("dformerv2-s_sun", "rgb")])
def test_dformer_reads_the_channels_in_the_order_of_its_official_file(name, order) -> None:
    segmenter = segmill.load(name, num_classes=3)
    assert segmenter.model.channel_order == order
    assert segmenter.config["channel_order"] == order


def test_losses_of_the_network_are_named_terms() -> None:
    network = segmill.load("fcn_tiny", num_classes=7).network
    terms = network.losses(torch.zeros(2, 3, 32, 48), torch.zeros(2, 32, 48, dtype=torch.long))
    assert set(terms) == {"decode.loss_ce", "aux.loss_ce"}


def test_what_is_saved_opens_to_the_same_predictions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = segmill.load("segformer_tiny", num_classes=5)
    path = tmp_path / "model.safetensors"
    save_segmenter(path, first)
    second = segmill.load(path)
    image = np.random.RandomState(0).randint(0, 256, (40, 56, 3)).astype(np.uint8)
    assert np.array_equal(first.predict(image).label, second.predict(image).label)
    assert second.classes.names == first.classes.names
    assert second.protocol == first.protocol


def test_a_picture_file_is_read_as_rgb(tmp_path: Path) -> None:
    segmenter = segmill.load("fcn_tiny", num_classes=3)
    image = np.random.RandomState(1).randint(0, 256, (24, 32, 3)).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "x.png"), image[..., ::-1])
    from_file = segmenter.predict(tmp_path / "x.png")
    assert np.array_equal(from_file.image, image)
    assert np.array_equal(from_file.label, segmenter.predict(image).label)


def test_the_number_of_classes_is_read_off_the_weights(tmp_path: Path) -> None:
    source = segmill.load("fcn_tiny", num_classes=19)
    torch.save({"state_dict": source.network.state_dict()}, tmp_path / "w.pth")
    loaded = segmill.load("fcn_tiny", weights=tmp_path / "w.pth")
    assert len(loaded.classes) == 19
    for name, value in source.network.state_dict().items():
        assert torch.equal(value, loaded.network.state_dict()[name]), name


def test_an_unknown_name_says_what_there_is() -> None:
    with pytest.raises(SegmillError, match="fcn_tiny"):
        segmill.load("fcn_tinny", num_classes=3)


def test_a_path_that_is_not_there_is_no_variant() -> None:
    with pytest.raises(SegmillError, match="does not exist"):
        segmill.load("runs/nowhere/model.safetensors")
    with pytest.raises(SegmillError, match="nowhere does not exist"):
        segmill.load("nowhere")
    with pytest.raises(SegmillError, match="did you mean segformer_tiny"):
        segmill.load("segformer_tny")


def test_foreign_safetensors_ask_for_the_variant(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "x.safetensors", {"w": torch.zeros(2)}, {})
    with pytest.raises(SegmillError, match="Name the variant"):
        segmill.load(tmp_path / "x.safetensors")


def test_an_image_with_the_wrong_channels_is_refused() -> None:
    segmenter = segmill.load("fcn_tiny", num_classes=3)
    with pytest.raises(SegmillError, match="RGB"):
        segmenter.predict(np.zeros((24, 32, 4), np.uint8))

"""Images with one label as training batches and single views; the digits' splits."""

from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tiny_classes import PROTOCOL

from segmill.configuration import build
from segmill.data.digits import SPLITS, Digits
from segmill.data.files import DataError
from segmill.data.image_datamodule import ImageData, shifted
from segmill.errors import SegmillError
from segmill.paths import CONFIGS


def digits(**changes: Any) -> ImageData:
    config = OmegaConf.create({"data": OmegaConf.load(CONFIGS / "data/digits.yaml")})
    config.data.merge_with(changes)
    return build(config.data, protocol=PROTOCOL, seed=0, accumulate=1, start_step=0)


def test_a_training_batch_has_labels_of_one_pixel():
    (batch,) = islice(digits(batch_size=8).train_dataloader(), 1)
    assert batch["image"].shape == (8, 3, 32, 32)
    assert batch["image"].dtype == torch.uint8
    assert batch["label"].shape == (8, 1, 1)
    assert batch["label"].dtype == torch.int64
    assert batch["valid"].tolist() == [[0, 0, 32, 32]] * 8
    assert len(batch["name"]) == 8


def test_an_epoch_has_every_training_image_once():
    loader = digits(batch_size=100).train_dataloader()
    names = [name for batch in islice(loader, 10) for name in batch["name"]]
    assert len(set(names)) == len(names) == 1000


def test_colours_are_distorted_only_where_that_is_asked_for():
    (batch,) = islice(digits(batch_size=8).train_dataloader(), 1)
    (plain,) = islice(digits(batch_size=8, photometric=False).train_dataloader(), 1)
    assert torch.equal(batch["image"], plain["image"]), "the device applies it"
    assert len(batch["jitter"].unique(dim=0)) == 8
    assert plain["jitter"].tolist() == [[0, 0, 1, 1, 0]] * 8


def test_workers_change_no_batch():
    for ours, theirs in zip(
        islice(digits(batch_size=8).train_dataloader(), 3),
        islice(digits(batch_size=8, workers=2).train_dataloader(), 3),
        strict=True,
    ):
        assert torch.equal(ours["image"], theirs["image"])
        assert ours["name"] == theirs["name"]


def test_evaluation_sees_every_image_as_it_is():
    found = list(digits().eval_loader("val"))
    assert len(found) == 200
    clean = Digits(split="val", size=32)
    first = found[0]
    np.testing.assert_array_equal(first["inputs"][0][0].permute(1, 2, 0), clean[0].image)
    assert first["label"].tolist() == [[[clean[0].label]]]
    assert (first["size"], first["index"]) == ((1, 1), 0)


def test_the_splits_share_no_digit_and_cover_all():
    parts = [Digits(split=split, size=32) for split in SPLITS]
    names = [part.name(index) for part in parts for index in range(len(part))]
    assert len(names) == len(set(names)) == 1797
    assert [len(part) for part in parts] == [1000, 200, 597]


def test_a_split_that_does_not_exist_is_refused():
    with pytest.raises(DataError, match="no split 'all'; there are train, val, test"):
        Digits(split="all", size=32)


def test_pictures_of_a_split_have_the_label_everywhere():
    sample = digits().dataset("val")[3]
    clean = Digits(split="val", size=32)[3]
    assert sample.label is not None
    assert sample.label.shape == (32, 32)
    assert set(sample.label.flat) == {clean.label}


def test_a_shift_moves_the_image_and_repeats_its_border():
    image = np.arange(64, dtype=np.uint8).reshape(8, 8)[..., None].repeat(3, axis=2)
    found = {shifted(image, 1, np.random.RandomState(seed)).tobytes() for seed in range(60)}
    assert len(found) == 9
    assert np.roll(image, 1, axis=0)[1:].tobytes() in {
        shifted(image, 1, np.random.RandomState(seed))[1:].tobytes() for seed in range(60)
    }
    np.testing.assert_array_equal(shifted(image, 0, np.random.RandomState(0)), image)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shift": -1}, r"data\.shift=-1"),
        ({"flip": 2.0}, r"data\.flip=2\.0"),
        ({"num_classes": 9}, r"data\.num_classes=9"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(SegmillError, match=message):
        digits(**changes)


def test_images_of_another_size_than_the_crop_are_refused():
    with pytest.raises(DataError, match=r"is 32 x 32, data\.crop is 16 x 16"):
        next(iter(digits(crop=[16, 16]).train_dataloader()))


def test_a_batch_that_processes_cannot_share_is_refused():
    with pytest.raises(DataError, match=r"data\.batch_size=9 is global"):
        digits(batch_size=9).require_shares(2)

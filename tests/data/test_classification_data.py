"""ImageNet, ImageNet-C and the digits as tasks: batches, order, processes, and what is refused."""

import io
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_classes import (
    PROTOCOL,
    SIDE,
    WNIDS,
    batches,
    classification,
    imagenet_c,
    names,
    write_classes,
)

from segmill.data import classification_data
from segmill.data.classes import read_classes
from segmill.data.corruptions import corrupt, corruption_seed
from segmill.data.digits import Digits
from segmill.data.files import DataError
from segmill.errors import SegmillError


def test_a_batch_has_both_models_views_and_labels_of_one_pixel(written: Path):
    first, second = batches(imagenet_c(written, batch_size=4), 0)
    assert first["image"].shape == first["original"].shape == (4, 3, SIDE, SIDE)
    assert first["image"].dtype == first["original"].dtype == torch.uint8
    assert first["label"].shape == (4, 1, 1)
    assert first["label"].dtype == torch.int64
    assert first["size"] == (1, 1)
    assert first["task"] == [1] * 4
    assert len(second["name"]) == 2, "the last batch has what is left"


def test_classes_are_counted_in_the_order_of_the_wnids(written: Path):
    data = imagenet_c(written)
    assert data.classes.names == WNIDS
    (batch,) = batches(data, 0)
    for name, label, image in zip(batch["name"], batch["label"], batch["image"], strict=True):
        assert name.split("/")[0] == WNIDS[int(label)]
        level = 40 * int(label) + int(name[-8:]) % 2
        assert (image.int() - level).abs().max() <= 1  # JPEG of a flat grey


def test_files_of_the_classifiers_size_are_taken_as_they_are(written: Path):
    data = imagenet_c(written)
    (batch,) = batches(data, 0)
    file = written / "fog" / "5" / f"{batch['name'][0]}.JPEG"
    expected = np.array(Image.open(file).convert("RGB"))
    np.testing.assert_array_equal(batch["image"][0].permute(1, 2, 0), expected)


def test_a_batch_of_images_of_several_sizes_is_refused_with_a_remedy(own: Path):
    first, *_ = sorted((own / "fog" / "5" / WNIDS[0]).iterdir())
    Image.new("RGB", (SIDE + 1, SIDE)).save(first)
    data = imagenet_c(own, view=None)
    with pytest.raises(DataError, match=rf"{first.stem} is {SIDE} x {SIDE + 1}.* Set data\.view"):
        batches(data, 0)
    assert len(batches(imagenet_c(own, view=None, batch_size=1), 0)) == 6


def test_the_order_is_the_same_for_every_task_and_follows_the_seed(written: Path):
    data = imagenet_c(written)
    order = names(batches(data, 0))
    assert order == names(batches(data, 1)) == names(batches(imagenet_c(written, batch_size=2), 0))
    assert order != sorted(order)
    assert order[:4] == names(batches(data, 0, limit=4))
    assert data.order_hash() == imagenet_c(written, batch_size=3).order_hash()
    assert data.order_hash() != imagenet_c(written, seed=1).order_hash()


def test_several_tasks_are_mixed_into_one_stream(written: Path):
    data = imagenet_c(written, batch_size=4)
    mixed = batches(data, 0, 1)
    pairs = [pair for each in mixed for pair in zip(each["task"], each["name"], strict=True)]
    assert len(set(pairs)) == len(pairs) == 12
    assert {task for task, _ in pairs[:6]} == {1, 2}


def test_workers_change_nothing(written: Path):
    for ours, theirs in zip(
        batches(imagenet_c(written, batch_size=4), 0),
        batches(imagenet_c(written, batch_size=4, workers=2), 0),
        strict=True,
    ):
        assert ours["name"] == theirs["name"]
        assert torch.equal(ours["image"], theirs["image"])


def test_processes_take_different_images_only_when_asked(written: Path, monkeypatch):
    data = imagenet_c(written, batch_size=2)
    shares, whole = [], []
    for rank in (0, 1):
        monkeypatch.setattr(classification_data, "place_of_process", lambda rank=rank: (rank, 2))
        shares.append(batches(data, 0, share="images"))
        whole.append(names(batches(data, 0)))
    assert whole[0] == whole[1]
    assert [len(batch["name"]) for batch in shares[0]] == [2, 1]
    assert [len(batch["name"]) for batch in shares[1]] == [2, 1]
    assert sorted(names(shares[0]) + names(shares[1])) == sorted(whole[0])
    assert names(shares[0])[:2] == whole[0][:2], "a step's images stand side by side"


def test_more_processes_than_images_are_refused(written: Path, monkeypatch):
    monkeypatch.setattr(classification_data, "place_of_process", lambda: (0, 8))
    with pytest.raises(DataError, match=r"6 images cannot be shared by 8 processes"):
        batches(imagenet_c(written), 0, share="images")


def test_a_zip_file_is_read_without_unpacking(written: Path, tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        for file in written.rglob("*.JPEG"):
            archive.write(file, file.relative_to(written))
    data = imagenet_c(tmp_path / "c.zip")
    assert names(batches(data, 0)) == names(batches(imagenet_c(written), 0))


def test_clean_images_are_one_task_whose_guide_sees_more_pixels(tmp_path: Path):
    write_classes(tmp_path / "val", side=300)
    data = classification("imagenet", data_root=str(tmp_path))
    assert [task.name for task in data.tasks] == ["01_clean_0"]
    (batch,) = batches(data, 0)
    assert batch["image"].shape == (6, 3, 224, 224)
    assert batch["original"].shape == (6, 3, 256, 256)


def test_imagenet_can_be_corrupted_while_it_is_read(tmp_path: Path):
    write_classes(tmp_path / "val", side=300)
    keys = {"data_root": str(tmp_path), "severities": [5], "view__guide_size": None}
    clean = classification("imagenet", data_root=str(tmp_path))
    data = classification("imagenet", on_the_fly=True, corruptions=["contrast"], **keys)
    (before,), (after,) = batches(clean, 0), batches(data, 0)
    assert before["name"] == after["name"]
    seed = corruption_seed(after["name"][0], "contrast", 5)
    expected = corrupt(before["image"][0].permute(1, 2, 0).numpy(), "contrast", 5, seed)
    np.testing.assert_array_equal(after["image"][0].permute(1, 2, 0), expected)
    assert after["original"] is after["image"]


def test_the_digits_are_corrupted_while_they_are_read():
    corruptions = ["gaussian_noise", "fog", "pixelate"]
    data = classification("digits_c", corruptions=corruptions, batch_size=4)
    assert len(data.dataset(data.tasks[0])) == 597
    digits = Digits(split="test", size=32)
    clean = {digits.name(index): digits[index] for index in range(len(digits))}
    for index, corruption in enumerate(corruptions):
        (batch,) = batches(data, index, limit=4)
        for name, image, label in zip(batch["name"], batch["image"], batch["label"], strict=True):
            assert int(label) == clean[name].label
            seed = corruption_seed(name, corruption, 5)
            expected = corrupt(clean[name].image, corruption, 5, seed)
            np.testing.assert_array_equal(image.permute(1, 2, 0), expected)


def test_the_digits_can_be_read_clean():
    data = classification("digits_c", corruptions=["clean"], severities=[0])
    image = batches(data, 0, limit=1)[0]["image"]
    assert image.max() > 200
    assert torch.equal(image[:, 0], image[:, 2])


def picture(mode: str, **options: Any) -> bytes:
    """A ramp of `mode` as a JPEG."""
    ramp = np.tile(np.arange(SIDE, dtype=np.uint8), (SIDE, 1))
    buffer = io.BytesIO()
    Image.fromarray(np.stack([ramp] * 3, axis=-1)).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_files_become_rgb_as_pillow_converts_them(own: Path, mode: str):
    data = imagenet_c(own, corruptions=["fog"])
    name = names(batches(data, 0))[0]
    file = own / "fog" / "5" / f"{name}.JPEG"
    file.write_bytes(picture(mode))
    image = batches(data, 0)[0]["image"][0]
    with Image.open(file) as opened:
        assert opened.mode == mode
        expected = np.array(opened.convert("RGB"))
    np.testing.assert_array_equal(image.permute(1, 2, 0), expected)


def test_the_cameras_rotation_is_not_applied(own: Path):
    """As in the loaders that published numbers come from."""
    data = imagenet_c(own, corruptions=["fog"])
    file = own / "fog" / "5" / f"{names(batches(data, 0))[0]}.JPEG"
    exif = Image.Exif()
    exif[0x0112] = 3
    file.write_bytes(picture("RGB", exif=exif))
    image = batches(data, 0)[0]["image"][0]
    assert image[0, 0, 0] < image[0, 0, -1]


@pytest.mark.parametrize(
    "damaged", [b"", b"no image", picture("RGB")[:2000], b"\x89PNG\r\n\x1a\n" + bytes(40)]
)
def test_an_unreadable_file_is_named(own: Path, damaged: bytes):
    data = imagenet_c(own, corruptions=["fog"])
    file = own / "fog" / "5" / WNIDS[1] / "ILSVRC2012_val_00000002.JPEG"
    file.write_bytes(damaged)
    with pytest.raises(DataError, match=rf"{file} \({len(damaged)} bytes\) cannot be") as caught:
        batches(data, 0)
    assert "object at 0x" not in str(caught.value)


def test_a_file_of_16_bits_is_refused(own: Path):
    file = own / "fog" / "5" / WNIDS[1] / "ILSVRC2012_val_00000002.JPEG"
    Image.fromarray(np.zeros((SIDE, SIDE), np.uint16)).save(file, "PNG")
    data = imagenet_c(own, corruptions=["fog"])
    with pytest.raises(DataError, match=r"has the mode I;16.*to 8 bit"):
        batches(data, 0)


def test_a_miniatures_classes_keep_their_words(written: Path):
    classes = imagenet_c(written).classes
    assert classes.names == WNIDS
    assert classes.prompts == ("tench", "goldfish", "chain")


def test_imagenets_classes_are_its_1000_wnids_in_order():
    classes = read_classes("imagenet")
    assert len(classes) == len(set(classes.prompts)) == 1000
    assert list(classes.names) == sorted(classes.names)
    assert (classes.names[0], classes.prompts[0]) == ("n01440764", "tench")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, r"data\.batch_size=0"),
        ({"corruptions": ["fogg"]}, "did you mean fog"),
        ({"severities": [6]}, "Severity 6"),
        ({"severities": [0]}, r"severity 0 is that of data\.corruptions=\[clean\]"),
        ({"on_the_fly": False}, r"digits are clean.*data\.on_the_fly=true"),
        ({"num_classes": 9}, r"num_classes=9, but .* 10 classes"),
    ],
)
def test_what_cannot_work_is_refused_at_once(changes: dict[str, Any], message: str):
    with pytest.raises(SegmillError, match=message):
        classification("digits_c", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"on_the_fly": True}, "corrupted already"),
        ({"source__images": "fog/5"}, "gives every corruption the same images"),
        ({"view__crop_pct": 1.5}, r"data\.view\.crop_pct=1\.5"),
    ],
)
def test_a_layout_that_cannot_be_meant_is_refused(written: Path, changes, message):
    with pytest.raises(SegmillError, match=message):
        imagenet_c(written, **changes)


def test_a_clean_view_for_the_guide_of_corrupted_images_is_refused(tmp_path: Path):
    write_classes(tmp_path / "val")
    keys = {"data_root": str(tmp_path), "corruptions": ["fog"], "severities": [5]}
    with pytest.raises(DataError, match=r"give the guide a clean one"):
        classification("imagenet", on_the_fly=True, **keys)


def test_a_limit_below_one_is_refused(written: Path):
    with pytest.raises(DataError, match="limit=0"):
        batches(imagenet_c(written), 0, limit=0)


def test_a_protocol_that_resizes_is_refused(written: Path):
    data = imagenet_c(written)
    for protocol in (replace(PROTOCOL, scale=(64, 64)), replace(PROTOCOL, flip=True)):
        with pytest.raises(DataError, match=r"data\.view alone\. Set protocol=whole"):
            classification_data._require_images_as_they_are(protocol)
    assert data.protocol == PROTOCOL

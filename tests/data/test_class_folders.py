"""Miniatures of ImageNet and ImageNet-C whose folders are not as they should be."""

import shutil
from pathlib import Path

import pytest
import torch
from tiny_classes import (
    WNIDS,
    batches,
    classification,
    imagenet_c,
    names,
    write_classes,
)

from segmill.data.files import DataError


@pytest.mark.parametrize("suffix", [".jpeg", ".jpg", ".JPG", ".png"])
def test_a_folder_may_write_its_suffix_in_another_way(own: Path, suffix: str):
    before = batches(imagenet_c(own), 1)
    for file in (own / "snow").rglob("*.JPEG"):
        file.rename(file.with_suffix(suffix))
    after = batches(imagenet_c(own), 1)
    assert names(after) == names(before)
    assert torch.equal(after[0]["label"], before[0]["label"])


def test_other_files_are_no_images(own: Path):
    expected = names(batches(imagenet_c(own), 0))
    for path in ("README.md", "fog/5/list.txt", f"fog/5/{WNIDS[0]}/Thumbs.db"):
        (own / path).write_text("no image")
    for path in ("fog/5/.DS_Store", f"fog/5/{WNIDS[0]}/._ILSVRC2012_val_00000000.JPEG"):
        (own / path).write_text("no image")
    assert names(batches(imagenet_c(own), 0)) == expected


def test_an_absent_root_says_what_belongs_there(tmp_path: Path):
    root = tmp_path / "nowhere"
    with pytest.raises(DataError) as caught:
        imagenet_c(root)
    text = str(caught.value)
    assert f"There is no folder {root} (wanted: {root}/fog/5/CLASS/*.JPEG)" in text
    assert "Set data.data_root" in text
    assert "zenodo.org/records/2235448" in text
    assert "\n" not in text


def test_a_root_one_folder_off_is_corrected(written: Path):
    inside = written / "fog" / "5"
    for root in (written / "fog", inside, inside / WNIDS[0], written.parent):
        with pytest.raises(
            DataError, match=rf"It is in {written}: set data\.data_root={written}\."
        ):
            imagenet_c(root)


def test_the_root_of_another_data_set_is_refused_with_what_it_holds(tmp_path: Path):
    write_classes(tmp_path / "val")
    with pytest.raises(DataError, match=r"fog/5 does not exist .*, which holds val\)"):
        imagenet_c(tmp_path)
    with pytest.raises(DataError, match=rf"set data\.data_root={tmp_path}\."):
        classification("imagenet", data_root=str(tmp_path / "val"))


def test_images_outside_of_class_folders_are_refused(own: Path, tmp_path: Path):
    flat = tmp_path / "flat"
    for file in (own / "fog" / "5").rglob("*.JPEG"):
        (flat / "val").mkdir(parents=True, exist_ok=True)
        shutil.copy(file, flat / "val" / file.name)
    with pytest.raises(DataError, match=r"val_\d+\.JPEG: .* no class folder\. Sort the images"):
        classification("imagenet", data_root=str(flat))
    shutil.move(own / "fog" / "5", own / "inner")
    shutil.move(own / "inner", own / "fog" / "5" / "validation")
    with pytest.raises(DataError, match=r"validation/n01440764/.* one folder too deep"):
        imagenet_c(own)


def test_a_corruption_or_severity_that_is_absent_is_named_beside_what_is_there(own: Path):
    with pytest.raises(DataError) as caught:
        imagenet_c(own, corruptions=["fog", "frost", "snow", "contrast"])
    text = str(caught.value)
    assert f"The folder {own}/frost/5 does not exist" in text
    assert "has 2 of the 4 folders of this run and lacks contrast/5, frost/5." in text
    assert "leave it out (data.corruptions, data.severities)" in text
    for chosen in (["snoww"], ["fog", "snoww"]):
        with pytest.raises(DataError, match=r"snoww/5 does not exist .*Did you mean snow\?"):
            imagenet_c(own, corruptions=chosen)
    with pytest.raises(DataError, match=rf"{own}/fog holds 5: choose among what is there"):
        imagenet_c(own, severities=[4])


def test_a_folder_of_other_files_is_said_to_have_no_images(own: Path):
    for file in (own / "fog").rglob("*.JPEG"):
        file.rename(file.with_suffix(".webp"))
    with pytest.raises(DataError, match=rf"{own}/fog/5 has no images .*\.jpg or \.png"):
        imagenet_c(own)


def test_an_archive_that_cannot_be_read_in_place_is_to_be_unpacked(tmp_path: Path):
    archive = tmp_path / "weather.tar"
    archive.write_bytes(b"")
    with pytest.raises(DataError, match=r"weather\.tar is a file, .* Unpack it"):
        imagenet_c(archive)


def test_a_root_below_the_current_folder_is_said_to_be_so(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"no folder data/imagenet-c, seen from {tmp_path} "):
        imagenet_c(Path("data/imagenet-c"))


def test_a_class_that_one_corruption_lacks_is_named(own: Path):
    shutil.rmtree(own / "snow" / "5" / WNIDS[1])
    with pytest.raises(
        DataError, match=rf"snow/5 are not the 3 expected .* lacks 1 \({WNIDS[1]}\)"
    ):
        imagenet_c(own)
    with pytest.raises(DataError, match=rf"fog/5 .* it has besides 1 \({WNIDS[1]}\)"):
        imagenet_c(own, corruptions=["snow", "fog"], num_classes=2)


def test_missing_wnids_of_the_whole_imagenet_are_named(own: Path):
    with pytest.raises(DataError, match=r"lacks 997 \(n01484850, n01491361, .* and 992 more\)"):
        imagenet_c(own, num_classes=1000)


def test_another_number_of_classes_than_asked_for_is_refused(written: Path):
    with pytest.raises(DataError, match=r"num_classes=5, but .* 3 classes.*num_classes=3"):
        imagenet_c(written, num_classes=5)


def test_an_image_that_one_task_lacks_is_named(own: Path):
    (own / "snow" / "5" / WNIDS[1] / "ILSVRC2012_val_00000002.JPEG").unlink()
    with pytest.raises(
        DataError, match=r"02_snow_5 lacks 1 of 6 .* n01443537/\w+2, which 01_fog_5 has"
    ):
        imagenet_c(own)

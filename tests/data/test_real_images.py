"""Facts of the real data sets; skipped where they are not at hand."""

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from tiny_folder import CLASSES

from segmill.configuration import build, compose
from segmill.data.check import check_dataset
from segmill.data.classes import Classes, read_classes
from segmill.data.folder import DataError, FolderDataset

# Shares of README.md beside the files, classes 0-10 and unlabelled.
CAMVID_TRAIN = """
    .1685 .2326 .0098 .3166 .0449 .0972 .0117 .0113 .0587 .0064 .0029 .0395
"""


def camvid(root: Path, split: str) -> FolderDataset:
    return FolderDataset(
        data_root=root / "camvid",
        image="images/{split}/{name}.jpg",
        label="masks/{split}/{name}.png",
        depth=None,
        depth_range=None,
        splits={name: {"list": f"{name}.txt"} for name in ("train", "val", "test")},
        split=split,
        label_map={"0-10": "0-10", 11: "ignore"},
        label_format="index",
        classes=read_classes("camvid"),
    )


@pytest.mark.parametrize(("split", "count"), [("train", 367), ("val", 101), ("test", 233)])
def test_camvid_has_its_images(real_data: Path, split: str, count: int):
    assert len(camvid(real_data, split)) == count


def test_camvid_training_labels_have_the_published_shares(real_data: Path):
    dataset = camvid(real_data, "train")
    counts = np.zeros(256, np.int64)
    for index in range(len(dataset)):
        counts += np.bincount(dataset.read_label(index).ravel(), minlength=256)
    shares = counts[[*range(11), 255]] / counts.sum()
    published = [float(share) for share in CAMVID_TRAIN.split()]
    np.testing.assert_allclose(shares, published, atol=5e-5)  # rounded to four decimals
    assert counts.sum() == 367 * 480 * 360


def test_camvid_mean_colour_is_rgb(real_data: Path):
    dataset = camvid(real_data, "train")
    means = [dataset.read_image(index).mean((0, 1)) for index in range(0, len(dataset), 20)]
    # The README's mean of all 367; every 20th image comes within 1 level, BGR would be 5 apart.
    np.testing.assert_allclose(np.mean(means, axis=0), [105.03, 108.41, 110.33], atol=1.5)


def test_ade20k_samples_read_whole_and_shifted(real_data: Path):
    dataset = FolderDataset(
        data_root=real_data / "samples/ade20k",
        image="images/{name}.jpg",
        label="annotations/{name}.png",
        depth=None,
        depth_range=None,
        splits={"val": {}},
        split="val",
        label_map={0: "ignore", "1-150": "0-149"},
        label_format="index",
        classes=read_classes("ade20k"),
    )
    report = check_dataset(dataset)
    assert report.problems == []
    assert report.samples == 3
    assert report.ignored > 0
    present = [dataset.classes.names[k] for k in np.flatnonzero(report.pixels)]
    assert {"sky", "building", "wall"} & set(present)


def nyu(root: Path, **changes) -> FolderDataset:
    keys = {
        "data_root": root,
        "image": "{name}/rgb.png",
        "label": "{name}/label13.png",
        "depth": "{name}/depth_mm_raw.png",
        "depth_range": (0.0, 10000.0),
        "splits": {"all": {"list": "all.txt"}},
        "split": "all",
        "label_map": {0: "ignore", "1-13": "0-12"},
        "label_format": "index",
    }
    names = tuple(f"class {k}" for k in range(13))
    classes = Classes(names, np.zeros((13, 3), np.uint8), names)
    return FolderDataset(**{**keys, **changes}, classes=classes)


def test_nyu_depth_is_a_channel_and_its_holes_are_counted(real_data: Path, tmp_path: Path):
    shutil.copytree(real_data / "samples/rgbd_nyuv2_1407", tmp_path / "1407")
    (tmp_path / "all.txt").write_text("1407\n")
    dataset = nyu(tmp_path)
    assert dataset[0].image.shape == (425, 560, 4)
    report = check_dataset(dataset)
    assert report.problems == []
    assert report.depth_range is not None
    assert 400 < report.depth_range[0] < report.depth_range[1] < 10000  # mm, an indoor scene
    assert report.depth_zero is not None
    assert 0 < report.depth_zero < 0.5
    holes = dataset.read_depth(0) == 0
    assert not dataset[0].image[..., 3][holes].any()


def test_nyus_holes_are_the_share_of_the_raw_depth_and_inpainting_fills_them(
    real_data: Path, tmp_path: Path
):
    shutil.copytree(real_data / "samples/rgbd_nyuv2_1407", tmp_path / "1407")
    (tmp_path / "all.txt").write_text("1407\n")
    raw, inpainted = (
        nyu(tmp_path, depth=f"{{name}}/depth_mm_{kind}.png") for kind in ("raw", "inpainted")
    )
    reports = [check_dataset(dataset) for dataset in (raw, inpainted)]
    assert [report.problems for report in reports] == [[], []]
    # Counted in the file: 0 in 39646 of its 560 x 425 pixels.
    assert reports[0].depth_zero == pytest.approx(39646 / (560 * 425), abs=1e-12)
    assert reports[0].depth_range == (1925, 9625)
    assert reports[1].depth_zero == 0.0
    assert reports[1].depth_range == (1923, 9484)


def test_a_tiny_dformer_takes_nyus_depth_in_dformers_layout(real_data: Path, tmp_path: Path):
    """As DFormer has it: 8 bits from nearest to farthest, beside the colour image."""
    sample = real_data / "samples/rgbd_nyuv2_1407"
    millimetres = cv2.imread(str(sample / "depth_mm_inpainted.png"), cv2.IMREAD_UNCHANGED)
    assert millimetres is not None
    nearest, farthest = int(millimetres.min()), int(millimetres.max())
    depth = np.rint((millimetres.astype(float) - nearest) * 255 / (farthest - nearest))
    for folder in ("RGB", "Depth", "Label"):
        (tmp_path / folder).mkdir()
    colour = cv2.imread(str(sample / "rgb.png"))
    assert colour is not None
    cv2.imwrite(str(tmp_path / "RGB/1407.jpg"), colour)
    cv2.imwrite(str(tmp_path / "Depth/1407.png"), depth.astype(np.uint8))
    shutil.copy(sample / "label13.png", tmp_path / "Label/1407.png")
    (tmp_path / "test.txt").write_text("RGB/1407.jpg\n")
    config = compose("train", ["model=dformer-tiny", "data=nyu_depth_v2"])
    keys = config.data
    dataset = FolderDataset(
        data_root=tmp_path,
        **{key: keys[key] for key in ("image", "label", "depth", "depth_range", "label_format")},
        splits={"test": {"list": "test.txt"}},
        split="test",
        label_map={0: "ignore", "1-40": "0-39"},
        classes=read_classes("nyu_depth_v2"),
    )
    report = check_dataset(dataset)
    assert report.problems == []
    assert report.depth_range == (0, 255)
    assert report.depth_zero is not None
    assert 0 < report.depth_zero < 0.01
    backbone = config.model.network.backbone
    backbone.widths, backbone.depths = [16, 32, 32, 64], [1, 1, 1, 1]
    config.model.network.decode_head.update(ham_channels=32, channels=32, rank=8)
    model = build(config.model).eval()
    channels = torch.from_numpy(dataset[0].image[:192, :256]).permute(2, 0, 1)[None]
    with torch.no_grad():
        torch.manual_seed(0)
        logits = model(channels)
        torch.manual_seed(0)
        flat = model(channels * torch.tensor([1, 1, 1, 0], dtype=torch.uint8).view(1, 4, 1, 1))
    assert logits.shape == (1, 40, 24, 32)
    assert logits.isfinite().all()
    assert not torch.equal(logits, flat)


def test_nyu_without_a_depth_range_says_what_to_set(real_data: Path, tmp_path: Path):
    shutil.copytree(real_data / "samples/rgbd_nyuv2_1407", tmp_path / "1407")
    (tmp_path / "all.txt").write_text("1407\n")
    with pytest.raises(DataError, match=r"data\.depth_range is null"):
        nyu(tmp_path, depth_range=None)[0]


def test_instance_ids_given_as_labels_are_refused(real_data: Path):
    dataset = FolderDataset(
        data_root=real_data / "samples/cityscapes_mmseg_256x128",
        image="leftImg8bit/{split}/{name}_leftImg8bit.png",
        label="gtFine/{split}/{name}_gtFine_instanceIds.png",
        depth=None,
        depth_range=None,
        splits={"val": {}},
        split="val",
        label_map={"0-2": "0-2"},
        label_format="index",
        classes=CLASSES,
    )
    with pytest.raises(DataError, match=r"_gtFine_instanceIds\.png is 16-bit"):
        dataset[0]

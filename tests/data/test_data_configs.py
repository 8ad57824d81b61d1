"""Every file of configs/data reads the layout that its data set really has."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image
from tiny_folder import write_image

from segmill.configuration import build
from segmill.data.datamodule import SegmentationData
from segmill.data.labels import LabelMap
from segmill.options import fitting
from segmill.paths import CONFIGS
from segmill.protocol import Protocol

# Those of classification are test_classification_data's and test_image_datamodule's matter.
NAMES = sorted(
    name
    for name in fitting("data_check", "data")
    if "splits" in OmegaConf.load(CONFIGS / "data" / f"{name}.yaml")
)
FROM_THE_COMMAND = {"protocol", "seed", "accumulate", "start_step"}
HEIGHT, WIDTH = 48, 64


def read_keys(name: str, **changes: Any) -> dict[str, Any]:
    config = OmegaConf.create({"data": OmegaConf.load(CONFIGS / "data" / f"{name}.yaml")})
    config.data.merge_with(changes)
    keys: Any = OmegaConf.to_container(config.data, resolve=True)
    assert isinstance(keys, dict)
    return keys


def write_layout(root: Path, keys: dict[str, Any]) -> None:
    """Two samples a split, whose labels hold every value of the map."""
    table = LabelMap(keys["label_map"], num_classes=keys["num_classes"]).table
    values = np.flatnonzero(table != 254)
    label = np.resize(values, (HEIGHT // 4, WIDTH // 4)).repeat(4, 0).repeat(4, 1).astype(np.uint8)
    for split, entry in keys["splits"].items():
        names = [f"{split}/one_1", f"{split}/two_2"]
        if "list" in entry:
            (root / entry["list"]).parent.mkdir(parents=True, exist_ok=True)
            (root / entry["list"]).write_text("\n".join(names))
        for name in names:
            folder = entry.get("folder", split)
            image, target = (
                root / keys[kind].replace("{split}", folder).replace("{name}", name)
                for kind in ("image", "label")
            )
            write_image(image, HEIGHT, WIDTH)
            picture = Image.fromarray(label)
            if keys["label_format"] == "palette":
                picture.putpalette(list(range(256)) * 3)
            target.parent.mkdir(parents=True, exist_ok=True)
            picture.save(target)
            if keys["depth"] is not None:
                write_depth(root / keys["depth"].replace("{split}", folder).replace("{name}", name))


def write_depth(path: Path) -> None:
    """8 bits, farther from left to right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    row = np.linspace(0, 255, WIDTH).astype(np.uint8)
    Image.fromarray(np.tile(row, (HEIGHT, 1))).save(path)


@pytest.fixture(params=NAMES)
def data(request: pytest.FixtureRequest, tmp_path: Path) -> SegmentationData:
    changes = {"data_root": str(tmp_path), "workers": 0, "batch_size": 2}
    keys = read_keys(request.param, **changes)
    if keys["generate"] is None:
        write_layout(tmp_path, keys)
    else:
        keys["generate"] |= {"train": 2, "val": 1, "test": 1}
    return build_data(keys)


def build_data(keys: dict[str, Any]) -> SegmentationData:
    """Evaluated in one piece."""
    protocol = Protocol(
        name="whole",
        scale=keys["test_scale"],
        multiple=None,
        mode="whole",
        window=None,
        stride=None,
        ratios=(1.0,),
        flip=False,
        pad_divisor=None,
        align_corners=False,
        ignore_index=255,
    )
    return build(keys, protocol=protocol, seed=0, accumulate=1, start_step=0)


def test_it_trains_and_evaluates(data: SegmentationData):
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (2, data.channels, *data.crop)
    assert batch["label"].shape == (2, *data.crop)
    used = set(batch["label"].unique().tolist())
    assert used <= {*range(len(data.classes)), 255}
    for loader in (data.val_dataloader(), data.test_dataloader()):
        item = next(iter(loader))
        assert item["inputs"][0].shape[:2] == (1, data.channels)
        assert tuple(item["label"].shape[1:]) == item["size"]


def test_every_class_is_reached(data: SegmentationData):
    table = data.dataset(data.train_split).label_map.table
    assert set(range(len(data.classes))) <= set(table.tolist())


@pytest.mark.parametrize("name", ["nyu_depth_v2", "sunrgbd"])
def test_the_official_split_files_work_as_they_are(name: str, tmp_path: Path):
    keys = read_keys(name, data_root=str(tmp_path))
    write_layout(tmp_path, keys)
    for split in ("train", "test"):
        lines = [f"RGB/{split}/{each}.jpg" for each in ("two_2", "one_1")]
        (tmp_path / f"{split}.txt").write_text("\n".join(lines) + "\n")
    dataset = build_data(keys).dataset("test")
    assert [dataset.name(index) for index in range(2)] == ["test/two_2", "test/one_1"]
    sample = dataset[0]
    assert sample.image[0, [0, -1], 3].tolist() == [0, 255]
    assert sample.label is not None
    # 0 of the files, unlabelled, comes first; class 0 is their 1.
    assert sample.label[0, :8:4].tolist() == [255, 0]


@pytest.mark.parametrize("name", NAMES)
def test_it_has_all_keys_and_says_what_it_is(name: str):
    wanted = set(inspect.signature(SegmentationData).parameters) - FROM_THE_COMMAND
    assert set(read_keys(name)) == wanted | {"_target_"}
    text = (CONFIGS / "data" / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    assert name == "scenes" or "oc.env:SEGMILL_DATA" in text


def test_cityscapes_ids_equal_the_official_train_ids(real_data: Path):
    folder = real_data / "samples/cityscapes_mmseg_256x128/gtFine/val/frankfurt"
    stem = folder / "frankfurt_000000_000294_gtFine"
    ids = np.asarray(Image.open(f"{stem}_labelIds.png"))
    train_ids = np.asarray(Image.open(f"{stem}_labelTrainIds.png"))
    mapped = LabelMap(read_keys("cityscapes")["label_map"], num_classes=19)(ids, "x.png")
    # The two files were made small one by one: 0.2 % of the pixels, at edges, disagree.
    assert (mapped != train_ids).mean() < 0.003
    for value in np.unique(ids):
        partners = np.bincount(train_ids[ids == value], minlength=256)
        assert mapped[ids == value][0] == partners.argmax()

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from segmill.data.corruptions import CORRUPTIONS, corrupt, corruption_seed
from segmill.data.files import DataError
from segmill.data.labels import LabelMap
from segmill.data.scenes import write_scenes
from segmill.data.task_data import TaskData
from segmill.errors import SegmillError
from segmill.options import fitting
from segmill.paths import CONFIGS
from tiny_tasks import HEIGHT, NAMES, PROTOCOL, WIDTH, task_data, write_ade20k, write_picture
from tiny_tasks import write_values as write_label

ROOMS = {"train": 1, "val": 1, "test": 4, "height": 32, "width": 48}


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rooms") / "scenes"
    write_scenes(root, **ROOMS, seed=0)
    return root


def scenes(root: Path, **keys: Any) -> TaskData:
    settings = {"corruptions": ["contrast", "gaussian_noise"], "severities": [5]}
    return task_data("scenes_c", data_root=str(root), generate=ROOMS, **{**settings, **keys})


def items(data: TaskData, *which: int, limit: int | None = None) -> list[dict[str, Any]]:
    return list(data.loader([data.tasks[index] for index in which], limit=limit))


def names(found: list[dict[str, Any]]) -> list[str]:
    return [item["name"] for item in found]


def test_an_item_is_the_corrupted_image_under_the_protocol_and_as_it_is(rooms: Path):
    protocol = replace(PROTOCOL, scale=(24, 16))
    data = scenes(rooms, protocol=protocol)
    item = items(data, 1)[0]
    assert item["image"].shape == (1, 3, 16, 24)
    assert item["original"].shape == (1, 3, 32, 48)
    assert item["label"].shape == (1, 32, 48)
    assert {item[key].dtype for key in ("image", "original", "label")} == {torch.uint8}
    assert item["size"] == (32, 48)
    assert item["task"] == 2
    clean = data._folders.clean(data.tasks[1])
    index = [clean.name(each) for each in range(len(clean))].index(item["name"])
    seed = corruption_seed(item["name"], "gaussian_noise", 5)
    expected = corrupt(clean.read_image(index), "gaussian_noise", 5, seed)
    np.testing.assert_array_equal(item["original"][0].permute(1, 2, 0), expected)
    np.testing.assert_array_equal(item["label"][0], clean.read_label(index))


def test_at_native_size_the_image_is_the_original(rooms: Path):
    for item in items(scenes(rooms), 0):
        assert torch.equal(item["image"], item["original"])


def test_depth_is_not_corrupted(rooms: Path):
    data = scenes(rooms, channels=4)
    item = items(data, 1)[0]
    clean = data._folders.clean(data.tasks[1])
    sample = next(each for each in map(clean.__getitem__, range(4)) if each.name == item["name"])
    np.testing.assert_array_equal(item["original"][0, 3], sample.image[..., 3])
    assert (item["original"][0, 0].numpy() != sample.image[..., 0]).any()


def test_every_task_has_the_same_shuffled_order(rooms: Path):
    data = scenes(rooms)
    first = names(items(data, 0))
    assert first == names(items(data, 1)) == names(items(scenes(rooms), 0))
    assert first != sorted(first)
    assert sorted(first) == sorted(data.dataset(data.tasks[0]).name(each) for each in range(4))
    assert first[:2] == names(items(data, 0, limit=2))


def test_the_order_follows_the_seed_and_so_does_its_hash(rooms: Path):
    one, same, other = (scenes(rooms, seed=seed) for seed in (0, 0, 1))
    assert one.order_hash() == same.order_hash()
    assert len(one.order_hash()) == 12
    assert names(items(one, 0)) != names(items(other, 0))
    assert one.order_hash() != other.order_hash()
    assert one.order_hash() != scenes(rooms, corruptions=["contrast"]).order_hash()


def test_several_tasks_are_mixed_into_one_stream(rooms: Path):
    data = scenes(rooms)
    mixed = items(data, 0, 1)
    pairs = [(item["task"], item["name"]) for item in mixed]
    single = [(item["task"], item["name"]) for which in (0, 1) for item in items(data, which)]
    assert sorted(pairs) == sorted(single)
    assert pairs != single
    assert len({task for task, _ in pairs[:4]}) == 2


def test_a_limit_takes_the_same_images_of_every_task_when_they_are_mixed(rooms: Path):
    data = scenes(rooms)
    mixed = {(item["task"], item["name"]) for item in items(data, 0, 1, limit=2)}
    first = names(items(data, 0, limit=2))
    assert mixed == {(task, name) for task in (1, 2) for name in first}


def test_workers_change_nothing(rooms: Path):
    for ours, theirs in zip(
        items(scenes(rooms), 0, 1), items(scenes(rooms, workers=2), 0, 1), strict=True
    ):
        assert ours["name"] == theirs["name"]
        assert torch.equal(ours["image"], theirs["image"])


def test_clean_images_are_listed_once_for_all_tasks(rooms: Path):
    data = scenes(rooms)
    first, second = (data._folders.clean(task) for task in data.tasks)
    assert first is second


def test_generated_images_are_written_only_where_they_are_read(tmp_path: Path):
    assert len(items(scenes(tmp_path / "rooms"), 0)) == 4
    with pytest.raises(DataError, match="there is no folder"):
        scenes(tmp_path / "other", on_the_fly=False)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 2}, r"data\.batch_size=2.*Set data\.batch_size=1"),
        ({"protocol": replace(PROTOCOL, name="ms", flip=True)}, "protocol=ms .*protocol=whole"),
        (
            {"protocol": replace(PROTOCOL, name="slide", mode="slide", window=(8, 8))},
            "protocol=slide slides.*Set protocol=whole",
        ),
        ({"corruptions": ["gausian_noise"]}, "did you mean gaussian_noise"),
        ({"severities": [6]}, "Severity 6"),
        ({"label": None}, r"data\.label is null"),
        ({"num_classes": 9}, r"data\.num_classes=9"),
        ({"frost_dir": "/nowhere", "corruptions": ["frost"]}, "frost folder /nowhere lacks"),
        ({"split": "vla"}, "'vla' is not one of data.splits"),
        ({"image": None}, r"data=scenes_c has no clean images"),
        ({"on_the_fly": False, "corrupted": None}, r"data\.corrupted is None.*on_the_fly=true"),
    ],
)
def test_what_cannot_work_is_refused_at_once(rooms: Path, changes: dict[str, Any], message: str):
    with pytest.raises(SegmillError, match=message):
        scenes(rooms, **changes)


def test_a_limit_below_one_is_refused(rooms: Path):
    data = scenes(rooms)
    with pytest.raises(SegmillError, match="limit=0"):
        data.loader(data.tasks, limit=0)


def written_ade20k(root: Path, *corruptions: str) -> Path:
    write_ade20k(root)
    for corruption in corruptions:
        for seed, name in enumerate(NAMES):
            folder = root / "ADE20K_val-c" / corruption / "5" / "validation"
            write_picture(folder / f"{name}.jpg", seed)
    return root


def test_ade20k_c_is_read_in_its_published_layout(tmp_path: Path):
    written_ade20k(tmp_path, "fog", "snow")
    data = task_data("ade20k_c", data_root=str(tmp_path), corruptions=["fog", "snow"])
    found = items(data, 0, 1)
    assert len(found) == 6
    assert {item["name"] for item in found} == set(NAMES)
    assert set(found[0]["label"].unique().tolist()) == {0, 149, 255}
    assert data.num_classes == len(data.classes) == 150


def test_ade20k_c_can_be_made_while_it_is_read(tmp_path: Path):
    write_ade20k(tmp_path)
    data = task_data("ade20k_c", data_root=str(tmp_path), corruptions=["contrast"], on_the_fly=True)
    assert set(names(items(data, 0))) == set(NAMES)


def test_an_absent_root_is_said_with_the_folder_and_the_remedy(tmp_path: Path):
    root = tmp_path / "nowhere"
    with pytest.raises(DataError) as caught:
        task_data("ade20k_c", data_root=str(root))
    text = str(caught.value)
    assert f"{root}/ADE20K_val-c/gaussian_noise/5/validation)" in text
    assert "segmill corrupt data=ade20k_c data.data_root=CLEAN out=DIR" in text
    assert "github.com/BIT-DA/DUSA" in text
    assert "Set data.data_root (now" in text
    assert "\n" not in text


def test_an_absent_task_is_said_with_its_folder(tmp_path: Path):
    written_ade20k(tmp_path, "fog")
    with pytest.raises(DataError, match=r"02_snow_5: the folder .*/snow/5/validation does not"):
        task_data("ade20k_c", data_root=str(tmp_path), corruptions=["fog", "snow"])


def test_a_task_with_a_gap_is_refused(tmp_path: Path):
    written_ade20k(tmp_path, "fog", "snow")
    (tmp_path / "ADE20K_val-c/snow/5/validation" / f"{NAMES[1]}.jpg").unlink()
    with pytest.raises(DataError, match=rf"02_snow_5 lacks 1 of 3 images.*{NAMES[1]}\.jpg"):
        task_data("ade20k_c", data_root=str(tmp_path), corruptions=["fog", "snow"])


def test_a_pattern_without_the_severity_allows_one_severity(tmp_path: Path):
    written_ade20k(tmp_path, "fog")
    keys = {"corrupted": "ADE20K_val-c/{corruption}/5/{split}/{name}.jpg", "corruptions": ["fog"]}
    task_data("ade20k_c", data_root=str(tmp_path), severities=[1], **keys)
    with pytest.raises(DataError, match=r"every severity the same files.*2 \(1, 2\)"):
        task_data("ade20k_c", data_root=str(tmp_path), severities=[1, 2], **keys)


def layout(name: str, root: Path) -> Iterator[tuple[Path, Path, str, str]]:
    """(image, label, split, corruption) of two samples of every split, as its YAML says."""
    keys: Any = OmegaConf.load(CONFIGS / "data" / f"{name}.yaml")
    for split, entry in keys.splits.items():
        stems = [f"{split}/one_1", f"{split}/two_2"]
        if "list" in entry:
            (root / entry.list).write_text("\n".join(stems))
        for corruption in keys.corruptions:
            for stem in stems:
                values = {"{corruption}": corruption, "{severity}": str(keys.severities[0])}
                values |= {"{split}": entry.get("folder", split), "{name}": stem}
                image, label = keys.corrupted, keys.label
                for place, value in values.items():
                    image, label = image.replace(place, value), label.replace(place, value)
                yield root / image, root / label, split, corruption


@pytest.mark.parametrize("name", sorted(fitting("corrupt", "data")))
def test_every_corrupted_data_set_reads_the_layout_it_names(name: str, tmp_path: Path):
    keys: Any = OmegaConf.load(CONFIGS / "data" / f"{name}.yaml")
    table = LabelMap(keys.label_map, num_classes=keys.num_classes).table
    values = tuple(np.flatnonzero(table != 254).tolist())
    for image, label, *_ in layout(name, tmp_path):
        write_picture(image, 0)
        write_label(label, values[:: max(1, len(values) * 4 // WIDTH)])
    data = task_data(name, data_root=str(tmp_path), on_the_fly=False)
    assert [task.corruption for task in data.tasks] == list(keys.corruptions)
    found = items(data, len(data.tasks) - 1)
    assert len(found) == 2
    assert found[0]["original"].shape == (1, 3, HEIGHT, WIDTH)
    text = (CONFIGS / "data" / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert "oc.env:SEGMILL_DATA" in text
    if name != "acdc":
        assert tuple(keys.corruptions) == CORRUPTIONS[:15]


def test_scenes_c_generates_the_rooms_of_scenes():
    own, clean = (OmegaConf.load(CONFIGS / f"data/{name}.yaml") for name in ("scenes_c", "scenes"))
    assert own.generate == clean.generate


def test_acdc_has_no_clean_images_to_corrupt(tmp_path: Path):
    with pytest.raises(DataError, match=r"data=acdc has no clean images"):
        task_data("acdc", data_root=str(tmp_path), on_the_fly=True, corruptions=["fog"])

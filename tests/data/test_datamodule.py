from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_folder import folder_keys, write_label, write_samples

from segmill.data import datamodule
from segmill.data import loader as loaders
from segmill.data.datamodule import SegmentationData
from segmill.data.folder import DataError
from segmill.protocol import Protocol

PROTOCOL = Protocol(
    name="whole",
    scale=None,
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


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_samples(tmp_path, "a b c d e")
    write_samples(tmp_path, "v w x", split="val")
    (tmp_path / "c.csv").write_text("name,red,green,blue\nsky,0,0,9\nroad,9,0,0\ncar,0,9,0\n")
    return tmp_path


def make_data(root: Path, **changes: Any) -> SegmentationData:
    keys = folder_keys(root) | {
        "name": "tiny",
        "classes": str(root / "c.csv"),
        "num_classes": 3,
        "channels": 3,
        "generate": None,
        "train_split": "train",
        "val_split": "val",
        "test_split": None,
        "scale": (32, 24),
        "ratio": (0.5, 2.0),
        "crop": (32, 40),
        "cat_max_ratio": 0.9,
        "flip": 0.5,
        "photometric": True,
        "test_scale": None,
        "batch_size": 4,
        "workers": 0,
        "cache": "none",
        "protocol": PROTOCOL,
        "seed": 0,
        "accumulate": 1,
        "start_step": 0,
    }
    return SegmentationData(**(keys | changes))


def first_batches(data: SegmentationData, count: int) -> list[dict[str, Any]]:
    return list(islice(data.train_dataloader(), count))


def test_training_batches_are_contiguous_uint8_channels_first(root: Path):
    (batch,) = first_batches(make_data(root), 1)
    assert batch["image"].shape == (4, 3, 32, 40)
    assert batch["image"].is_contiguous()
    assert batch["label"].shape == (4, 32, 40)
    assert {batch["image"].dtype, batch["label"].dtype} == {torch.uint8}
    assert batch["valid"].dtype == torch.int64
    assert batch["jitter"].shape == (4, 5)
    assert len(batch["name"]) == 4
    for image, label, (_, _, height, width) in zip(
        batch["image"], batch["label"], batch["valid"], strict=True
    ):
        assert (label[:height, :width] < 3).all()
        assert (label[height:] == 255).all()
        assert not image[:, :, width:].any()


@pytest.mark.parametrize("cache", ["none", "ram"])
def test_workers_and_cache_change_nothing(root: Path, cache: str):
    plain = first_batches(make_data(root), 3)
    other = first_batches(make_data(root, workers=2, cache=cache), 3)
    for ours, theirs in zip(plain, other, strict=True):
        assert ours["name"] == theirs["name"]
        assert torch.equal(ours["image"], theirs["image"])
        assert torch.equal(ours["jitter"], theirs["jitter"])


def test_start_step_continues_the_order(root: Path):
    whole = first_batches(make_data(root, accumulate=2), 8)
    tail = first_batches(make_data(root, accumulate=2, start_step=2), 4)
    for ours, theirs in zip(whole[4:], tail, strict=True):
        assert torch.equal(ours["image"], theirs["image"])


def test_two_ranks_share_the_global_batch(root: Path, monkeypatch: pytest.MonkeyPatch):
    (whole,) = first_batches(make_data(root), 1)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(datamodule, "place_of_process", lambda rank=rank: (rank, 2))
        parts += first_batches(make_data(root), 1)
    assert [name for part in parts for name in part["name"]] == whole["name"]
    assert torch.equal(torch.cat([part["image"] for part in parts]), whole["image"])


def test_evaluation_gives_protocol_inputs_and_the_original_label(root: Path):
    data = make_data(root)
    items = list(data.val_dataloader())
    assert [item["name"] for item in items] == ["v", "w", "x"]
    item = items[0]
    assert [view.shape for view in item["inputs"]] == [(1, 3, 24, 32)]
    assert item["inputs"][0].dtype == torch.uint8
    assert item["label"].shape == (1, 24, 32)
    assert item["size"] == (24, 32)
    expected = data.dataset("val")[0]
    np.testing.assert_array_equal(item["inputs"][0][0].permute(1, 2, 0), expected.image)


def test_the_rank_of_evaluation_is_asked_when_it_starts(
    root: Path, monkeypatch: pytest.MonkeyPatch
):
    loader = make_data(root).eval_loader("val")
    monkeypatch.setattr(loaders.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(loaders.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(loaders.distributed, "get_world_size", lambda: 2)
    assert [item["name"] for item in loader] == ["w"]


def test_three_channels_leave_the_depth_of_an_rgbd_set(root: Path):
    for name in "abcde":
        write_label(root / f"depth/{name}.png", (0, 100))
    keys = {"depth": "depth/{name}.png"}
    assert first_batches(make_data(root, **keys), 1)[0]["image"].shape[1] == 3
    assert first_batches(make_data(root, **keys, channels=4), 1)[0]["image"].shape[1] == 4


def test_generate_runs_before_anything_is_read(tmp_path: Path, root: Path):
    calls = []
    make_data(root, generate=lambda: calls.append("written"))
    assert calls == ["written"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 4}, r"data\.num_classes=4, but .*c\.csv has 3 classes"),
        ({"channels": 4}, r"data\.channels=4 .*data\.depth is null"),
    ],
)
def test_contradictions_are_refused(root: Path, changes: dict[str, Any], message: str):
    with pytest.raises(DataError, match=message):
        make_data(root, **changes)


def test_indivisible_batch_is_refused_with_a_remedy(root: Path):
    with pytest.raises(DataError, match=r"data\.batch_size=4 .*multiple of 3"):
        make_data(root, accumulate=3).train_dataloader()


def test_training_without_labels_is_refused(root: Path):
    with pytest.raises(DataError, match=r"data\.label is null"):
        make_data(root, label=None).train_dataloader()


def test_absent_test_split_is_said(root: Path):
    with pytest.raises(DataError, match=r"data\.test_split is null"):
        make_data(root).test_dataloader()


def test_a_tiled_epoch_holds_every_sample_and_a_remainder_of_its_own(root: Path):
    # 5 samples in batches of 4: two batches an epoch, three samples twice.
    data = make_data(root, batch_size=4, tiled_epochs=True)
    stream = data.stream()
    epochs = [sorted(stream.index(8 * epoch + place) for place in range(8)) for epoch in range(3)]
    for epoch in epochs:
        assert set(epoch) == set(range(5))
        assert sorted(epoch.count(sample) for sample in range(5)) == [1, 1, 2, 2, 2]
    assert len(set(map(tuple, epochs))) > 1
    orders = [[stream.index(8 * epoch + place) for place in range(8)] for epoch in range(3)]
    assert orders[0] != orders[1]


def test_keys_that_a_transform_replaces_must_be_null(root: Path):
    with pytest.raises(DataError, match=r"data.transform .* data.scale=.* would have no effect"):
        make_data(root, transform=lambda sample, _rng: sample)


def test_without_a_transform_the_pipelines_keys_are_needed(root: Path):
    with pytest.raises(DataError, match=r"data.flip is null"):
        make_data(root, flip=None)

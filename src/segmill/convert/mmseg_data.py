"""Data of MMSegmentation's configs: the set, the batch, the pipelines."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from segmill.convert.table import SAME, Table, part_of
from segmill.errors import SegmillError

# `8xb2`, of older files `8x2`; `512x1024` is a crop.
GPUS = re.compile(r"_(\d{1,2})xb?(\d{1,2})[-_]")
DATA = {
    "ADE20KDataset": "ade20k",
    "CityscapesDataset": "cityscapes",
    "PascalVOCDataset": "pascal_voc12",
}
RESIZES = ("Resize", "RandomResize", "RandomChoiceResize")
ZERO_IS_IGNORED = {"ade20k"}
# Where the files of each data set lie, as the configs of MMSegmentation say it.
PLACES = {
    "ade20k": ("images/training", "annotations/training"),
    "cityscapes": ("leftImg8bit/train", "gtFine/train"),
    "pascal_voc12": ("JPEGImages", "SegmentationClass"),
}
LISTS = {"pascal_voc12": "ImageSets/Segmentation/train.txt"}


def data_name(values: Mapping[str, Any]) -> str:
    """Our name of the training set; raise SegmillError where there is none."""
    dataset = training_set(values)
    kind = part_of(values, f"{dataset}.type")
    if not isinstance(kind, str) or kind not in DATA:
        raise SegmillError(
            f"{dataset}.type is {kind if isinstance(kind, str) else 'not read'}, which has no YAML "
            f"here; there are {', '.join(DATA)}. Write one by `segmill data new FOLDER name=NAME` "
            "and say data=NAME."
        )
    return DATA[kind]


def training_set(values: Mapping[str, Any]) -> str:
    """Where the config has its training set: 1.x or 0.x."""
    return "data.train" if "data" in values else "train_dataloader.dataset"


def convert_loader(table: Table, path: Path, gpus: int | None) -> None:
    """The batch of one GPU becomes the global one."""
    old = "data" in table.fields
    batch = "data.samples_per_gpu" if old else "train_dataloader.batch_size"
    workers = "data.workers_per_gpu" if old else "train_dataloader.num_workers"
    named = GPUS.search(f"_{path.stem}_")
    count = gpus or (int(named[1]) if named else None)
    own = table.get(batch)
    accumulate = table.get("optim_wrapper.accumulative_counts", 1)
    if own is not None:
        check = ""
        if count is None:
            check = "taken for one GPU, because the file's name has no count: say gpus=N"
        elif named and int(named[2]) != own and gpus is None:
            check = f"the file's name says {named[2]} a GPU, the config {own}; {count} GPUs taken"
        table.put(batch, "data.batch_size", own * (count or 1) * accumulate, check=check)
    table.put(workers, "data.workers", table.get(workers))
    table.put("optim_wrapper.accumulative_counts", "trainer.accumulate", accumulate)
    dataset = training_set(table.fields)
    table.note(f"{dataset}.type", SAME if _dataset_known(table, dataset) else "mapped: data=NAME")
    root = f"{dataset}.data_root"
    table.put(root, "data.data_root", str(table.get(root, "")).rstrip("/") or None)
    _placed(table, dataset, str(part_of(table.ours, "data.name")))
    for name in ("persistent_workers", "sampler", "pin_memory", "collate_fn"):
        table.note(f"train_dataloader.{name}", SAME)


def _placed(table: Table, dataset: str, data: str) -> None:
    """Folders and lists must be those of our data set, which finds its files by itself."""
    images, labels = PLACES.get(data, ("", ""))
    if images:
        for name, value in (
            *(("data_prefix.img_path", images), ("img_dir", images)),
            *(("data_prefix.seg_map_path", labels), ("ann_dir", labels)),
            *(("ann_file", LISTS.get(data, "")), ("split", LISTS.get(data, ""))),
        ):
            table.always(f"{dataset}.{name}", value)
    for name in ("data_prefix", "ann_file", "img_dir", "ann_dir", "split", "img_suffix"):
        table.note(f"{dataset}.{name}", f"dropped: data={data} says where its files lie")


def _dataset_known(table: Table, dataset: str) -> bool:
    """Whether our data set is the one that the config names."""
    return DATA.get(str(table.get(f"{dataset}.type"))) == part_of(table.ours, "data.name")


def convert_pipelines(table: Table, data: str) -> None:
    """The transforms of training, of which the absent ones are switched off, and of validation."""
    old = "data" in table.fields
    train = f"{training_set(table.fields)}.pipeline"
    val = "data.val.pipeline" if old else "val_dataloader.dataset.pipeline"
    steps = part_of(table.fields, train)
    for index, step in enumerate(steps if isinstance(steps, list | tuple) else []):
        if table.readable(f"{train}[{index}]"):
            _transform(table, f"{train}[{index}]", step, data)
    if steps and table.readable(train):
        _absent(table, {step.get("type") for step in steps if isinstance(step, Mapping)})
    for index, step in enumerate(table.get(val) or []):
        _test_transform(table, f"{val}[{index}]", step)
    table.note(train, "dropped: segmill.data.transforms has no such transform")
    place = "data.val" if old else "val_dataloader"
    table.note(val, "dropped: no such step here")
    table.note(place, f"{SAME}: data.val_split of the same data set")
    if old:
        table.note("data.test", "dropped: as validation; segmill eval split=test")
        table.note("data", "dropped: not known")


def _absent(table: Table, kinds: set[Any]) -> None:
    """Switch off what the pipeline lacks; say it where that is not possible here."""
    if "PhotoMetricDistortion" not in kinds:
        table.set("data.photometric", False)
    if "RandomFlip" not in kinds:
        table.set("data.flip", 0.0)
    if "RandomCrop" not in kinds:
        table.set("data.cat_max_ratio", 1.0)
        table.remark("the training pipeline has no RandomCrop; here data.crop cuts and pads")
    if not kinds & set(RESIZES):
        table.set("data.ratio", [1.0, 1.0])
        table.remark("the training pipeline resizes nothing; here images are fitted to data.scale")


def _resized(table: Table, place: str, step: Mapping[str, Any]) -> None:
    """One scale, times a factor of `ratio_range` where there is one."""
    old = "img_scale" in step
    scale = pair(step.get("img_scale" if old else "scale"))
    field = f"{place}.{'img_scale' if old else 'scale'}"
    if isinstance(scale, list | tuple) and all(isinstance(each, int) for each in scale):
        table.put(field, "data.scale", scale)
        table.set("data.ratio", step.get("ratio_range") or [1.0, 1.0])
    else:
        table.note(field, "dropped: data.scale is one (long edge, short edge)")
    table.put(f"{place}.ratio_range", "data.ratio", step.get("ratio_range") or [1.0, 1.0])
    table.always(f"{place}.keep_ratio", True)
    # Where the config says nothing, 0.x keeps the ratio and 1.x does not.
    stretched = not old and "keep_ratio" not in step
    why = "dropped: theirs stretches the image, ours keeps its ratio"
    table.note(f"{place}.type", why if stretched else SAME)


def _transform(table: Table, place: str, step: Any, data: str) -> None:
    kind = step.get("type") if isinstance(step, Mapping) else None
    if kind in ("LoadImageFromFile", "PackSegInputs", "DefaultFormatBundle", "Collect"):
        table.note(place, SAME)
    elif kind == "LoadAnnotations":
        table.note(f"{place}.type", SAME)
        table.always(f"{place}.reduce_zero_label", data in ZERO_IS_IGNORED)
    elif kind in ("RandomResize", "Resize"):
        _resized(table, place, step)
    elif kind == "RandomChoiceResize" and step.get("resize_type") == "ResizeShortestEdge":
        table.put(f"{place}.scales", "data.short_edges", step.get("scales"))
        table.set("data.ratio", None)
        table.set("data.scale", [step.get("max_size"), part_of(table.ours, "data.scale[1]")])
        table.note(place, "mapped", "data.short_edges, data.scale")
    elif kind == "RandomCrop":
        table.put(f"{place}.crop_size", "data.crop", pair(step.get("crop_size")))
        ratio = step.get("cat_max_ratio", 1.0)
        table.set("data.cat_max_ratio", ratio)
        table.put(f"{place}.cat_max_ratio", "data.cat_max_ratio", ratio)
        table.note(f"{place}.type", SAME)
    elif kind == "RandomFlip":
        name = "flip_ratio" if "flip_ratio" in step else "prob"
        table.put(f"{place}.{name}", "data.flip", step.get(name))
        table.note(f"{place}.type", SAME)
        table.always(f"{place}.direction", "horizontal")
    elif kind == "PhotoMetricDistortion":
        table.put(f"{place}.type", "data.photometric", True)
        for name in ("brightness_delta", "hue_delta"):
            table.always(f"{place}.{name}", {"brightness_delta": 32, "hue_delta": 18}[name])
        for name in ("contrast_range", "saturation_range"):
            table.always(f"{place}.{name}", [0.5, 1.5])
    elif kind == "Pad":
        table.note(place, f"{SAME}: crops are padded to data.crop, image 0 and label 255")
    elif kind == "Normalize":
        for name in ("mean", "std"):
            ours = [round(value / 255, 6) for value in step.get(name, [])]
            table.put(f"{place}.{name}", f"model.{name}", ours)
        table.always(f"{place}.to_rgb", True)
        table.note(f"{place}.type", SAME)


def _test_transform(table: Table, place: str, step: Any) -> None:
    kind = step.get("type") if isinstance(step, Mapping) else None
    if kind in ("LoadImageFromFile", "PackSegInputs", "LoadAnnotations"):
        table.note(place, SAME)
    elif kind == "Resize" and step.get("keep_ratio", False) is True:
        table.put(f"{place}.scale", "data.test_scale", pair(step.get("scale")))
        table.note(place, SAME)
    elif kind == "ResizeToMultiple":
        divisor = step.get("size_divisor", 32)
        table.set("protocol.multiple", divisor)
        table.note(place, "mapped", f"protocol.multiple={divisor}")
    elif kind == "MultiScaleFlipAug" and step.get("flip", False) is False:
        table.put(f"{place}.img_scale", "data.test_scale", pair(step.get("img_scale")))
        table.note(place, SAME)


def pair(value: Any) -> Any:
    """One number for both sides."""
    return [value, value] if isinstance(value, int) else value

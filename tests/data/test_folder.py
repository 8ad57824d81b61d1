import pickle
import shutil
import subprocess
import sys
import zipfile
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from tiny_folder import tiny_dataset, write_image, write_label, write_samples

from segmill.data.folder import DataError, FolderDataset


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_samples(tmp_path)
    return tmp_path


def refusal(dataset: FolderDataset, index: int = 0) -> str:
    with pytest.raises(DataError) as caught:
        dataset[index]
    return str(caught.value)


def test_image_is_rgb_and_label_is_mapped(root: Path):
    written = write_image(root / "images/train/a.png")
    dataset = tiny_dataset(
        root, image="images/{split}/{name}.png", label_map={0: 2, 1: 0, 2: "ignore"}
    )
    sample = dataset[0]
    np.testing.assert_array_equal(sample.image, written)
    assert sample.name == "a"
    assert sample.label is not None
    assert set(np.unique(sample.label)) == {0, 2, 255}


def test_without_a_list_all_images_are_taken_in_order_below_subfolders_too(root: Path):
    write_image(root / "images/train/city/z.jpg")
    (root / "images/train/._a.jpg").write_bytes(b"written beside a.jpg by some systems")
    assert tiny_dataset(root).names.tolist() == [b"a", b"b", b"c", b"city/z"]


def test_a_list_gives_names_and_order(root: Path):
    (root / "train.txt").write_text("c\n\na \n")
    dataset = tiny_dataset(root, splits={"train": {"list": "train.txt"}})
    assert [dataset[i].name for i in range(len(dataset))] == ["c", "a"]


def test_a_list_may_name_files_instead(root: Path):
    """Official split files do: the image's path, perhaps followed by the label's."""
    write_image(root / "images/train/d e.jpg")
    lines = ["images/train/b.jpg", "images/train/c.jpg\tlabels/train/c.png", "a", "d e"]
    (root / "train.txt").write_text("\n".join([*lines, "images/train/d e.jpg"]))
    dataset = tiny_dataset(root, splits={"train": {"list": "train.txt"}})
    assert [dataset.name(index) for index in range(5)] == ["b", "c", "a", "d e", "d e"]
    assert dataset.without_image() == []


def test_a_name_alone_may_be_the_pattern(root: Path):
    (root / "train.txt").write_text("images/train/a.jpg\n")
    dataset = tiny_dataset(root, image="{name}", splits={"train": {"list": "train.txt"}})
    assert dataset.name(0) == "images/train/a.jpg"


def test_folder_replaces_the_name_of_the_split(root: Path):
    dataset = tiny_dataset(root, split="fit", splits={"fit": {"folder": "train"}})
    assert len(dataset) == 3


def test_names_are_one_array(root: Path):
    assert tiny_dataset(root).names.dtype.kind == "S"


@pytest.mark.parametrize("inner", ["", "set/"])
def test_a_zip_archive_reads_like_its_folder(root: Path, tmp_path_factory, inner: str):
    archive = tmp_path_factory.mktemp("zip") / "set.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(root.rglob("*.*")):
            file.write(path, inner + path.relative_to(root).as_posix())
    unpacked, packed = tiny_dataset(root), tiny_dataset(archive / inner)
    assert packed.names.tolist() == unpacked.names.tolist()
    for index in range(3):
        np.testing.assert_array_equal(packed[index].image, unpacked[index].image)
        np.testing.assert_array_equal(packed[index].label, unpacked[index].label)


def test_forked_processes_open_the_archive_themselves(root: Path, tmp_path_factory):
    packed = Path(shutil.make_archive(str(tmp_path_factory.mktemp("zip") / "set"), "zip", root))
    dataset = tiny_dataset(packed)
    expected = [int(dataset[index].image.sum()) for index in range(3)]
    context = get_context("fork")
    sums = context.Queue()
    workers = [context.Process(target=_put_sums, args=(dataset, sums)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert [sums.get(timeout=20) for _ in workers] == [expected * 20] * 2
    for worker in workers:
        worker.join()


def _put_sums(dataset: FolderDataset, sums) -> None:
    sums.put([int(dataset[index % 3].image.sum()) for index in range(60)])


def test_depth_is_the_fourth_channel_over_its_range(root: Path):
    depth = np.full((24, 32), 5000, np.uint16)
    depth[0, :3] = 0, 1000, 65535
    (root / "depth").mkdir()
    cv2.imwrite(str(root / "depth/a.png"), depth)
    dataset = tiny_dataset(root, depth="depth/{name}.png", depth_range=(1000.0, 9000.0))
    channel = dataset[0].image[..., 3]
    assert channel[0, :4].tolist() == [0, 0, 255, 128]


# One test for each kind of bad input: the message names file, value and remedy.


def test_missing_image_is_named_with_its_list(root: Path):
    (root / "train.txt").write_text("a\nnowhere\n")
    dataset = tiny_dataset(root, splits={"train": {"list": "train.txt"}})
    text = refusal(dataset, 1)
    assert "images/train/nowhere.jpg" in text
    assert "train.txt" in text
    assert "take the sample out" in text


def test_missing_label_is_named(root: Path):
    (root / "labels/train/a.png").unlink()
    text = refusal(tiny_dataset(root))
    assert "labels/train/a.png does not exist" in text
    assert "data.label" in text


def test_missing_depth_is_named(root: Path):
    text = refusal(tiny_dataset(root, depth="depth/{name}.png", depth_range=(0.0, 1.0)))
    assert "depth/a.png does not exist" in text
    assert "data.depth" in text


def test_label_outside_the_map_is_named_with_value_and_pixels(root: Path):
    write_label(root / "labels/train/a.png", (0, 7))
    text = refusal(tiny_dataset(root))
    assert "labels/train/a.png" in text
    assert "7 (384 pixels)" in text
    assert "7: ignore" in text


def test_label_of_another_size_is_named_with_both_sizes(root: Path):
    write_label(root / "labels/train/a.png", height=16)
    text = refusal(tiny_dataset(root))
    assert "32 x 16" in text
    assert "32 x 24" in text
    assert "images/train/a.jpg" in text


def test_depth_of_another_size_is_named(root: Path):
    write_label(root / "depth/a.png", height=16)
    assert "depth/a.png is 32 x 16" in refusal(tiny_dataset(root, depth="depth/{name}.png"))


@pytest.mark.parametrize("left", [0.9, 0.5, 0.1])
def test_truncated_jpeg_is_refused(root: Path, left: float):
    path = root / "images/train/a.jpg"
    path.write_bytes(path.read_bytes()[: int(left * path.stat().st_size)])
    text = refusal(tiny_dataset(root))
    assert "images/train/a.jpg" in text
    assert "truncated" in text
    assert "Copy it again" in text


def test_jpeg_with_a_trailer_is_read(root: Path):
    path = root / "images/train/a.jpg"
    path.write_bytes(path.read_bytes() + b"what some cameras append")
    assert tiny_dataset(root)[0].image.shape == (24, 32, 3)


@pytest.mark.parametrize("name", ["images/train/a.jpg", "labels/train/a.png"])
def test_empty_file_is_refused(root: Path, name: str):
    (root / name).write_bytes(b"")
    assert f"{name} (0 bytes)" in refusal(tiny_dataset(root))


@pytest.mark.parametrize("label_format", ["index", "palette"])
def test_truncated_label_is_refused(root: Path, label_format: str):
    picture = Image.fromarray(np.random.RandomState(0).randint(0, 3, (24, 32)).astype(np.uint8))
    if label_format == "palette":
        picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    picture.save(root / "labels/train/a.png")
    path = root / "labels/train/a.png"
    path.write_bytes(path.read_bytes()[:-40])
    text = refusal(tiny_dataset(root, label_format=label_format))
    assert "labels/train/a.png" in text
    assert "cannot be decoded" in text


def test_16_bit_label_is_refused_with_its_highest_value(root: Path):
    cv2.imwrite(str(root / "labels/train/a.png"), np.full((24, 32), 26001, np.uint16))
    text = refusal(tiny_dataset(root))
    assert "16-bit" in text
    assert "26001" in text


def test_1_bit_label_is_refused(root: Path):
    Image.fromarray(np.eye(24, 32) > 0).save(root / "labels/train/a.png")
    assert "1-bit" in refusal(tiny_dataset(root))


def test_palette_label_is_refused_with_the_key_to_set(root: Path):
    picture = Image.fromarray(np.zeros((24, 32), np.uint8))
    picture.putpalette([0, 0, 0, 128, 0, 0])
    picture.save(root / "labels/train/a.png")
    assert "set data.label_format=palette" in refusal(tiny_dataset(root))


def test_grey_label_is_refused_where_a_palette_is_expected(root: Path):
    text = refusal(tiny_dataset(root, label_format="palette"))
    assert "set data.label_format=index" in text


def test_palette_indices_are_the_classes(root: Path):
    stripes = write_label(root / "labels/train/a.png")
    picture = Image.fromarray(stripes)
    picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    picture.save(root / "labels/train/a.png")
    sample = tiny_dataset(root, label_format="palette")[0]
    np.testing.assert_array_equal(sample.label, stripes)


def test_colour_label_is_refused(root: Path):
    write_image(root / "labels/train/a.png")
    assert "3 channels" in refusal(tiny_dataset(root))


def test_16_bit_image_is_refused(root: Path):
    cv2.imwrite(str(root / "images/train/a.png"), np.zeros((24, 32, 3), np.uint16))
    text = refusal(tiny_dataset(root, image="images/{split}/{name}.png"))
    assert "images/train/a.png is uint16" in text
    assert "8 bit" in text


def test_16_bit_depth_needs_a_range(root: Path):
    (root / "depth").mkdir()
    cv2.imwrite(str(root / "depth/a.png"), np.full((24, 32), 4321, np.uint16))
    text = refusal(tiny_dataset(root, depth="depth/{name}.png"))
    assert "4321" in text
    assert "data.depth_range" in text


def test_empty_split_is_refused(root: Path):
    with pytest.raises(DataError, match=r"'val' is empty.*images/val/\{name\}\.jpg"):
        tiny_dataset(root, split="val")


def test_missing_list_is_refused(root: Path):
    with pytest.raises(DataError, match=r"list .*train\.txt .*does not exist"):
        tiny_dataset(root, splits={"train": {"list": "train.txt"}})


def test_unknown_split_is_refused_with_the_known_ones(root: Path):
    with pytest.raises(DataError, match=r"'test' is not one of data\.splits \(train, val\)"):
        tiny_dataset(root, split="test")


def test_misspelt_key_of_a_split_is_refused(root: Path):
    with pytest.raises(DataError, match=r"data\.splits\.train has the key 'lst'"):
        tiny_dataset(root, splits={"train": {"lst": "train.txt"}})


def test_absent_data_root_says_which_key_to_set(tmp_path: Path):
    with pytest.raises(DataError, match=r"nowhere does not exist\. Set data\.data_root"):
        tiny_dataset(tmp_path / "nowhere")


def test_pattern_without_name_is_refused(root: Path):
    with pytest.raises(DataError, match=r"data\.image is 'images/a\.jpg'"):
        tiny_dataset(root, image="images/a.jpg")


def test_depth_range_must_rise(root: Path):
    with pytest.raises(DataError, match=r"data\.depth_range"):
        tiny_dataset(root, depth_range=(5.0, 5.0))


def test_file_that_is_no_archive_is_refused(tmp_path: Path):
    (tmp_path / "set.zip").write_bytes(b"PK but nothing else")
    with pytest.raises(DataError, match=r"set\.zip is damaged"):
        tiny_dataset(tmp_path / "set.zip")


def test_damaged_member_of_an_archive_is_named(root: Path, tmp_path_factory):
    archive = tmp_path_factory.mktemp("zip") / "set.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(root.rglob("*.*")):
            file.write(path, path.relative_to(root).as_posix())
        start = file.getinfo("images/train/a.jpg").header_offset
    data = bytearray(archive.read_bytes())
    data[start + 200] ^= 255
    archive.write_bytes(data)
    text = refusal(tiny_dataset(archive))
    assert "set.zip/images/train/a.jpg is damaged" in text


def test_reading_needs_no_torch(root: Path):
    pickled = root / "dataset.pickle"
    pickled.write_bytes(pickle.dumps(tiny_dataset(root)))
    code = (
        "import pickle, sys; sys.modules['torch'] = None\n"
        f"dataset = pickle.load(open({str(pickled)!r}, 'rb')); print(dataset[0].image.shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(24, 32, 3)"

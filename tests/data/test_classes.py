from pathlib import Path

import pytest

from segmill.data.classes import read_classes
from segmill.data.files import DataError


def test_rows_are_classes_and_prompts_default_to_names(tmp_path: Path):
    path = tmp_path / "c.csv"
    path.write_text('name,red,green,blue,prompt\nsky,1,2,3,\ncar,4,5,6,"a car, parked"\n')
    classes = read_classes(path)
    assert classes.names == ("sky", "car")
    assert classes.prompts == ("sky", "a car, parked")
    assert classes.palette.tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize(
    ("name", "count", "last"),
    [
        ("camvid", 11, "bicyclist"),
        ("ade20k", 150, "flag"),
        ("cityscapes", 19, "bicycle"),
        ("pascal_voc12", 21, "tv monitor"),
        ("scenes", 8, "picture"),
        ("nyu_depth_v2", 40, "otherprop"),
        ("sunrgbd", 37, "bag"),
    ],
)
def test_shipped_classes(name: str, count: int, last: str):
    classes = read_classes(name)
    assert len(classes) == count
    assert classes.names[-1] == last
    assert classes.palette.shape == (count, 3)


def test_sun_rgbd_has_nyus_first_classes():
    sun, nyu = read_classes("sunrgbd"), read_classes("nyu_depth_v2")
    different = [pair for pair in zip(sun.names, nyu.names, strict=False) if pair[0] != pair[1]]
    assert different == [("fridge", "refrigerator"), ("tv", "television")]


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(DataError, match=r"camvd\.csv does not exist.*ade20k, camvid"):
        read_classes("camvd")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,red,green,blue\n", "names no class"),
        ("class,r,g,b\nsky,1,2,3\n", "names no class in row 2"),
        ("name,red,green,blue\nsky,1,2,3\nsky,1,2,3\n", "'sky' twice"),
        (
            "name,red,green,blue\nsky,1,2,300\n",
            r"line 2: the colour of 'sky' is \['1', '2', '300'\]",
        ),
        ("name,red,green\nsky,1,2\n", r"\['1', '2', ''\]"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, text: str, message: str):
    path = tmp_path / "c.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_classes(path)


def test_a_bare_name_is_also_found_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "configs/classes").mkdir(parents=True)
    (tmp_path / "configs/classes/mine.csv").write_text("name,red,green,blue\nsky,1,2,3\n")
    monkeypatch.chdir(tmp_path)
    assert read_classes("mine").names == ("sky",)

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segmill.cli import main
from segmill.commands import corrupt
from segmill.data.corrupted_files import MANIFEST, make, read_manifest
from segmill.data.files import DataError
from tiny_tasks import HEIGHT, NAMES, WIDTH, task_data, write_ade20k, write_picture, write_values

TWO = "data.corruptions=[contrast,fog]"
ROOMS = {"train": 1, "val": 1, "test": 2, "height": 32, "width": 48}
DEPTH, RANGE = "depth/{split}/{name}.png", "data.depth_range=[0,10000]"
NOISY = {"corruptions": ["gaussian_noise", "frost"]}


@pytest.fixture(autouse=True)
def _quiet_logger():
    yield
    logging.getLogger("segmill").handlers.clear()


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    return write_ade20k(tmp_path / "clean")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def ade(clean: Path, out: Path, *words: str) -> int:
    roots = [f"data.data_root={clean}", f"out={out}"]
    return main(["corrupt", "data=ade20k_c", *roots, TWO, "workers=1", *words])


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def image(out: Path, corruption: str, name: str = NAMES[0]) -> Path:
    return out / "ADE20K_val-c" / corruption / "5" / "validation" / f"{name}.jpg"


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def test_it_writes_the_published_layout_of_ade20k_c(clean, out, capsys):
    assert ade(clean, out) == 0
    labels = {f"annotations/validation/{name}.png" for name in NAMES}
    images = {
        f"ADE20K_val-c/{corruption}/5/validation/{name}.jpg"
        for corruption in ("contrast", "fog")
        for name in NAMES
    }
    found = files(out)
    assert set(found) == labels | images | {MANIFEST}
    assert all(found[path] == files(clean)[path] for path in labels)
    assert last_line(capsys.readouterr().out) == (
        f"Next: segmill adapt data=ade20k_c '{TWO}' data.data_root={out}"
    )
    data = task_data("ade20k_c", data_root=str(out), corruptions=["contrast", "fog"])
    assert [len(data.dataset(task)) for task in data.tasks] == [3, 3]


def test_the_manifest_says_what_every_file_is(clean, out):
    ade(clean, out)
    lines = (out / MANIFEST).read_text().splitlines()
    entries = {entry["path"]: entry for entry in map(json.loads, lines)}
    assert len(lines) == len(entries) == 9
    entry = entries[image(out, "fog").relative_to(out).as_posix()]
    assert entry["name"] == NAMES[0]
    assert (entry["corruption"], entry["severity"], entry["quality"]) == ("fog", 5, 95)
    assert entry["bytes"] == image(out, "fog").stat().st_size
    assert isinstance(entry["seed"], int)
    assert "segmill" in entry["made_by"]
    assert "numpy" in entry["made_by"]
    label = entries[f"annotations/validation/{NAMES[0]}.png"]
    assert label["corruption"] is None


def scenes(root: Path, out: Path, *words: str) -> int:
    rooms = [f"data.generate.{key}={value}" for key, value in ROOMS.items()]
    roots = [f"data.data_root={root}", f"out={out}", "data.corruptions=[gaussian_noise,frost]"]
    return main(["corrupt", "data=scenes_c", *roots, *rooms, "workers=1", *words])


def test_a_written_png_is_the_picture_made_on_the_fly(tmp_path, out, capsys):
    root = tmp_path / "rooms"
    assert scenes(root, out) == 0
    assert last_line(capsys.readouterr().out).endswith(
        f"data.data_root={out} data.on_the_fly=false"
    )
    read = task_data("scenes_c", data_root=str(out), on_the_fly=False, channels=4, **NOISY)
    made = task_data("scenes_c", data_root=str(root), generate=ROOMS, channels=4, **NOISY)
    assert read.order_hash() == made.order_hash()
    pairs = zip(
        read.loader(read.tasks, limit=None), made.loader(made.tasks, limit=None), strict=True
    )
    for ours, theirs in pairs:
        assert torch.equal(ours["original"], theirs["original"])
        assert torch.equal(ours["label"], theirs["label"])


def test_depth_is_copied_as_labels_are_and_read_with_the_corrupted_colour(clean, out):
    for seed, name in enumerate(NAMES):
        depth = np.random.RandomState(seed).randint(0, 12000, (HEIGHT, WIDTH)).astype(np.uint16)
        path = clean / "depth" / "validation" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(depth).save(path)
    assert ade(clean, out, "data.channels=4", f"data.depth='{DEPTH}'", RANGE) == 0
    copies = {path: each for path, each in files(out).items() if path.startswith("depth/")}
    assert copies == {path: each for path, each in files(clean).items() if path in copies}
    assert len(copies) == len(NAMES)
    keys = {"channels": 4, "depth": DEPTH, "depth_range": [0, 10000], "corruptions": ["fog"]}
    read = task_data("ade20k_c", data_root=str(out), **keys)
    made = task_data("ade20k_c", data_root=str(clean), on_the_fly=True, **keys)
    for ours, theirs in zip(_all(read), _all(made), strict=True):
        assert ours["original"].shape == (1, 4, HEIGHT, WIDTH)
        assert torch.equal(ours["original"][:, 3], theirs["original"][:, 3])


def _all(data):
    return data.loader(data.tasks, limit=None)


def test_several_processes_write_the_same_files(clean, tmp_path):
    assert ade(clean, tmp_path / "one") == 0
    assert ade(clean, tmp_path / "two", "workers=2") == 0
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_a_second_run_writes_nothing(clean, out, capsys):
    ade(clean, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert ade(clean, out) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert "0 files written, 9 were there already" in capsys.readouterr().out


def test_missing_and_changed_files_are_made_again(clean, out, capsys):
    ade(clean, out)
    before = files(out)
    image(out, "fog").unlink()
    image(out, "contrast").write_bytes(b"other")
    (out / f"annotations/validation/{NAMES[0]}.png").write_bytes(b"")
    capsys.readouterr()
    assert ade(clean, out) == 0
    assert "3 files written, 6 were there already" in capsys.readouterr().out
    assert files(out) == before


def test_another_source_or_quality_makes_the_image_again(clean, out):
    ade(clean, out)
    before = image(out, "fog").read_bytes()
    ade(clean, out, "quality=50")
    smaller = image(out, "fog").read_bytes()
    assert len(smaller) < len(before)
    assert ade(clean, out, "--verify") == 0
    source = clean / "images" / "validation" / f"{NAMES[0]}.jpg"
    Image.fromarray(np.asarray(Image.open(source))[::-1].copy()).save(source)
    ade(clean, out, "quality=50")
    assert image(out, "fog").read_bytes() != smaller
    assert ade(clean, out, "--verify") == 0


def test_ctrl_c_leaves_a_state_that_the_same_command_completes(
    clean, out, tmp_path, monkeypatch, capsys
):
    count = []

    def stops(job):
        count.append(job)
        if len(count) > 5:
            raise KeyboardInterrupt
        return make(job)

    monkeypatch.setattr(corrupt, "make", stops)
    assert ade(clean, out) == 130
    assert "5 of 9 files are there; the same command makes the rest" in capsys.readouterr().out
    assert len(read_manifest(out)) == 5
    monkeypatch.undo()
    assert ade(clean, out) == 0
    assert "4 files written, 5 were there already" in capsys.readouterr().out
    ade(clean, tmp_path / "whole")
    assert files(out) == files(tmp_path / "whole")


def test_a_last_line_that_was_cut_off_is_written_again(clean, out):
    ade(clean, out)
    whole = (out / MANIFEST).read_bytes()
    (out / MANIFEST).write_bytes(whole[:-20])
    assert len(read_manifest(out)) == 8
    assert ade(clean, out) == 0
    assert (out / MANIFEST).read_bytes() == whole


def test_a_damaged_line_of_the_manifest_is_named(clean, out, capsys):
    ade(clean, out)
    lines = (out / MANIFEST).read_text().splitlines(keepends=True)
    (out / MANIFEST).write_text("".join([lines[0], "{}\n", *lines[2:]]))
    assert ade(clean, out) == 2
    assert "manifest.jsonl, line 2" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["--verify", "verify=true"])
def test_verify_finds_changed_and_missing_files(clean, out, capsys, word):
    ade(clean, out)
    assert ade(clean, out, word) == 0
    assert "9 files in" in capsys.readouterr().out
    content = image(out, "contrast").read_bytes()
    image(out, "contrast").write_bytes(content[:-1] + b"?")
    image(out, "fog").unlink()
    before = files(out)
    assert ade(clean, out, word) == 2
    captured = capsys.readouterr()
    assert f"changed: {image(out, 'contrast')} has another sha256" in captured.out
    assert f"missing: {image(out, 'fog')}" in captured.out
    assert "2 problem(s) among 9 files" in captured.err
    assert "Make these files again: segmill corrupt data=ade20k_c" in captured.err
    assert word not in captured.err
    assert files(out) == before


def test_verify_finds_tasks_and_images_that_were_never_made(clean, out, capsys):
    ade(clean, out)
    lines = (out / MANIFEST).read_text().splitlines(keepends=True)
    (out / MANIFEST).write_text("".join(lines[:-1]))
    assert ade(clean, out, "--verify", "data.corruptions=[contrast,fog,snow]") == 2
    printed = capsys.readouterr().out
    assert "missing: 1 of 3 images of 02_fog_5" in printed
    assert "missing: all images of 03_snow_5" in printed


def test_verify_without_a_manifest_says_so(clean, out, capsys):
    assert ade(clean, out, "--verify") == 2
    assert f"There is no manifest {out / MANIFEST}" in capsys.readouterr().err


def test_other_commands_refuse_verify(capsys):
    assert main(["data", "check", "data=camvid", "--verify"]) == 2
    assert "segmill data check has no --verify" in capsys.readouterr().err


def test_the_corrupted_images_may_lie_beside_the_clean_ones(clean):
    before = files(clean)
    assert ade(clean, clean) == 0
    assert {path: data for path, data in files(clean).items() if path in before} == before
    assert image(clean, "fog").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.corruptions=[fgo]"], "did you mean fog"),
        (["data.severities=[7]"], "Severity 7"),
        (["data.corrupted='{name}.jpg'"], "gives every corruption the same files"),
        (["data.corrupted=null"], "does not say where corrupted images lie"),
        (["data.corrupted='c/{corruption}/{name}.webp'"], "End it in .jpg or .png"),
        (["quality=101"], "quality=101"),
        (["workers=0"], "workers=0"),
        (["data.data_root=/nowhere"], "there is no folder /nowhere"),
        (["data.frost_dir=/nowhere", "data.corruptions=[frost]"], "lacks frost1.png"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(clean, out, capsys, words, message):
    assert ade(clean, out, *words) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_clean_image_is_never_overwritten(clean, capsys):
    before = files(clean)
    words = ["data.corruptions=[fog]", "data.corrupted='images/{split}/{name}.jpg'"]
    assert ade(clean, clean, *words) == 2
    assert "is a clean image and would be overwritten" in capsys.readouterr().err
    assert files(clean) == before


def test_a_data_set_without_clean_images_says_why_it_cannot(tmp_path, out, capsys):
    assert main(["corrupt", "data=acdc", f"data.data_root={tmp_path}", f"out={out}"]) == 2
    text = capsys.readouterr().err
    assert "data=acdc has no clean images (data.image is null), so there is nothing to" in text
    assert "segmill adapt data=acdc" in text


def test_lists_of_a_split_are_copied_too(tmp_path, out):
    clean = tmp_path / "camvid"
    for seed in range(2):
        write_picture(clean / f"images/test/{seed}.jpg", seed)
        write_values(clean / f"masks/test/{seed}.png", (0, 11))
    (clean / "test.txt").write_text("1\n0\n")
    words = [f"data.data_root={clean}", f"out={out}", TWO, "workers=1"]
    assert main(["corrupt", "data=camvid_c", *words]) == 0
    keys = {"data_root": str(out), "corruptions": ["contrast", "fog"], "on_the_fly": False}
    data = task_data("camvid_c", **keys)
    assert [data.dataset(data.tasks[1]).name(index) for index in range(2)] == ["1", "0"]
    (out / "CamVid-c/fog/5/test/0.png").unlink()
    with pytest.raises(DataError, match=r"02_fog_5 lacks 1 of 2 images, .*fog/5/test/0\.png"):
        task_data("camvid_c", **keys)

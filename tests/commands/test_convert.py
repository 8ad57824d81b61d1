"""`segmill convert`: what is written, what is printed, and how mistakes are answered."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from golden import FOLDER, ModelGolden
from segmill.checkpoint.read import read_checkpoint
from segmill.cli import main

CHECKPOINTS = FOLDER / "checkpoints"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    logging.getLogger("segmill").handlers.clear()


def test_weights_are_written_next_to_the_file(capsys) -> None:
    shutil.copy(CHECKPOINTS / "tar_zip.pth.tar", "w.pth.tar")
    assert main(["convert", "weights", "w.pth.tar", "--to", "jittor"]) == 0
    arrays = read_checkpoint("w.pkl")
    assert arrays.keys() == read_checkpoint("w.pth.tar").keys()
    printed = capsys.readouterr().out
    assert f"{len(arrays)} arrays" in printed
    assert "bfloat16 was read as float32" in printed
    assert "left out" in printed
    assert "Next: segmill weights inspect w.pkl" in printed


def test_weights_take_the_names_of_a_variant(capsys) -> None:
    state = {
        f"module.{name}": torch.from_numpy(v)
        for name, v in ModelGolden("segformer").state().items()
    }
    torch.save({"state_dict": state}, "official.pth")
    variant = "segformer_mit-b0"
    line = ["convert", "weights", "official.pth", "to=torch", "out=ours.pth", f"model={variant}"]
    assert main(line) == 0
    ours = read_checkpoint("ours.pth")
    assert not any(name.startswith("module.") for name in ours)
    assert sum(map(np.size, ours.values())) == sum(value.numel() for value in state.values())
    assert f"names     {variant}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("weights w.pth to=torc", "did you mean torch"),
        ("weights w.pth --too torch", "did you mean --to"),
        ("weights w.pth --to", "--to needs a value"),
        ("weights w.pth", "needs to"),
        ("weights nowhere.pth to=torch", "nowhere.pth does not exist"),
        ("weights . to=torch", "is a folder, not a checkpoint"),
        ("weights cut.pth to=jittor", "damaged or cut short"),
        ("weights w.pth to=torch", "is the file that is read"),
        ("weights w.pth to=torch out=cut.pth", "overwrite=true"),
        ("weights w.pth to=torch overwrite=1", "overwrite=1: this should be true or false"),
        ("weights w.pth to=jittor model=segformer_mit-b9", "did you mean segformer_mit-b5"),
        ("weights w.pth to=jittor model=segformer_mit-b0", "shares no name with segformer_mit-b0"),
        ("wights w.pth", "segmill convert config or segmill convert weights"),
    ],
)
def test_a_mistake_is_answered_in_one_paragraph(words: str, answer: str, capsys) -> None:
    shutil.copy(CHECKPOINTS / "one_w.pth", "w.pth")
    Path("cut.pth").write_bytes(Path("w.pth").read_bytes()[:300])
    assert main(["convert", *words.split()]) == 2
    printed = capsys.readouterr()
    assert answer in printed.err
    assert printed.err.count("\n") == 1
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["cut.pth", "w.pth"]

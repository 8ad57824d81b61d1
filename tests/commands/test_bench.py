import pytest

from segmill.cli import main

TINY = ["bench", "model=fcn_tiny", "size=[32,48]", "repeats=2", "accelerator=cpu"]


def test_a_model_is_measured(capsys):
    assert main([*TINY, "batch=2"]) == 0
    printed = capsys.readouterr().out
    assert "fcn_tiny: 0.1" in printed
    assert "float32, batch 2" in printed
    assert "inference" in printed
    assert "training" in printed


def test_inference_alone_is_measured_when_training_is_not_wanted(capsys):
    assert main([*TINY, "train=false"]) == 0
    assert "training" not in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["batch=0", "repeats=1", "size=[0,32]"])
def test_numbers_that_cannot_be_measured_are_refused(wrong, capsys):
    assert main([*TINY, wrong]) == 2
    assert wrong.split("=")[0] in capsys.readouterr().err

import numpy as np
import pytest
import torch
from torch import nn

import segmill
from segmill.cli import main
from segmill.commands import export

TINY = ["export", "run=fcn_tiny", "num_classes=5", "size=[64,96]"]


@pytest.mark.parametrize(("format", "name"), [("onnx", "fcn_tiny.onnx"), ("torch", "fcn_tiny.pt2")])
def test_an_exported_file_is_run_and_compared(format, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*TINY, f"format={format}"]) == 0
    printed = capsys.readouterr().out
    assert "The file was run: largest difference" in printed
    assert "weights in this file are random" in printed
    assert [each.name for each in tmp_path.iterdir()] == [name]


def test_a_file_may_give_classes_instead_of_logits(tmp_path, capsys):
    path = tmp_path / "new" / "model.onnx"
    assert main([*TINY, "output=label", f"path={path}"]) == 0
    assert "1.000000 of the pixels have the model's class" in capsys.readouterr().out
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    image = np.zeros((1, 3, 64, 96), np.float32)
    assert session.run(None, {"image": image})[0].shape == (1, 64, 96)


def test_the_file_holds_the_normalisation_too():
    segmenter = segmill.load("fcn_tiny", num_classes=5)
    image = torch.full((1, 3, 32, 32), 200.0)
    module = export.Exported(segmenter.model, output="logits", align_corners=False).eval()
    with torch.no_grad():
        expected = segmenter.network(segmenter.model.normalise(image))
        torch.testing.assert_close(module(image), expected, atol=0, rtol=0)


def test_onnx_without_its_packages_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "PACKAGES", ("onnx", "no_such_package"))
    assert main([*TINY, f"path={tmp_path / 'x.onnx'}"]) == 2
    error = capsys.readouterr().err
    assert 'needs no_such_package: pip install "segmill[export]"' in error
    assert not list(tmp_path.iterdir())


def test_a_file_that_computes_something_else_is_an_error():
    class Twice(nn.Module):
        def forward(self, image):
            return 2 * image

    image = torch.rand(1, 3, 4, 4)
    with pytest.raises(segmill.errors.SegmillError, match="do not use it"):
        export._compare(Twice(), image, image.numpy())


def test_a_model_that_draws_numbers_is_compared_with_itself(caplog):
    class Noisy(nn.Module):
        def forward(self, image):
            return image + torch.rand_like(image)

    image = torch.rand(1, 3, 4, 4)
    with caplog.at_level("INFO", "segmill"):
        export._compare(Noisy(), image, image.numpy())
    assert "draws random numbers in every forward pass" in caplog.text


def test_what_cannot_be_exported_says_why(tmp_path, monkeypatch, capsys):
    def refuse(module, image, path):
        raise RuntimeError("no operator for this\nand a long story")

    monkeypatch.setattr(export, "_write_torch", refuse)
    path = tmp_path / "x.pt2"
    assert main([*TINY, "format=torch", f"path={path}"]) == 2
    assert "fcn_tiny cannot be exported as torch: no operator for this" in capsys.readouterr().err

"""`segmill models`: its table, what it says of one model, and the page that shows the table."""

import re
from pathlib import Path

import pytest

from segmill.commands import models
from segmill.errors import SegmillError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "zoo.md"


def printed(capsys, *words: str, **keywords: str) -> str:
    models.run(*words, **keywords)
    return capsys.readouterr().out


def test_a_part_of_a_name_lists_the_models_that_have_it(capsys):
    text = printed(capsys, "pspnet_r")
    assert re.search(r"pspnet_r50-d8 +pspnet +49\.08 .* 42\.48 +43\.44 +\.\.\._ade20k_160k", text)
    assert "pspnet_r101-d8" in text
    assert "fcn_r50-d8" not in text


def test_a_family_lists_its_models(capsys):
    text = printed(capsys, "sem_fpn")
    assert {"fpn_r50", "fpn_poolformer_s12"} <= set(re.findall(r"^\S+", text, re.MULTILINE))


def test_a_whole_name_tells_everything_about_the_model(capsys):
    text = printed(capsys, "fcn_r50-d8")
    assert "49,598,604 parameters" in text  # as the golden fcn.json says
    assert "weights=timm loads resnet50c" in text
    assert "experiment=fcn_r50-d8_ade20k_80k" in text
    assert "35.94 / 37.94 mIoU" in text
    assert "fcn_r50-d8_512x512_80k_ade20k_20200614_144016-f8ac5082.pth" in text
    assert "num_convs: 2" in text


def test_a_misspelt_name_gets_a_suggestion(capsys):
    with pytest.raises(SegmillError, match="did you mean pspnet"):
        models.run("pspnett")
    with pytest.raises(SegmillError, match="table and markdown"):
        models.run(format="html")


def test_a_model_of_ones_own_is_measured(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "configs" / "model" / "discriminative"
    folder.mkdir(parents=True)
    parent = "/model/discriminative/fcn_tiny@_here_"
    (folder / "fcn_mine.yaml").write_text(f"# Mine.\ndefaults:\n  - {parent}\n  - _self_\n")
    monkeypatch.chdir(tmp_path)
    text = printed(capsys, "fcn_mine")
    assert "Mine." in text
    assert "Next: segmill train model=fcn_mine data=NAME --dry-run" in text


def test_the_best_published_recipe_comes_first():
    first, second = models.recipes()["fcn_r50-d8"]
    assert (first.name, second.name) == ("fcn_r50-d8_ade20k_160k", "fcn_r50-d8_ade20k_80k")


def test_a_score_with_ms_and_flip_alone_says_so(capsys):
    text = printed(capsys, "dformer-tiny")
    assert "experiment=dformer-tiny_nyu" in text
    assert "51.80 (ms+flip) mIoU" in text
    assert "NYUv2_DFormer_Tiny.pth" in text


def test_every_model_has_a_size():
    """Else: python scripts/measure_models.py NAME ..."""
    table = models.sizes_file()
    assert sorted(set(models.variants()) - set(table)) == []
    assert sorted(set(table) - set(models.variants())) == []


def test_the_page_shows_the_table(capsys):
    """Else: segmill models format=markdown."""
    rows = [line for line in printed(capsys, format="markdown").splitlines() if line[:1] == "|"]
    shown = PAGE.read_text(encoding="utf-8").partition("## Table")[2].splitlines()
    assert [line for line in shown if line[:1] == "|"][: len(rows)] == rows


@pytest.mark.slow
@pytest.mark.parametrize("name", models.variants())
def test_the_size_is_what_the_network_has(name):
    assert models.sizes([name])[name] == models.measured(name)

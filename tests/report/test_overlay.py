"""Class maps as pictures."""

import numpy as np
import pytest

from segmill.report import overlay as pictures
from segmill.report.overlay import HATCH, WRONG, colourise, error_map, legend, overlay

PALETTE = np.array([[10, 20, 30], [200, 0, 0], [0, 0, 250]], np.uint8)


def test_every_class_gets_its_colour():
    label = np.array([[0, 1], [2, 0]], np.uint8)
    assert (colourise(label, PALETTE) == PALETTE[label]).all()


def test_what_is_no_class_is_hatched():
    label = np.full((8, 8), 255, np.uint8)
    label[0] = 3
    assert np.isin(colourise(label, PALETTE).reshape(-1, 3), HATCH).all()


def test_an_overlay_mixes_inside_and_draws_borders_full():
    image = np.full((4, 6, 3), 100, np.uint8)
    pred = np.zeros((4, 6), np.uint8)
    pred[:, 3:] = 1
    mixed = overlay(image, pred, PALETTE, alpha=0.5)
    assert mixed[0, 0].tolist() == [55, 60, 65]
    assert (mixed[:, 2] == PALETTE[0]).all()
    assert mixed[0, 5].tolist() == [150, 50, 50]


def test_an_overlay_leaves_depth_out():
    image = np.full((4, 4, 4), 100, np.uint8)
    assert overlay(image, np.zeros((4, 4), np.uint8), PALETTE, alpha=0.3).shape == (4, 4, 3)


def test_errors_are_red_and_ignored_pixels_are_not():
    image = np.zeros((8, 8, 3), np.uint8)
    label = np.zeros((8, 8), np.uint8)
    label[:, 4:] = 255
    pred = np.ones((8, 8), np.uint8)
    pred[0] = 0
    shown = error_map(image, label, pred, ignore_index=255)
    assert (shown[1:, :4] == WRONG).all()
    assert not (shown[:, 4:] == WRONG).all(axis=-1).any()
    assert not (shown[0] == WRONG).all(axis=-1).any()


def test_a_legend_holds_every_colour():
    sheet = legend(("road", "sky", "天空"), PALETTE).reshape(-1, 3)
    for colour in PALETTE:
        assert (sheet == colour).all(axis=1).any()


def test_a_legend_without_a_font_for_a_name_shows_its_index(monkeypatch):
    monkeypatch.setattr(pictures, "_system_fonts", lambda: ())
    foreign, plain = legend(("天空",), PALETTE[:1]), legend(("sky",), PALETTE[:1])
    assert foreign.shape[0] == plain.shape[0]
    assert foreign.shape[1] < plain.shape[1]


@pytest.mark.parametrize("shape", [(1, 1), (5, 3)])
def test_tiny_images_are_fine(shape):
    image, label = np.zeros((*shape, 3), np.uint8), np.zeros(shape, np.uint8)
    assert overlay(image, label, PALETTE, alpha=0.5).shape == (*shape, 3)

import numpy as np
import pytest
import torch

from segmill.data.transforms import NO_JITTER, apply_jitter, draw_jitter
from segmill.photometric import photometric_distortion


def batch_of(images: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2).copy())


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    # Noise meets every colour; flat grey, black and primary colours meet the branches of hue.
    noise = np.random.RandomState(0).randint(0, 256, (16, 64, 64, 3)).astype(np.uint8)
    noise[:, :8] = np.repeat(np.arange(256, dtype=np.uint8), 2).reshape(8, 64, 1)
    noise[:, 8] = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]]).repeat(16, 0)
    return list(noise)


def test_a_batch_equals_the_reference_one_by_one(images: list[np.ndarray]):
    jitter = np.stack([draw_jitter(np.random.RandomState(seed)) for seed in range(16)])
    ours = photometric_distortion(batch_of(images), torch.from_numpy(jitter))
    theirs = batch_of([apply_jitter(i, j) for i, j in zip(images, jitter, strict=True)]).float()
    difference = (ours - theirs).abs()
    # OpenCV's HSV -> RGB rounds the last pixels of a row differently; see the module.
    assert difference.max() <= 4
    assert difference.mean() <= 0.02
    assert (difference > 0).float().mean() <= 0.01


def test_without_saturation_and_hue_it_is_exact(images: list[np.ndarray]):
    jitter = np.array([[-12.5, 1, 1.3, 1, 0], [20.25, 0, 0.7, 1, 0]], np.float32)
    ours = photometric_distortion(batch_of(images[:2]), torch.from_numpy(jitter))
    theirs = batch_of([apply_jitter(i, j) for i, j in zip(images, jitter, strict=False)])
    torch.testing.assert_close(ours, theirs.float(), atol=0, rtol=0)


def test_no_jitter_is_the_identity_and_depth_is_never_touched(images: list[np.ndarray]):
    colour = batch_of(images[:2])
    image = torch.cat([colour, colour[:, :1]], dim=1)
    jitter = torch.from_numpy(np.stack([NO_JITTER, draw_jitter(np.random.RandomState(5))]))
    out = photometric_distortion(image, jitter)
    torch.testing.assert_close(out[0], image[0].float(), atol=0, rtol=0)
    torch.testing.assert_close(out[:, 3], image[:, 3].float(), atol=0, rtol=0)
    assert (out[1, :3] != image[1, :3]).any()

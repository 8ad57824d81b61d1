"""DiTGuide: its schedule, and that steps reach the network as DiT counts them."""

import numpy as np
import torch
from test_transformer import inputs, loaded, value

from segmill.models.generative.codec import PixelCodec
from segmill.models.generative.dit import DiTGuide
from segmill.models.generative.guide import Guide
from segmill.models.guide_view import GuideView


class FourChannels(PixelCodec):
    def __init__(self) -> None:
        super().__init__(factor=8, mean=0.0, std=1.0)
        self.channels = 4


def guide() -> DiTGuide:
    view = GuideView(short=64, window=None, stride=None, multiple=16)
    return DiTGuide(network=loaded("dit_8"), codec=FourChannels(), view=view, weights=None)


def test_it_is_a_guide():
    assert isinstance(guide(), Guide)


def test_the_noise_is_the_originals_at_the_same_step():
    made, (latent, steps, classes) = guide(), inputs("dit_8")
    with torch.no_grad():
        noise = made.predict(latent, steps / 1000, classes[:, None])[:, 0]
    # float32 with sines of times near 1000, as in test_transformer.
    torch.testing.assert_close(noise, value("dit_8", "out")[:, :4], rtol=0, atol=3e-5)


def test_the_latent_fades_by_the_published_schedule():
    kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    latent, noise = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    noisy, target = guide().noisy(latent, noise, torch.tensor([0.0, 0.1, 1.0]))
    assert torch.equal(target, noise)
    for row, step in enumerate((0, 100, 999)):
        expected = kept[step] ** 0.5 * latent[row] + (1 - kept[step]) ** 0.5 * noise[row]
        # float32 has 1 - signal of the first step, 1e-4, to three digits: its root to 3e-6.
        torch.testing.assert_close(noisy[row], expected.float(), rtol=0, atol=1e-5)

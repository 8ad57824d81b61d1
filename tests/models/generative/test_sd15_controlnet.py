"""The published method's guide computes what diffusers' pipeline and scheduler compute."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_pipelines
import torch
from tiny_pipelines import classes_file, filled, guide
from torch import Tensor

from segmill.errors import SegmillError
from segmill.models.generative.guide import Guide

CLASSES = torch.tensor([[0, 1, 8], [2, 3, 8]])


@pytest.fixture(scope="module")
def model() -> Any:
    return filled("sd15_tiny")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("sd15")
    return tiny_pipelines.sd15_pipeline(folder / "model"), folder


def keys_for(folder: Path) -> list[str]:
    return [
        f"weights={folder / 'model'}",
        f"control_weights={folder / 'model' / 'control'}",
        f"text.classes={classes_file(folder)}",
        f"text.cache={folder / 'cache'}",
    ]


def windows(count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 64, 64), generator=generator, dtype=torch.uint8)


def test_it_is_a_guide(model):
    assert isinstance(model, Guide)
    assert model.num_classes == 8
    assert model.cell == 8
    # Four resolutions down, the middle, four up; and the ControlNet's half of it.
    assert len(model.blocks()) == 9 + 5
    assert all(each.is_meta for each in guide("sd15_tiny").network.parameters())


@pytest.mark.parametrize(
    ("t", "step"), [(0.0, 0), (0.1, 100), (0.25, 250), (0.9996, 999), (1, 999)]
)
def test_noise_is_added_as_by_the_published_scheduler(model, t, step):
    scheduler = diffusers.PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    latent, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    noisy_latent, target = model.noisy(latent, noise, torch.full((2,), float(t)))
    expected = scheduler.add_noise(latent, noise, torch.full((2,), step))
    # The product of a thousand float32 factors, taken in another order.
    torch.testing.assert_close(noisy_latent, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(target, noise)


def test_a_folder_of_diffusers_predicts_as_its_pipeline(saved):
    pipeline, folder = saved
    model = filled("sd15_tiny", *keys_for(folder))
    prompts = ["a photo of a wall", "a photo of a sky", "a photo of a red ball", ""]
    with torch.no_grad():
        text, _ = pipeline.encode_prompt(prompts, torch.device("cpu"), 1, False)
        pixels = 2 * windows(1).float() / 255 - 1
        latent = model.encode(windows(1))
        theirs = pipeline.vae.encode(pixels).latent_dist.mean * 0.18215
        # float32, the same operations in other batches.
        torch.testing.assert_close(latent, theirs, atol=1e-5, rtol=1e-5)
        latents, step = latent.expand(4, -1, -1, -1), torch.full((4,), 100)
        control = torch.zeros(4, 3, 64, 64)
        down, middle = pipeline.controlnet(
            latents, step, encoder_hidden_states=text, controlnet_cond=control, return_dict=False
        )
        expected = pipeline.unet(
            latents,
            step,
            encoder_hidden_states=text,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        ).sample
        ours = model.predict(latent, torch.tensor([0.1]), torch.arange(4)[None])[0]
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=2e-5)
    assert (expected[0] - expected[1]).abs().max() > 1e-4
    alone = pipeline.unet(latents, step, encoder_hidden_states=text).sample
    assert (expected - alone).abs().max() > 1e-3, "the ControlNet takes part"


def test_both_networks_adapt_and_nothing_else(model):
    latent = model.encode(windows())
    t = torch.full((2,), 0.1)
    noisy_latent, target = model.noisy(latent, torch.randn_like(latent), t)
    (model.predict(noisy_latent, t, CLASSES) - target[:, None]).pow(2).mean().backward()
    for part in (model.network.unet, model.network.controlnet):
        # An empty control image meets the weights of the first layer as zeros.
        grads = [each.grad for each in part.parameters()]
        assert all(each is not None for each in grads)
        assert sum(bool(each.abs().max() > 0) for each in grads) > 0.9 * len(grads)
    assert all(each.grad is None for each in model.codec.parameters())
    model.network.zero_grad()


def test_everything_is_float32_under_autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        latent = model.encode(windows())
        t = torch.full((2,), 0.1)
        noisy_latent, target = model.noisy(latent, latent, t)
        prediction = model.predict(noisy_latent, t, CLASSES)
    for each in (latent, noisy_latent, target, prediction):
        assert each.dtype == torch.float32


def test_another_schedule_is_refused(saved):
    _, folder = saved
    file = folder / "model" / "scheduler" / "scheduler_config.json"
    text = file.read_text()
    file.write_text(text.replace('"epsilon"', '"v_prediction"'))
    try:
        with pytest.raises(SegmillError, match="prediction_type=v_prediction"):
            guide("sd15_tiny", *keys_for(folder))
    finally:
        file.write_text(text)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["control_weights=some/thing"], "both as random"),
        (["unet.blocks=3"], "has no such size"),
        (["view.short=96", "view.window=96", "view.multiple=32"], "multiple of 64"),
    ],
)
def test_wrong_settings_are_refused(overrides, message):
    with pytest.raises(SegmillError, match=message):
        guide("sd15_tiny", *overrides)

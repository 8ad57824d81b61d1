"""SD3Guide computes what diffusers computes, alone and collapsed, in float32 and bfloat16."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_pipelines
import torch
from tiny_pipelines import classes_file, filled, guide, node
from torch import Tensor

from segmill.errors import SegmillError
from segmill.models.generative.guide import Guide
from segmill.models.generative.shared_token import SharedTokenAttention

CPU = torch.device("cpu")
CLASSES = torch.tensor([[0, 1, 8], [2, 3, 8]])


def windows(count: int = 2, size: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (count, 3, size, size)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def noisy(model: Any, count: int = 2) -> tuple[Tensor, Tensor]:
    """Noisy latents, and their times."""
    latent = model.encode(windows(count))
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(1))
    t = torch.linspace(0.25, 0.6, count)
    return model.noisy(latent, noise, t)[0], t


@pytest.fixture(scope="module")
def model() -> Any:
    return filled("sd3_tiny")


def test_it_is_a_guide(model):
    assert isinstance(model, Guide)
    assert model.num_classes == 8
    assert model.cell == 8
    assert len(model.blocks()) == 2


def test_the_network_has_no_memory_before_it_is_filled():
    built = guide("sd3_tiny")
    assert all(each.is_meta for each in built.network.parameters())
    assert all(each.requires_grad for each in built.network.parameters())


def test_random_values_are_the_same_every_time(model):
    again = filled("sd3_tiny")
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert torch.equal(model.tokens, again.tokens)
    assert torch.equal(model.network.pos_embed.pos_embed, plain(model).pos_embed.pos_embed)


def test_codec_and_text_are_frozen_and_no_weights(model):
    assert not any(each.requires_grad for each in model.codec.parameters())
    assert {name for name, _ in model.named_buffers()} >= {"tokens", "pooled"}
    assert not {"tokens", "pooled"} & model.state_dict().keys()
    assert not model.encode(windows()).requires_grad


def test_the_target_is_the_velocity_from_data_to_noise(model):
    latent, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.0, 0.25])
    noisy_latent, target = model.noisy(latent, noise, t)
    assert torch.equal(noisy_latent[0], latent[0])
    torch.testing.assert_close(noisy_latent[1], latent[1] + 0.25 * target[1])
    assert torch.equal(target, noise - latent)


def plain(model: Any) -> Any:
    """The same network as diffusers runs it, with its own attention."""
    network = diffusers.SD3Transformer2DModel(**node("sd3_tiny")["transformer"]).eval()
    own = network.pos_embed.pos_embed.clone()
    network.load_state_dict(model.network.state_dict())
    assert torch.equal(own, network.pos_embed.pos_embed)
    return network


def plain_prediction(
    network: Any, model: Any, noisy_latent: Tensor, t: Tensor, *, zeros: int = 16
) -> Tensor:
    """Window by window and class by class, with all of T5's zero tokens."""
    predictions = []
    for latent, time, classes in zip(noisy_latent, t, CLASSES, strict=True):
        for k in classes:
            text = torch.nn.functional.pad(model.tokens[k], (0, 0, 0, zeros))[None]
            predictions.append(
                network(
                    latent[None],
                    encoder_hidden_states=text,
                    pooled_projections=model.pooled[k][None],
                    timestep=1000 * time[None],
                ).sample
            )
    return torch.cat(predictions).unflatten(0, CLASSES.shape)


# Sums in another order: the same 93 tokens, but in batches of six instead of one.
REORDERED = {"atol": 2e-5, "rtol": 1e-5}


@pytest.mark.parametrize("collapse", ["true", "false"])
def test_predictions_are_those_of_diffusers(collapse):
    model = filled("sd3_tiny", f"collapse_t5={collapse}")
    noisy_latent, t = noisy(model)
    with torch.no_grad():
        ours = model.predict(noisy_latent, t, CLASSES)
        theirs = plain_prediction(plain(model), model, noisy_latent, t)
    torch.testing.assert_close(ours, theirs, **REORDERED)


def test_one_token_for_all_has_the_gradients_of_all(model):
    """The bias of the text's first layer is all that zero tokens are made of."""
    network = plain(model)
    noisy_latent, t = noisy(model)
    weight = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    (model.predict(noisy_latent, t, CLASSES) * weight).sum().backward()
    (plain_prediction(network, model, noisy_latent, t) * weight).sum().backward()
    theirs = {name: each.grad for name, each in network.named_parameters()}
    for name, parameter in model.network.named_parameters():
        if parameter.grad is None:
            assert theirs[name] is None, name
            continue
        # Relative to the largest: gradients of a sum over 1152 outputs, added in another order.
        scale = theirs[name].abs().max().item()
        torch.testing.assert_close(
            parameter.grad, theirs[name], atol=2e-5 * scale, rtol=0, msg=name
        )
    assert model.network.context_embedder.bias.grad.abs().max() > 0
    model.network.zero_grad()


@pytest.mark.parametrize("qk_norm", ["rms_norm", "layer_norm", None])
def test_the_shared_token_is_exact_in_the_blocks_of_sd35(qk_norm):
    torch.manual_seed(0)
    sizes: Any = {"qk_norm": qk_norm, "dual_attention_layers": (0,)}
    network = diffusers.SD3Transformer2DModel(**{**node("sd3_tiny")["transformer"], **sizes}).eval()
    tiny_pipelines.randomise(network)
    latent, pooled, clip = torch.randn(2, 4, 8, 8), torch.randn(2, 20), torch.randn(2, 5, 24)
    inputs = {"pooled_projections": pooled, "timestep": torch.tensor([250.0, 700.0])}

    def run(zeros: int) -> Tensor:
        text = torch.nn.functional.pad(clip, (0, 0, 0, zeros))
        return network(latent, encoder_hidden_states=text, **inputs).sample

    with torch.no_grad():
        every, one = run(256), run(1)
        for block in network.transformer_blocks:
            block.attn.set_processor(SharedTokenAttention(256))
        shared = run(1)
    scale = every.abs().max()
    # float32, sums in another order; without the count the result is another one altogether.
    assert (shared - every).abs().max() < 1e-5 * scale
    assert (one - every).abs().max() > 1e-3 * scale


def test_the_shared_token_is_as_good_in_bfloat16(model):
    """Its error is rounding, as that of all tokens is: log(256) never has to be a bfloat16."""
    every = filled("sd3_tiny", "collapse_t5=false")
    noisy_latent, t = noisy(model)
    with torch.no_grad():
        exact = model.predict(noisy_latent, t, CLASSES)
        with torch.autocast("cpu", torch.bfloat16):
            errors = [
                (each.predict(noisy_latent, t, CLASSES) - exact).pow(2).mean().sqrt()
                for each in (model, every)
            ]
    # Two draws of the same rounding error differ by some ten percent.
    assert errors[0] < 1.5 * errors[1]
    assert errors[0] < 0.02 * exact.pow(2).mean().sqrt()


def test_everything_is_float32_under_autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        noisy_latent, t = noisy(model)
        latent = model.encode(windows())
        _, target = model.noisy(latent, latent, t)
        prediction = model.predict(noisy_latent, t, CLASSES)
    for each in (noisy_latent, latent, target, prediction):
        assert each.dtype == torch.float32


@pytest.fixture(scope="module", params=[False, True], ids=["clip", "t5"])
def saved(request, tmp_path_factory) -> tuple[Any, Path, bool]:
    """A pipeline of diffusers, the folder it was saved in, and whether it has T5."""
    folder = tmp_path_factory.mktemp("sd3")
    return tiny_pipelines.sd3_pipeline(folder / "model", t5=request.param), folder, request.param


def keys_for(folder: Path, t5: bool) -> list[str]:
    return [
        f"weights={folder / 'model'}",
        f"text.classes={classes_file(folder)}",
        f"text.cache={folder / 'cache'}",
        f"t5={str(t5).lower()}",
        "t5_tokens=32",
        f"collapse_t5={str(not t5).lower()}",
    ]


def test_a_folder_of_diffusers_predicts_as_its_pipeline(saved):
    pipeline, folder, t5 = saved
    model = filled("sd3_tiny", *keys_for(folder, t5), "text.prompts={sky: the blue sky}")
    assert model.num_classes == 3
    prompts = ["a photo of a wall", "the blue sky", "a photo of a red ball", ""]
    with torch.no_grad():
        text, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, max_sequence_length=32, do_classifier_free_guidance=False
        )
        pixels = 2 * windows(1).float() / 255 - 1
        vae = pipeline.vae
        theirs = (vae.encode(pixels).latent_dist.mean - 0.0609) * 1.5305
        latent = model.encode(windows(1))
        # float32, the same operations in other batches.
        torch.testing.assert_close(latent, theirs, atol=1e-5, rtol=1e-5)
        ours = model.predict(latent, torch.tensor([0.25]), torch.arange(4)[None])[0]
        expected = pipeline.transformer(
            latent.expand(4, -1, -1, -1),
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=torch.full((4,), 250.0),
        ).sample
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=2e-5)
    assert (expected[0] - expected[1]).abs().max() > 1e-3


def test_sizes_of_the_folder_must_agree(saved):
    _, folder, t5 = saved
    with pytest.raises(SegmillError, match=r"transformer\.num_layers=3 \(2 there\)"):
        guide("sd3_tiny", *keys_for(folder, t5), "transformer.num_layers=3")
    taken = guide("sd3_tiny", *keys_for(folder, t5), "transformer=null")
    assert len(taken.blocks()) == 2


def test_the_codecs_scale_must_agree(saved):
    _, folder, t5 = saved
    with pytest.raises(SegmillError, match=r"scale=1\.0.*says shift=0\.0609, scale=1\.5305"):
        filled("sd3_tiny", *keys_for(folder, t5), "codec.scale=1.0")


def test_weights_are_loaded_strictly(saved):
    _, folder, t5 = saved
    with pytest.raises(SegmillError, match="of wrong shape"):
        filled("sd3_tiny", *keys_for(folder, t5), "codec.block_channels=[8,8,8,16]")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["transformer.layers=3"], "has no such size"),
        (["t5=true"], "collapse_t5=false"),
        (["transformer=null"], "give them"),
        (["view.short=40", "view.window=40", "view.multiple=8"], "multiple of 16"),
        (["text.template=photo"], "once, where the class goes"),
        (["text.prompts={dragon: a dragon}"], "'dragon', which is no class"),
    ],
)
def test_wrong_settings_are_refused(overrides, message):
    with pytest.raises(SegmillError, match=message):
        guide("sd3_tiny", *overrides)


def test_windows_beyond_the_positions_are_refused(model):
    latent = torch.zeros(1, 4, 8, 34)
    with pytest.raises(SegmillError, match=r"34 latent cells a side, .* for 32 \(256 pixels\)"):
        model.predict(latent, torch.zeros(1), torch.zeros(1, 1, dtype=torch.long))

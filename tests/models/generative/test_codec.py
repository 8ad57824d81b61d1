"""Codecs: scale, frozen weights, files of every origin, and what is said when one is missing."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from segmill.checkpoint.load import save_safetensors
from segmill.errors import SegmillError
from segmill.models.generative.codec import Codec, KLCodec, PixelCodec, TinyCodec, codec_file

SMALL = {
    "channels": 4,
    "block_channels": [4, 8],
    "layers_per_block": 1,
    "norm_groups": 2,
    "quant_conv": True,
    "shift": 0.5,
    "scale": 2.0,
}


def pixels(height: int = 16, width: int = 24) -> torch.Tensor:
    draw = np.random.RandomState(0).randint(0, 256, (2, 3, height, width))
    return torch.from_numpy(draw.astype(np.uint8))


def tiny(weights: str | None, **changes: object) -> TinyCodec:
    settings: dict = {"channels": 4, "mean": None, "std": None, **changes}
    return TinyCodec(weights=weights, **settings)


@pytest.fixture(scope="module")
def autoencoder():
    """diffusers' own, small in the number of latent channels only."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    return AutoencoderTiny(latent_channels=4).eval()


@pytest.fixture(scope="module")
def tiny_folder(autoencoder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("taesd")
    autoencoder.save_pretrained(folder)
    return folder


def expected_latent(autoencoder) -> torch.Tensor:
    with torch.no_grad():
        return autoencoder.encode(pixels().float() / 127.5 - 1).latents


def test_a_pixel_codec_averages_squares():
    codec = PixelCodec(factor=4, mean=0.5, std=2.0)
    latent = codec.encode(pixels())
    assert (codec.channels, codec.cell, latent.shape) == (3, 4, (2, 3, 4, 6))
    colour = pixels()[1, 2, 4:8, 8:12].float().mean() / 127.5 - 1
    # One float32 sum in another order.
    torch.testing.assert_close(latent[1, 2, 1, 2], (colour - 0.5) / 2, rtol=1e-5, atol=1e-6)
    assert isinstance(codec, Codec)


def test_a_folder_of_diffusers_gives_its_latents(autoencoder, tiny_folder):
    latent = tiny(str(tiny_folder)).encode(pixels())
    assert torch.equal(latent, expected_latent(autoencoder))
    assert latent.dtype == torch.float32


def test_taesds_own_files_load_by_their_numbers(autoencoder, tmp_path: Path):
    state = autoencoder.encoder.layers.state_dict()  # named 0.weight, 1.conv.0.weight, ...
    save_safetensors(tmp_path / "taesd_encoder.safetensors", state, {})
    latent = tiny(str(tmp_path / "taesd_encoder.safetensors")).encode(pixels())
    assert torch.equal(latent, expected_latent(autoencoder))


def test_latents_are_normalised_channel_by_channel(tiny_folder):
    plain = tiny(str(tiny_folder)).encode(pixels())
    mean, std = [0.1, -0.2, 0.3, 0.0], [0.5, 1.0, 2.0, 4.0]
    latent = tiny(str(tiny_folder), mean=mean, std=std).encode(pixels())
    for index in range(4):
        expected = (plain[:, index] - mean[index]) / std[index]
        # The same float32 operations.
        torch.testing.assert_close(latent[:, index], expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(SegmillError, match="one for each channel"):
        tiny(str(tiny_folder), mean=[0.0])


def test_statistics_are_no_part_of_the_file(tiny_folder):
    codec = tiny(str(tiny_folder), mean=[0.0] * 4, std=[1.0] * 4)
    assert all(name.startswith("encoder.layers.") for name in codec.state_dict())


def test_a_codec_is_frozen(tiny_folder):
    codec = tiny(str(tiny_folder))
    assert not any(each.requires_grad for each in codec.parameters())
    assert not codec.encode(pixels().float().requires_grad_()).requires_grad


@pytest.fixture(scope="module")
def variational():
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=2,
    ).eval()


def test_latents_of_a_variational_autoencoder_are_scaled_means(variational, tmp_path: Path):
    variational.save_pretrained(tmp_path)
    codec = KLCodec(weights=str(tmp_path), **SMALL)
    with torch.no_grad():
        mean = variational.encode(pixels().float() / 127.5 - 1).latent_dist.mean
    assert codec.cell == 2
    # The same float32 operations; the posterior's own class copies the mean.
    torch.testing.assert_close(codec.encode(pixels()), (mean - 0.5) * 2, rtol=1e-6, atol=1e-6)


def test_older_files_name_the_attention_otherwise(variational, tmp_path: Path):
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, value in variational.state_dict().items():
        for new, old in names.items():
            name = name.replace(new, old)
        state[name] = value
    assert any("proj_attn" in name for name in state)
    save_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", state, {})
    codec = KLCodec(weights=str(tmp_path), **SMALL)
    attention = codec.encoder.mid_block.attentions[0]
    expected = variational.encoder.mid_block.attentions[0].to_out[0].weight
    assert torch.equal(attention.to_out[0].weight, expected)


def test_the_autoencoder_of_a_whole_pipeline_is_found(variational, tmp_path: Path):
    variational.save_pretrained(tmp_path / "vae")
    assert codec_file(str(tmp_path)).parent == tmp_path / "vae"


def test_a_missing_file_is_one_paragraph(tmp_path: Path):
    missing = str(tmp_path / "taesd3_encoder.safetensors")
    with pytest.raises(SegmillError, match=r"github\.com/madebyollin/taesd") as caught:
        tiny(missing)
    assert missing in str(caught.value)


def test_a_file_of_something_else_is_refused(tmp_path: Path):
    save_safetensors(tmp_path / "x.safetensors", nn.Linear(2, 2).state_dict(), {})
    with pytest.raises(SegmillError, match="do not fit"):
        tiny(str(tmp_path / "x.safetensors"))


def test_an_empty_codec_is_not_used_in_silence():
    with pytest.raises(SegmillError, match=r"codec\.weights is null"):
        tiny(None).encode(pixels())


def test_on_the_meta_device_only_shapes_are_asked_for():
    with torch.device("meta"):
        codec = tiny("nowhere.safetensors")
    assert codec.encode(pixels().to("meta")).shape == (2, 4, 2, 3)


def test_without_diffusers_the_hint_is_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers.models.autoencoders.vae", None)
    with pytest.raises(SegmillError, match=r"segmill\[tta\]"):
        tiny(None)


def test_taesd3_encodes_a_street_into_latents_that_its_decoder_can_read(real_data: Path):
    from diffusers import AutoencoderTiny

    weights = real_data / "samples" / "weights"
    codec = tiny(str(weights / "taesd3_encoder.safetensors"), channels=16)
    decoder = AutoencoderTiny(latent_channels=16).decoder.eval()
    from segmill.checkpoint.keys import Rename
    from segmill.checkpoint.load import load_arrays
    from segmill.checkpoint.read import read_checkpoint

    # diffusers counts the decoder's layers without the clamp at its start.
    rules = [Rename(rf"{n}\.(.+)", rf"layers.{n - 1}.\1") for n in range(1, 20)]
    load_arrays(decoder, read_checkpoint(weights / "taesd3_decoder.safetensors"), rules=rules)
    import cv2

    file = sorted((real_data / "camvid" / "images" / "train").glob("*.jpg"))[0]
    image = cv2.cvtColor(cv2.resize(cv2.imread(str(file)), (240, 176)), cv2.COLOR_BGR2RGB)
    window = torch.from_numpy(image).permute(2, 0, 1)[None]
    with torch.no_grad():
        decoded = (decoder(codec.encode(window)) * 127.5 + 127.5).clamp(0, 255)
    error = (decoded - window.float()).square().mean()
    # 33 dB at full size, as measured when the file was added to the samples; 26 dB is far above
    # what a wrong scale, order of channels or layer would give.
    assert 10 * torch.log10(255**2 / error) > 26

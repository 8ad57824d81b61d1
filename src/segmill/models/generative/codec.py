"""Codecs: pixels become the latents that a guide works on. Frozen; adaptation needs no decoder.

Weights: TAESD's own files and diffusers' AutoencoderTiny (`TinyCodec`), diffusers' AutoencoderKL
         (`KLCodec`), each as a file, a folder or a hub id. A trained guide's file holds its codec
         too, so `weights` is null where such a file is opened.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from segmill.checkpoint.keys import Drop, Rename, Rule
from segmill.checkpoint.load import choose_rules, load_arrays, looks_like_hub_id
from segmill.checkpoint.read import read_checkpoint
from segmill.errors import SegmillError

Window = UInt8[Tensor, "N 3 H W"] | Float[Tensor, "N 3 H W"]
RANDOM = "random"  # in the place of a file: to measure speed and memory
NAMES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
FILES = (*NAMES, *(f"vae/{name}" for name in NAMES))  # whole pipelines have a folder for it

KEYS_OF_TAESD: tuple[Rule, ...] = (Rename(r"(\d+\..+)", r"encoder.layers.\1"),)
KEYS_OF_AUTOENCODERS: tuple[Rule, ...] = (
    Drop(r"(decoder|post_quant_conv)\..+"),
    # diffusers renamed the attention's parts in 2023; the files on the hub have the old names.
    *(
        Rename(rf"(.+\.attentions\.\d\.){old}\.(.+)", rf"\1{new}.\2")
        for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"))
    ),
    Rename(r"(.+\.attentions\.\d\.)proj_attn\.(.+)", r"\1to_out.0.\2"),
)


@runtime_checkable
class Codec(Protocol):
    """What a guide asks of it: `channels` of a latent, and the `cell` (pixels) of each of them."""

    channels: int
    cell: int

    def encode(self, window: Window) -> Float[Tensor, "N C h w"]:
        """Latents of about unit variance, float32, of pixels in 0..255; without gradient."""
        ...


class PixelCodec(nn.Module):
    """No autoencoder: the mean colour of `factor` x `factor` pixels, in -1..1, normalised."""

    def __init__(self, *, factor: int, mean: float, std: float) -> None:
        super().__init__()
        self.channels, self.cell = 3, factor
        self.mean, self.std = mean, std

    @torch.no_grad()
    def encode(self, window: Window) -> Float[Tensor, "N C h w"]:
        """Latents of about unit variance, of pixels in 0..255."""
        return (F.avg_pool2d(_signed(window), self.cell) - self.mean) / self.std


class TinyCodec(nn.Module):
    """The encoder of TAESD and its kin (diffusers' AutoencoderTiny), 8 pixels a cell.

    Its latents are in the scale of the model that it stands in for. `mean` and `std`, one value
    for each latent channel, normalise them for a guide that is trained from scratch.
    """

    mean: Float[Tensor, "C 1 1"]
    std: Float[Tensor, "C 1 1"]

    def __init__(
        self,
        *,
        weights: str | None,
        channels: int,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
    ) -> None:
        super().__init__()
        self.channels, self.cell = channels, 8
        try:
            from diffusers.models.autoencoders.vae import EncoderTiny
        except ImportError as error:
            raise _without_diffusers() from error
        self.encoder = EncoderTiny(3, channels, (1, 3, 3, 3), (64, 64, 64, 64), "relu")
        for name, values, neutral in (("mean", mean, 0.0), ("std", std, 1.0)):
            values = [neutral] * channels if values is None else list(values)
            if len(values) != channels:
                raise SegmillError(
                    f"codec.{name} has {len(values)} values, the codec {channels} channels. Give "
                    "one for each channel, or null for none."
                )
            tensor = torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)
            self.register_buffer(name, tensor, persistent=False)
        self._empty = weights is None
        _fill(self, weights)

    @torch.no_grad()
    def encode(self, window: Window) -> Float[Tensor, "N C h w"]:
        """Latents of pixels in 0..255; computed in the precision of the autocast around it."""
        self._empty = self._empty and _refuse_empty(self)
        return (self.encoder(_signed(window)).float() - self.mean) / self.std

    def key_rules(self) -> dict[str, tuple[Rule, ...]]:
        """Rules from TAESD's own files, and from those of diffusers."""
        return {"taesd": KEYS_OF_TAESD, "diffusers": KEYS_OF_AUTOENCODERS}


class KLCodec(nn.Module):
    """The encoder of a variational autoencoder (diffusers' AutoencoderKL); latents are its means.

    A latent is (mean - shift) * scale; both are in the `config.json` of the weights.
    """

    def __init__(
        self,
        *,
        weights: str | None,
        channels: int,
        block_channels: Sequence[int],
        layers_per_block: int,
        norm_groups: int,
        quant_conv: bool,
        shift: float,
        scale: float,
    ) -> None:
        super().__init__()
        self.channels, self.cell = channels, 2 ** (len(block_channels) - 1)
        self.shift, self.scale = shift, scale
        try:
            from diffusers.models.autoencoders.vae import Encoder
        except ImportError as error:
            raise _without_diffusers() from error
        self.encoder = Encoder(
            out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * len(block_channels),
            block_out_channels=tuple(block_channels),
            layers_per_block=layers_per_block,
            norm_num_groups=norm_groups,
        )
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1) if quant_conv else None
        self._empty = weights is None
        _fill(self, weights)

    @torch.no_grad()
    def encode(self, window: Window) -> Float[Tensor, "N C h w"]:
        """Latents of pixels in 0..255; computed in the precision of the autocast around it."""
        self._empty = self._empty and _refuse_empty(self)
        moments = self.encoder(_signed(window))
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        return (moments[:, : self.channels].float() - self.shift) * self.scale

    def key_rules(self) -> dict[str, tuple[Rule, ...]]:
        """Rules from the files of diffusers."""
        return {"diffusers": KEYS_OF_AUTOENCODERS}


def codec_file(weights: str, *, key: str = "codec.weights") -> Path:
    """The file of a codec's weights; raises SegmillError, which says where to get it.

    `key` is the setting that names it.
    """
    path = Path(weights)
    if path.is_dir():
        path = next((path / name for name in FILES if (path / name).is_file()), path / FILES[0])
    elif not path.exists() and looks_like_hub_id(weights):
        # Only hub ids need its client.
        from segmill.checkpoint.pretrained import hub_file

        return hub_file(weights, FILES, key=key)
    if not path.is_file():
        raise SegmillError(
            f"The weights of the guide's codec are missing: {path} does not exist (seen from "
            f"{Path.cwd()}). TAESD's and TAESD3's encoders are at github.com/madebyollin/taesd "
            "(taesd3_encoder.pth or .safetensors, 5 MB), Stable Diffusion's autoencoder is "
            f"stabilityai/sd-vae-ft-ema on the hub. Give {key}=FILE, a folder or a hub id."
        )
    return path


def _signed(window: Window) -> Float[Tensor, "N 3 H W"]:
    """Pixels of 0..255 as -1..1."""
    return window.float() / 127.5 - 1


def _fill(codec: nn.Module, weights: str | None) -> None:
    """Freeze, and load `weights`. Without any, nothing but a later load makes it usable."""
    codec.requires_grad_(False).eval()
    if next(codec.parameters()).is_meta:
        return  # only shapes are asked for
    if weights == RANDOM:
        return  # as it is built
    if weights is None:
        for parameter in codec.parameters():
            parameter.fill_(torch.nan)
        return
    arrays = read_checkpoint(codec_file(weights))
    _, rules = choose_rules(codec, arrays)
    load_arrays(codec, arrays, rules=rules)


def _refuse_empty(codec: nn.Module) -> bool:
    """False, once: whatever was to be loaded after building has been loaded."""
    first = next(codec.parameters())
    if not first.is_meta and bool(first.isnan().any()):
        raise SegmillError(
            "The guide's codec has no weights: codec.weights is null, which is for files that hold "
            "the codec too (a trained guide's). Give codec.weights=FILE."
        )
    return False


def _without_diffusers() -> SegmillError:
    return SegmillError(
        'Autoencoders of guides come from diffusers, which is not installed: pip install "'
        'segmill[tta]". A guide on pixels (PixelCodec) needs none.'
    )

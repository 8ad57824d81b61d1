"""Contestants of benchmark 10 (adaptation.py): our step of DUSA, and the published loop.

Ours is CombinedModel and Dusa, as `segmill adapt tta=dusa` runs them on one GPU.

The published loop is re-created with transformers' SegFormer and diffusers' transformer and VAE:
windows are encoded one by one; every condition has all text tokens; the loss is two halves, each
detached from the other model, each with a backward of its own; the SegFormer's graph is kept, and
gone through backward once a window; torch.optim.AdamW as it comes. It is spared the choice of
classes, which are given, and reads the logits of a window's own region, as ours does.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import JointAttnProcessor2_0
from jaxtyping import Float
from torch import Tensor, nn

from segmill.checkpoint.load import choose_rules, load_arrays
from segmill.configuration import build, compose
from segmill.models.combined import CombinedModel, Update
from segmill.models.generative.model_folder import from_diffusers
from segmill.models.generative.sd3 import STEPS, SD3Guide
from segmill.models.joint_loss import JointLoss
from segmill.optim import OptimizerSettings
from segmill.tta.dusa import Dusa
from segmill.tta.method import Updater, Views
from segmill.tta.sharding import compile_blocks, repeated_blocks

SIZE, TINY_SIZE = (512, 683), (64, 85)  # height, width: two windows
CLASSES = 20
SEED = 0
MODELS = ("model.generative.weights=random", f"model.loss.min_classes={CLASSES}")
REAL = ("model/discriminative=segformer_mit-b5_linear", "model/generative=sd3")
HEAD = "segmill.models.families.segformer.LinearHead"
TINY = (
    "model/discriminative=segformer_tiny",
    "model/generative=sd3_tiny",
    f"model.discriminative.network.decode_head._target_={HEAD}",
    "model.discriminative.network.backbone.norm_eps=1.0e-5",
)


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to run our step."""

    compiled: bool  # SD3's blocks
    segformer_compiled: bool
    collapsed: bool  # one text token for T5's 256
    frozen: bool  # the guide learns nothing
    class_chunk: int | None
    windows_at_once: int | None


OURS = Way(
    compiled=True,
    segformer_compiled=True,
    collapsed=True,
    frozen=False,
    class_chunk=None,
    windows_at_once=1,  # `processes`, of which there is one
)
EAGER = replace(OURS, compiled=False, segformer_compiled=False)
PLAIN = replace(EAGER, collapsed=False)  # as diffusers runs


class Contestant(Protocol):
    """A step to be timed; it changes the weights if its updater does."""

    updater: Updater

    def prepare(self) -> None:
        """Set the shared models up for this one; not timed."""
        ...

    def __call__(self) -> Float[Tensor, ""]:
        """One image; returns its loss."""
        ...


class Setup:
    """The models, which all contestants share, and the ways in which SD3 can be run."""

    def __init__(self, *, tiny: bool, compiled: bool, device: torch.device) -> None:
        config = compose("adapt", [*(TINY if tiny else REAL), *MODELS])
        torch.manual_seed(SEED)
        self.device = device
        self.segformer = _transformers_segformer(config)
        self.model: CombinedModel = build(config.model)
        self.loss = self.model.loss
        self.optimizer: OptimizerSettings = build(config.optimizer)
        arrays = {name: each.numpy() for name, each in self.segformer.model.state_dict().items()}
        discriminative = self.model.discriminative.network
        load_arrays(discriminative, arrays, rules=choose_rules(discriminative, arrays)[1])
        assert isinstance(self.model.generative, SD3Guide)
        self.guide: SD3Guide = self.model.generative
        self.guide.fill(device)
        self.model.to(device).eval()
        self.segformer.to(device)
        self.vae = _diffusers_vae(config.model.generative.codec, self.guide)
        shape = (1, 3, *(TINY_SIZE if tiny else SIZE))
        image = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        self.views = Views(image=image, original=image)
        self.t5_tokens: int = config.model.generative.t5_tokens
        self._collapsed = [block.attn.processor for block in self.guide.blocks()]
        self._plain = JointAttnProcessor2_0()
        of_guide = self.guide.blocks()
        of_segformer = repeated_blocks(self.model.discriminative.network)
        if compiled:
            compile_blocks(of_segformer + of_guide)
        self._of_guide = [(block, block.forward) for block in of_guide]
        self._of_segformer = [(block, block.forward) for block in of_segformer]

    def use(self, way: Way, loss: JointLoss) -> None:
        """Run SD3, and our step, in this way from now on."""
        for block, collapsed in zip(self.guide.blocks(), self._collapsed, strict=True):
            block.attn.set_processor(collapsed if way.collapsed else self._plain)
        of_both = ((self._of_guide, way.compiled), (self._of_segformer, way.segformer_compiled))
        for blocks, compiled in of_both:
            for block, forward in blocks:
                block.__dict__.pop("forward", None)
                if compiled:
                    block.forward = forward
        self.guide.zeros = 1 if way.collapsed else self.t5_tokens
        self.guide.network.requires_grad_(not way.frozen)
        self.model.update = Update(
            discriminative=True, generative=not way.frozen, update_norm_only=False
        )
        self.model.loss = replace(
            loss, class_chunk=way.class_chunk, windows_at_once=way.windows_at_once
        )

    def generator(self) -> torch.Generator:
        """The same draws for every step."""
        return torch.Generator(self.device).manual_seed(SEED)

    def autocast(self, *, precise: bool) -> torch.autocast:
        """As trainer.precision=bf16-mixed has it, or (precise) nothing."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=not precise)

    def conditions_tflop(self, way: Way) -> float:
        """All conditions of both windows; backward takes twice as much as forward."""
        config = self.guide.network.config
        image = (self.guide.view.short // self.guide.cell // config.patch_size) ** 2
        clip = self.guide.tokens.shape[1]
        keys = clip + self.t5_tokens
        text = clip + 1 if way.collapsed else keys
        width = config.num_attention_heads * config.attention_head_dim
        # Per token and block: queries, keys, values and output 8 width^2, the MLP 16.
        linear = 24 * width**2 * (image + text) * config.num_layers
        last = 18 * width**2 * text  # the last block makes no text of its own
        attention = 4 * width * (image + text) * (image + keys) * config.num_layers
        around = 2 * config.joint_attention_dim * width * text
        forward = (linear - last + attention + around) / 1e12
        return 2 * CLASSES * forward * (1 if way.frozen else 3)


def _transformers_segformer(config: Any) -> Any:
    """transformers' network (SegFormerHF) of the same sizes."""
    network = config.model.discriminative.network
    sizes = [
        f"{each}={list(network.backbone[each])}" for each in ("channels", "depths", "num_heads")
    ]
    sizes.append(f"head_channels={network.decode_head.channels}")
    words = [f"data.num_classes={config.data.num_classes}", *(f"model.network.{e}" for e in sizes)]
    return build(compose("load", ["model=segformer_mit-b5_hf", *words]).model).network.eval()


def _diffusers_vae(codec: Any, guide: SD3Guide) -> Any:
    """diffusers' class around the guide's own encoder."""
    stages = len(codec.block_channels)
    with torch.device("meta"):
        vae = from_diffusers("AutoencoderKL")(
            down_block_types=("DownEncoderBlock2D",) * stages,
            up_block_types=("UpDecoderBlock2D",) * stages,
            block_out_channels=tuple(codec.block_channels),
            layers_per_block=codec.layers_per_block,
            latent_channels=codec.channels,
            norm_num_groups=codec.norm_groups,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    vae.encoder, vae.decoder = guide.codec.encoder, nn.Identity()
    return vae.eval()


class Plain:
    """An Updater without Lightning. What it does to the autocast cache is TTAModule's."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def backward(self, loss: Float[Tensor, ""]) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.zero_grad()
        torch.clear_autocast_cache()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def forget(self) -> None:
        self.optimizer.state.clear()


class KeepGradients:
    """An Updater that changes nothing, so that the gradients can be looked at."""

    def backward(self, loss: Float[Tensor, ""]) -> None:
        loss.backward()

    def step(self) -> None:
        """Leave the weights."""

    def zero_grad(self) -> None:
        """Leave the gradients."""

    def forget(self) -> None:
        """There is nothing to forget."""


class Ours:
    """CombinedModel and Dusa, in one of the ways."""

    def __init__(
        self, setup: Setup, way: Way, loss: JointLoss, updater: Updater, *, precise: bool = False
    ) -> None:
        self.setup, self.way, self.loss, self.updater = setup, way, loss, updater
        self.precise = precise
        self.method = Dusa(model=setup.model, step="image")

    def prepare(self) -> None:
        self.setup.use(self.way, self.loss)

    def __call__(self) -> Float[Tensor, ""]:
        """One image; returns its loss."""
        setup = self.setup
        with setup.autocast(precise=self.precise):
            _, loss = self.method.adapt(setup.views, self.updater, setup.generator())
        return loss


class PublishedLoop:
    """The same step as published, with the tools that it is published for."""

    def __init__(
        self, setup: Setup, loss: JointLoss, updater: Updater, *, precise: bool = False
    ) -> None:
        self.setup, self.loss, self.updater, self.precise = setup, loss, updater, precise
        self.prepare()
        generator, model = setup.generator(), setup.model
        with torch.no_grad(), setup.autocast(precise=precise):
            noisy = model.noisy_windows(setup.views.original, generator)
            logits = model.discriminative(setup.views.image)
            chosen = model.weighted_windows(logits, noisy, generator)
        self.size, self.classes, self.mask = noisy.size, chosen.classes, chosen.mask.float()

    def prepare(self) -> None:
        self.setup.use(PLAIN, self.loss)

    def __call__(self) -> Float[Tensor, ""]:
        """One image; returns its loss."""
        with self.setup.autocast(precise=self.precise):
            loss = self._image()
            self.updater.step()
        return loss

    def _image(self) -> Float[Tensor, ""]:
        setup, guide, generator = self.setup, self.setup.guide, self.setup.generator()
        windows = guide.view.windows(setup.views.original)
        count, (height, width) = len(windows), (side // guide.cell for side in windows.shape[2:])
        shape = (count, guide.codec.channels, height, width)
        t = self.loss.draw_t(count, generator)
        noise = torch.randn(shape, generator=generator, device=setup.device)
        logits = setup.segformer(setup.model.discriminative.normalise(setup.views.image))
        # For all windows at once, because it waits for the device.
        sampled = guide.view.sample(
            F.normalize(logits.float(), dim=1), size=self.size, cell=guide.cell
        )
        losses = []
        for index in range(count):
            with torch.no_grad():
                pixels = windows[index : index + 1] / 127.5 - 1
                latent = setup.vae.encode(pixels).latent_dist.mean.float()
                latent = (latent - guide.codec.shift) * guide.codec.scale
            classes, here = self.classes[index], t[index]
            noisy_latent = (1 - here) * latent + here * noise[index]
            target = noise[index] - latent[0]
            velocity = self._velocity(noisy_latent, here, classes)
            prob = sampled[index, classes].softmax(dim=0)
            loss = self._loss(prob.detach(), velocity, target, index) / count
            loss.backward()
            self._loss(prob, velocity.detach(), target, index).div(count).backward(
                retain_graph=True
            )
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _velocity(
        self, noisy_latent: Float[Tensor, "1 C h w"], t: Float[Tensor, ""], classes: Tensor
    ) -> Float[Tensor, "M C h w"]:
        guide, each = self.setup.guide, len(classes)
        tokens = guide.tokens[classes]
        missing = guide.network.config.joint_attention_dim - tokens.shape[2]
        (velocity,) = guide.network(
            hidden_states=noisy_latent.expand(each, -1, -1, -1),
            timestep=(STEPS * t).expand(each),
            encoder_hidden_states=F.pad(tokens, (0, missing, 0, self.setup.t5_tokens)),
            pooled_projections=guide.pooled[classes],
            return_dict=False,
        )
        return velocity.float()

    def _loss(
        self, prob: Tensor, velocity: Tensor, target: Float[Tensor, "C h w"], index: int
    ) -> Float[Tensor, ""]:
        error = ((prob[:, None] * velocity).sum(dim=0) - target) * self.mask[index]
        return error.square().sum() / (self.mask[index].sum() * len(target))

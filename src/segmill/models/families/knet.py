"""K-Net: the classifier's weights become kernels that look at the image, once per stage.

Paper:   Zhang et al., "K-Net: Towards Unified Image Segmentation", NeurIPS 2021,
         https://arxiv.org/abs/2106.14855
Follows: MMSegmentation 1.2.2 `IterativeDecodeHead` with kernels of 1 x 1, as all its configs have.
Weights: MMSegmentation's knet_* files load through the backbone's key rules.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

from jaxtyping import Float, Integer
from torch import Tensor, nn

from segmill.models.layers import cross_entropy, resize


class PixelHead(Protocol):
    """A head that classifies a map of its own by one convolution."""

    conv_seg: nn.Conv2d
    dropout: nn.Module

    def hidden(
        self, features: Sequence[Float[Tensor, "B _D _h _w"]]
    ) -> Float[Tensor, "B _E _k _l"]: ...


class IterativeDecodeHead(nn.Module):
    """A head's logits and kernels, refined by one update a stage; the last stage is the answer.

    `kernel_generate_head` is called with `in_channels` and has `hidden` and `conv_seg`, as
    FCNHead, PSPHead, ASPPHead and UPerHead. Its map is split into groups of `update_channels`
    that share the weights of the kernel update.
    """

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        kernel_generate_head: Callable[..., PixelHead],
        num_stages: int,
        update_channels: int,
        num_heads: int,
        feedforward_channels: int,
        num_mask_fcs: int,
    ) -> None:
        super().__init__()
        self.kernel_generate_head: PixelHead = kernel_generate_head(in_channels=in_channels)
        self.kernel_update_head = nn.ModuleList(
            KernelUpdateHead(
                channels=self.kernel_generate_head.conv_seg.in_channels,
                update_channels=update_channels,
                num_heads=num_heads,
                feedforward_channels=feedforward_channels,
                num_mask_fcs=num_mask_fcs,
            )
            for _ in range(num_stages)
        )

    def forward(
        self, features: Sequence[Float[Tensor, "B _D _h _w"]]
    ) -> Float[Tensor, "B K _k _l"]:
        return self.stages(features)[-1]

    def stages(
        self, features: Sequence[Float[Tensor, "B _D _h _w"]]
    ) -> list[Float[Tensor, "B K _k _l"]]:
        """Logits of the generating head, then of every update."""
        head = self.kernel_generate_head
        hidden = head.hidden(features)
        logits = [head.conv_seg(head.dropout(hidden))]
        kernels = head.conv_seg.weight.flatten(1).expand(len(hidden), -1, -1)
        for update in self.kernel_update_head:
            refined, kernels = update(hidden, kernels, logits[-1])
            logits.append(refined)
        return logits

    def losses(
        self, features: Sequence[Float[Tensor, "B _D _h _w"]], label: Integer[Tensor, "B H W"]
    ) -> dict[str, Float[Tensor, ""]]:
        """The cross-entropy of every stage, over all pixels.

        The original has no loss outside of training, where it returns the last stage only.
        """
        return {
            f"loss_ce.s{index}": cross_entropy(logits, label, None)
            for index, logits in enumerate(self.stages(features))
        }


class KernelUpdateHead(nn.Module):
    """One stage: kernels see the pixels of their class, then each other; new logits."""

    def __init__(
        self,
        *,
        channels: int,
        update_channels: int,
        num_heads: int,
        feedforward_channels: int,
        num_mask_fcs: int,
    ) -> None:
        super().__init__()
        # A level of its own for MMSegmentation's name `attention.attn`.
        self.attention = nn.ModuleDict({"attn": nn.MultiheadAttention(channels, num_heads)})
        self.attention_norm = nn.LayerNorm(channels)
        self.kernel_update_conv = KernelUpdator(update_channels)
        transform = nn.Conv2d(channels, channels, 1)
        nn.init.kaiming_normal_(transform.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(transform.bias)  # type: ignore[arg-type]  # it has a bias
        self.feat_transform = nn.Sequential(OrderedDict(conv=transform))
        self.ffn = FeedForward(channels, feedforward_channels)
        self.ffn_norm = nn.LayerNorm(channels)
        self.mask_fcs = nn.Sequential()
        for _ in range(num_mask_fcs):
            self.mask_fcs.extend(
                [nn.Linear(channels, channels, bias=False), nn.LayerNorm(channels), nn.ReLU()]
            )
        self.fc_mask = nn.Linear(channels, channels)

    def forward(
        self,
        hidden: Float[Tensor, "B D h w"],
        kernels: Float[Tensor, "B K D"],
        logits: Float[Tensor, "B K _h _w"],
    ) -> tuple[Float[Tensor, "B K h w"], Float[Tensor, "B K D"]]:
        """Logits and kernels of this stage from the logits and kernels of the one before."""
        size = hidden.shape[-2:]
        pixels = self.feat_transform(hidden).flatten(2)
        prob = resize(logits, size).softmax(1).flatten(2)
        group = prob @ pixels.transpose(1, 2)
        kernels = self.kernel_update_conv(group, kernels)
        query = kernels.transpose(0, 1)  # torch's attention wants the kernels before the batch
        seen, _ = self.attention["attn"](query, query, query, need_weights=False)
        kernels = self.attention_norm(kernels + seen.transpose(0, 1))
        kernels = self.ffn_norm(kernels + self.ffn(kernels))
        refined = self.fc_mask(self.mask_fcs(kernels)) @ pixels
        return refined.unflatten(2, size), kernels


class KernelUpdator(nn.Module):
    """Gates between a kernel and the mean pixel of its class: the paper's equations 4 to 6."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.dynamic_layer = nn.Linear(channels, 2 * channels)
        self.input_layer = nn.Linear(channels, 2 * channels)
        self.input_gate = nn.Linear(channels, channels)
        self.update_gate = nn.Linear(channels, channels)
        self.norm_in = nn.LayerNorm(channels)
        self.norm_out = nn.LayerNorm(channels)
        self.input_norm_in = nn.LayerNorm(channels)
        self.input_norm_out = nn.LayerNorm(channels)
        self.fc_layer = nn.Linear(channels, channels)
        self.fc_norm = nn.LayerNorm(channels)

    def forward(
        self, group: Float[Tensor, "B K D"], kernels: Float[Tensor, "B K D"]
    ) -> Float[Tensor, "B K D"]:
        """New kernels; D falls into groups of `channels`, all with the same weights."""
        group_in, group_out = self._halves(self.dynamic_layer, group)
        kernel_in, kernel_out = self._halves(self.input_layer, kernels)
        both = kernel_in * group_in
        input_gate = self.input_norm_in(self.input_gate(both)).sigmoid()
        update_gate = self.norm_in(self.update_gate(both)).sigmoid()
        mixed = update_gate * self.norm_out(group_out) + input_gate * self.input_norm_out(
            kernel_out
        )
        return self.fc_norm(self.fc_layer(mixed)).relu().flatten(2)

    def _halves(self, layer: nn.Linear, vectors: Tensor) -> tuple[Tensor, ...]:
        return layer(vectors.unflatten(2, (-1, self.channels))).chunk(2, 3)


class FeedForward(nn.Module):
    """Two linear layers, named as in MMSegmentation."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        first = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU())
        self.layers = nn.Sequential(first, nn.Linear(hidden, channels))

    def forward(self, kernels: Float[Tensor, "B K D"]) -> Float[Tensor, "B K D"]:
        return self.layers(kernels)

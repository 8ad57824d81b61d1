"""Optimizers of the Jittor runtime, of the same settings as torch's."""

from collections.abc import Sequence
from dataclasses import dataclass

import jittor as jt

from segmill.jittor import adamw
from segmill.jittor.load import trainable
from segmill.jittor.models.layers import BatchNorm2d, LayerNorm
from segmill.parameter_rules import ParameterRules

NORMS = (BatchNorm2d, LayerNorm)


@dataclass(frozen=True, kw_only=True)
class AdamW(ParameterRules):
    """AdamW with eps 1e-8."""

    betas: Sequence[float]  # two

    def build(self, network: jt.Module) -> adamw.AdamW:
        """Groups by (learning rate, weight decay); frozen parameters are in none."""
        parameters = trainable(network)
        self.warn_of_unused(parameters, network=type(network).__name__)
        groups = self.grouped(parameters, norm_names=norm_parameters(network))
        first, second = self.betas
        return adamw.AdamW(
            [
                {
                    "params": {name: parameters[name] for name in names},
                    "lr": lr,
                    "weight_decay": decay,
                }
                for (lr, decay), names in groups.items()
            ],
            betas=(first, second),
        )


def norm_parameters(network: jt.Module) -> set[str]:
    """Names of the parameters that belong to normalisation layers."""
    return {
        f"{path}.{name}" if path else name
        for path, module in network.named_modules()
        if isinstance(module, NORMS)
        for name in ("weight", "bias")
    }

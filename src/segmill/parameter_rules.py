"""Which learning rate and weight decay a parameter has, by its name. No framework.

Follows MMEngine 0.10.7 `DefaultOptimWrapperConstructor` (paramwise_cfg). `frozen` says what a
recipe never updates; the official DFormer recipe does so by leaving parameters out of every group.
"""

import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from segmill.errors import SegmillError

log = logging.getLogger(__name__)

MULTIPLIERS = ("lr_mult", "decay_mult")


@dataclass(frozen=True, kw_only=True)
class ParameterRules:
    """What every optimizer needs to know of its parameters.

    `rules` maps a part of a parameter's name to {lr_mult, decay_mult}. The longest part found
    decides, alone; among equally long ones the first in the alphabet. `norm_decay_mult` is for the
    parameters of normalisation layers that no rule names. `frozen` are regular expressions: a
    parameter whose name contains one is never updated.
    """

    learning_rate: float
    weight_decay: float
    rules: Mapping[str, Mapping[str, float]]
    norm_decay_mult: float | None  # null = as any other parameter
    frozen: Sequence[str] = ()

    def __post_init__(self) -> None:
        for part, rule in self.rules.items():
            if unknown := set(rule) - set(MULTIPLIERS):
                raise SegmillError(
                    f"optimizer.rules.{part} has {sorted(unknown)}; "
                    f"a rule may say {' and '.join(MULTIPLIERS)}."
                )
        for pattern in self.frozen:
            try:
                re.compile(pattern)
            except re.error as error:
                raise SegmillError(
                    f"optimizer.frozen has {pattern!r}, which is no regular expression: {error}."
                ) from error

    def is_frozen(self, name: str) -> bool:
        """Whether the parameter is never updated."""
        return any(re.search(pattern, name) for pattern in self.frozen)

    def rates_of(self, name: str, *, is_norm: bool) -> tuple[float, float]:
        """Learning rate and weight decay of one parameter."""
        ordered = sorted(sorted(self.rules), key=len, reverse=True)
        rule = next((self.rules[part] for part in ordered if part in name), None)
        if rule is None and self.norm_decay_mult is not None and is_norm:
            rule = {"decay_mult": self.norm_decay_mult}
        rule = rule or {}
        lr = self.learning_rate * rule.get("lr_mult", 1.0)
        return lr, self.weight_decay * rule.get("decay_mult", 1.0)

    def grouped(
        self, names: Iterable[str], *, norm_names: Collection[str]
    ) -> dict[tuple[float, float], list[str]]:
        """{(learning rate, weight decay): names}, in the order of `names`; frozen ones left out."""
        groups: dict[tuple[float, float], list[str]] = {}
        for name in names:
            if not self.is_frozen(name):
                rates = self.rates_of(name, is_norm=name in norm_names)
                groups.setdefault(rates, []).append(name)
        return groups

    def warn_of_unused(self, names: Collection[str], *, network: str) -> None:
        """Say which rules and frozen patterns name no parameter of the network."""
        found = "\n".join(names)
        unused = [f"rules.{part}" for part in self.rules if part not in found]
        unused += [f"frozen {each}" for each in self.frozen if not re.search(each, found, re.M)]
        for each in unused:
            log.warning(
                "optimizer.%s has no effect: no parameter of %s has this in its name.",
                each,
                network,
            )

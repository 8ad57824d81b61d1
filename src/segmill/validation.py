"""Which epochs of a training run are validated. No framework."""

from dataclasses import dataclass

from segmill.errors import SegmillError


@dataclass(frozen=True, kw_only=True)
class ValidationSchedule:
    """After the first epoch, after each `every`-th, and after each beyond epoch `each_after`.

    Follows the official DFormer code. An epoch is `epoch_steps` optimizer steps.
    """

    epoch_steps: int
    every: int
    each_after: int

    def __post_init__(self) -> None:
        for name in ("epoch_steps", "every"):
            if getattr(self, name) < 1:
                raise SegmillError(
                    f"trainer.validation.{name}={getattr(self, name)} should be 1 or more."
                )

    def due(self, step: int) -> bool:
        """Whether to validate when `step` optimizer steps are done."""
        epoch, rest = divmod(step, self.epoch_steps)
        if rest or epoch == 0:
            return False
        return epoch == 1 or epoch % self.every == 0 or epoch > self.each_after

    def __str__(self) -> str:
        return (
            f"after epoch 1, each {self.every}th and each beyond {self.each_after}, "
            f"of {self.epoch_steps} steps"
        )

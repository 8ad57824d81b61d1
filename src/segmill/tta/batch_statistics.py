"""BatchNorm by the statistics of the image itself, while every layer stays in eval mode."""

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

Buffers = tuple[Tensor | None, Tensor | None]


class BatchStatistics:
    """Lets each BatchNorm layer of `module` normalise with mean and variance of its own input.

    The stored statistics are out of sight for as long as a layer runs, which is what torch takes
    as the wish for the input's; they are never written, and between two forwards they are where a
    state dict or a move to a device looks for them. A layer whose input has one value a channel
    (a global pooling of one image) has nothing to take statistics of and uses the stored ones.
    """

    def __init__(self, module: nn.Module) -> None:
        self._layers = [each for each in module.modules() if isinstance(each, _BatchNorm)]
        self._hidden: dict[nn.Module, Buffers] = {}
        self._handles: list[RemovableHandle] = []

    def apply(self) -> None:
        """From the next forward on."""
        assert not self._handles, "applied already"
        for layer in self._layers:
            self._handles.append(layer.register_forward_pre_hook(self._hide))
            self._handles.append(layer.register_forward_hook(self._show, always_call=True))

    def undo(self) -> None:
        """Use the stored statistics again; they are those from before `apply`, bit for bit."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hide(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, _BatchNorm)
        if inputs[0].numel() > inputs[0].shape[1]:
            self._hidden[layer] = layer.running_mean, layer.running_var
            layer.running_mean = layer.running_var = None

    def _show(
        self,
        layer: nn.Module,
        inputs: tuple[Tensor, ...],  # noqa: ARG002
        output: Tensor | None,  # noqa: ARG002  (None: the forward failed)
    ) -> None:
        assert isinstance(layer, _BatchNorm)
        if layer in self._hidden:
            layer.running_mean, layer.running_var = self._hidden.pop(layer)

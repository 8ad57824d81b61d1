import torch

from segmill import measure


class Counting(torch.nn.Module):
    """Counts its calls in each mode."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.calls = {True: 0, False: 0}

    def forward(self, image):
        self.calls[self.training] += 1
        assert not torch.is_grad_enabled()
        return self.weight * image

    def losses(self, image, label):
        self.calls[self.training] += 1
        return {"a": (self.weight * image).sum(), "b": self.weight.sum()}


def test_inference_is_timed_in_eval_mode_without_gradients():
    network = Counting().train()
    cost = measure.inference_cost(network, torch.ones(1, 3, 2, 2), bf16=False, repeats=4)
    assert network.calls == {True: 0, False: measure.WARM_UP + 4}
    assert cost.median > 0
    assert cost.peak_bytes is None


def test_a_timed_training_step_leaves_the_weights_as_they_are():
    network = Counting().eval()
    image, label = torch.ones(1, 3, 2, 2), torch.zeros(1, 2, 2, dtype=torch.long)
    measure.training_cost(network, image, label, bf16=False, repeats=2)
    assert network.calls == {True: measure.WARM_UP + 2, False: 0}
    assert network.weight.item() == 1.0

"""Every family takes training steps that make sense: finite, and the loss of one batch falls."""

import gate
import numpy as np
import pytest
import torch
from test_parity import ROWS

from segmill.data.scenes import render_scene

STEPS = 6
CLASSES = 8


@pytest.fixture(scope="module")
def batch():
    """Two generated rooms at 96 x 128, normalised, and their labels with 255 = ignore."""
    samples = [render_scene(seed, height=96, width=128) for seed in (1, 2)]
    image = np.stack([sample.image[..., :3] for sample in samples]).transpose(0, 3, 1, 2)
    label = np.stack([sample.label for sample in samples])
    return (torch.from_numpy(image).float() - 118) / 60, torch.from_numpy(label).long()


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in ROWS])
def test_a_few_steps_lower_the_loss_of_a_batch_of_rooms(name, batch):
    torch.manual_seed(0)
    network = gate.build(ROWS[name].variant, num_classes=CLASSES).train()
    gate.without_dropout(network)
    wanted = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=1e-4)
    losses = []
    for _ in range(STEPS):
        torch.manual_seed(0)  # the same points and bases in every step
        loss = torch.stack(list(network.losses(*batch).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in wanted)
        torch.nn.utils.clip_grad_norm_(wanted, 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all()
    assert min(losses[-2:]) < losses[0]


def test_the_rooms_have_labels_that_count(batch):
    assert 4 <= len(batch[1].unique()) <= CLASSES + 1

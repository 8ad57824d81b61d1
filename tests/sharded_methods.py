"""What one of two processes does: each method on weights that the two share."""

from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from segmill.tta.sharding import shard
from tiny_methods import (
    VIEWS,
    BatchNormNet,
    LayerNormNet,
    TorchUpdater,
    adapt_to_all,
    method_of,
    tiny_combined,
)

# A recovery after the first image; sizes for small images.
SETTINGS = {
    "tent": {},
    "sar": {"recover_below": 0.3, "memory": 0.0},
    "eata": {
        "entropy_share": 0.7,
        "redundancy": 0.9,
        "fisher": {"_target_": "segmill.tta.fisher.Fisher", "images": 1, "strength": 5.0},
    },
    "memo": {"copies": 4},
    "cotta": {"ratios": [1.0, 1.5], "multiple": 8, "momentum": 0.5, "restore": 0.3},
}
NETWORKS: dict[str, type[nn.Module]] = {"batch": BatchNormNet, "layer": LayerNormNet}


def results(mesh: Any = None) -> dict[str, dict[str, torch.Tensor]]:
    """Weights, logits, losses and the last prediction of every method and network."""
    found = {}
    for name, settings in SETTINGS.items():
        for kind, network in NETWORKS.items():
            model = tiny_combined(network)
            if mesh is not None:
                whole_network = model.discriminative.network
                shard(whole_network, (), mesh, compute_dtype=None, keep_gathered=False)
            method = method_of(name, model, **settings)
            parameters = method.parameters_to_update()
            optimizer = torch.optim.SGD(list(parameters.values()), lr=0.02, momentum=0.9)
            logits, losses = adapt_to_all(
                method, TorchUpdater(optimizer), batch_statistics=kind == "batch"
            )
            found[f"{name}/{kind}"] = {
                **{key: whole(each) for key, each in model.named_parameters()},
                "logits": torch.cat([each.flatten() for each in logits]),
                "losses": torch.stack(losses),
                "prediction": method.predict(VIEWS[0]),
            }
    return found


def whole(parameter: nn.Parameter) -> torch.Tensor:
    value = parameter.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def run(rank: int, folder: str) -> None:
    """Process `rank` of two; leaves its results in `folder`."""
    torch.set_num_threads(1)
    store = f"file://{Path(folder) / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.save(results(init_device_mesh("cpu", (2,))), Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()

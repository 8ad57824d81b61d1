"""CUDA's graphs imitated on the CPU: operations are noted, and run again on the same memory."""

from contextlib import contextmanager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Graph:
    """Stands in for torch.cuda.CUDAGraph."""

    def __init__(self):
        self.calls = []

    @torch.no_grad()
    def replay(self):
        """Every operation anew; its results go where they were."""
        for function, args, options, results in self.calls:
            found = function(*args, **options)
            for old, new in zip(tree_leaves(results), tree_leaves(found), strict=True):
                if isinstance(old, torch.Tensor) and old is not new:
                    old.copy_(new)


class _Noting(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        self.graph.calls.append((function, args, kwargs or {}, results))
        return results


class Stream:
    """Stands in for torch.cuda.Stream."""

    def wait_stream(self, other):
        """Nothing runs on its own here."""


@contextmanager
def _graph(graph, *, pool, capture_error_mode):
    with _Noting(graph):
        yield


def imitate(monkeypatch):
    """From now on for a test."""
    for name, stand_in in {
        "CUDAGraph": Graph,
        "graph": _graph,
        "graph_pool_handle": lambda: None,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda _: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)

"""Decode steps as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Graphs:
    """CUDA graphs of decode steps, by their sizes. What a step returns is overwritten by the next one.

    Each body runs a few times before it is captured: it must be free to repeat itself.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._captured: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool: Any = None  # of memory: one for all, as no two run at once

    def clear(self) -> None:
        self._captured.clear()
        self._pool = None  # which goes with its last graph

    def run(self, sizes: tuple[int, int], body: Callable[[], Tensor]) -> Tensor:
        with torch.cuda.device(self.device):
            if sizes not in self._captured:
                self._captured[sizes] = self._capture(body)
            graph, result = self._captured[sizes]
            graph.replay()
        return result

    def _capture(self, body: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(3):
                body()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Environments may use the GPU from their threads meanwhile: that is no part of the capture.
        mode = "thread_local"
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode=mode):
            result = body()
        self._pool = graph.pool()
        return graph, result

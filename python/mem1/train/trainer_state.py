"""What a training run keeps beside the model, on disk: values as JSON; tensors, of which each rank may have a
part, by torch.distributed.checkpoint as safetensors. Nothing of it is a pickle.

    trainer.json        {"values": ..., "tensors": {name: [shape, dtype]}}
    trainer/            shard-00001-...safetensors, one or more of each rank

What was saved by some number of ranks is read by any other.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from mem1.checks import InputError, require
from mem1.models.load import check_json
from mem1.runtime.ranks import Ranks

VALUES, TENSORS = "trainer.json", "trainer"


class TrainerState:
    """A saved state. InputError, by file, for one that is not whole."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        check_json(folder / VALUES)
        record: Any = json.loads((folder / VALUES).read_text())
        sound = isinstance(record, dict) and record.keys() == {"values", "tensors"}
        require(sound, f"path: {folder / VALUES}", "values and tensors", record)
        self.values: dict[str, Any] = record["values"]
        self._shapes: dict[str, tuple[list[int], str]] = record["tensors"]
        if self._shapes:
            self._check_files()

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def __contains__(self, name: object) -> bool:
        return name in self.values

    @property
    def names(self) -> frozenset[str]:
        """Of the tensors."""
        return frozenset(self._shapes)

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Read into tensors that are there, of which each may be a rank's part of a whole."""
        if tensors:
            reader = HuggingFaceStorageReader(str(self._folder / TENSORS))
            with _quiet(), torch.no_grad():
                dcp.load(dict(tensors), storage_reader=reader, no_dist=True)

    def tensors(self) -> dict[str, Tensor]:
        """All of them, whole."""
        found = {
            name: torch.empty(shape, dtype=getattr(torch, dtype))
            for name, (shape, dtype) in self._shapes.items()
        }
        self.fill(found)
        return found

    def _check_files(self) -> None:
        folder = self._folder / TENSORS
        try:
            known = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            reason = str(error).split("\n", 1)[0]
            raise InputError(
                f"path: expected a readable {TENSORS} in {str(folder)!r}, got {reason}"
            ) from None
        for name, (shape, _) in self._shapes.items():
            found: Any = known.get(name)
            parts = sum(chunk.sizes.numel() for chunk in found.chunks) if found else -1
            whole = found and list(found.size) == list(shape) and parts == found.size.numel()
            require(bool(whole), "path", f"a whole state in {str(folder)!r}", f"less of {name}")


def write(
    folder: Path, values: Mapping[str, Any], tensors: Mapping[str, Tensor], ranks: Ranks | None = None
) -> None:
    """Write a state into a folder that is there. All of `ranks` call it, each with its parts of the tensors;
    the first one's values count. None: this process writes by itself.
    """
    shapes = {name: [list(x.shape), str(x.dtype).removeprefix("torch.")] for name, x in tensors.items()}
    if tensors:
        writer = HuggingFaceStorageWriter(str(folder / TENSORS), save_distributed=True)
        with _quiet():
            alone = ranks is None or ranks.size == 1
            group = None if ranks is None else ranks.group
            dcp.save(dict(tensors), storage_writer=writer, process_group=group, no_dist=alone)
    if ranks is None or ranks.first:
        text = json.dumps({"values": values, "tensors": shapes}, allow_nan=False)
        (folder / VALUES).write_text(text)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that there is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield

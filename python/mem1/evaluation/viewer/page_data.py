"""What a page knows of each trajectory, as JSON: numbers of tokens packed, texts once for all."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mem1.checks import InputError, require
from mem1.io import without_nan
from mem1.metrics import measure
from mem1.parsing.token_text import TokenText
from mem1.trajectory import Trajectory
from mem1_core.eviction_policies import policy_name
from mem1_core.segments import by_policy

_SETTINGS = ("seed", "sampling_seed", "regime", "temperature", "top_p", "top_k", "greedy")


def checked(where: str, row: Mapping[str, Any]) -> Trajectory:
    """The trajectory of a row, `Trajectory.to_dict()` or a line of trajectories.jsonl.

    Raises InputError, which begins with `where`, for a row that is none.
    """
    try:
        trajectory = Trajectory.from_dict(dict(row))
        trajectory.score = {str(name): float(value) for name, value in trajectory.score.items()}
        trajectory.peak_tokens()  # asks the rule, which refuses segments that are out of order
        strange = trajectory.tokens[(trajectory.tokens < 0) | (trajectory.tokens >= 2**31)]
        require(len(strange) == 0, "tokens", "ids from 0 to 2**31 - 1", strange[:4].tolist())
    except (AttributeError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{where}: expected a trajectory, got {type(error).__name__}: {error}") from None
    return trajectory


class Vocabulary:
    """The tokens that occur on a page, in the order in which they come up."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, self._text = tokenizer, TokenText(tokenizer)
        self._places: dict[int, int] = {}

    def places(self, tokens: Tensor) -> np.ndarray:
        """int64 [n]: of each of the ids `tokens` [n], its place in this vocabulary."""
        ids, which = np.unique(tokens.numpy(), return_inverse=True)
        known = [self._places.setdefault(token, len(self._places)) for token in ids.tolist()]
        return np.asarray(known, dtype=np.int64)[which]

    def to_dict(self) -> dict[str, Any]:
        """ids: of each token. pieces: its text; or its bytes, where they are no whole characters; or
        {"special": its name} where it has no text.
        """
        return {"ids": list(self._places), "pieces": [self._piece(token) for token in self._places]}

    def _piece(self, token: int) -> str | list[int] | dict[str, str]:
        piece = self._text.piece(token)
        if piece is None:
            return {"special": str(self._tokenizer.convert_ids_to_tokens(token) or token)}
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return list(piece)


def record(row: Mapping[str, Any], trajectory: Trajectory, vocabulary: Vocabulary) -> dict[str, Any]:
    """The JSON object of one trajectory; `row` is what it was read from.

    parts: runs of tokens [kind, turn, length, evict, whether the policy wrote them], `evict` being the
    first token that does not see them. tokens: places in the vocabulary, base64 of uint16, or of uint32 if
    `wide`. logprobs, rollout_logprobs: of what the policy wrote, base64 of float32; the latter null where it
    is the same. rewards: [token behind which it came, reward].
    """
    t, places = trajectory, vocabulary.places(trajectory.tokens)
    wide = bool(places.max(initial=0) > 0xFFFF)
    rollout_logprobs = t.rollout_logprobs
    return {
        "name": str(t.task) or f"seed {t.seed}",
        "agent": str(row.get("agent", "")),
        "finish_reason": t.finish_reason.value,
        "objectives": t.objectives,
        "metrics": without_nan(measure(t)),
        "settings": without_nan(
            {"model": t.model, "prune": policy_name(t.prune)} | {name: getattr(t, name) for name in _SETTINGS}
        ),
        "error": str(t.error),
        "notes": json.dumps(t.notes, ensure_ascii=False) if t.notes else "",
        "invalid_turns": t.invalid_turns,
        "failures": [f"{kind} after {turns} turns" for kind, turns, _ in t.failures],
        "parts": list(_parts(t)),
        "wide": wide,
        "tokens": _packed(places, "<u4" if wide else "<u2"),
        "logprobs": _packed(t.logprobs[t.policy_mask].numpy(), "<f4"),
        "rollout_logprobs": None
        if rollout_logprobs is None
        else _packed(rollout_logprobs[t.policy_mask].numpy(), "<f4"),
        "rewards": [[token, reward if math.isfinite(reward) else None] for token, reward in t.rewards],
    }


def _parts(trajectory: Trajectory) -> Iterator[tuple[str, int, int, int, bool]]:
    """Segments, cut where `evict` changes."""
    evict, begin = trajectory.mask.evict_at[0], 0
    for kind, turn, length in trajectory.segments:
        lifetimes, counts = evict[begin : begin + length].unique_consecutive(return_counts=True)
        for end, count in zip(lifetimes.tolist(), counts.tolist(), strict=True):
            yield kind, turn, count, end, by_policy(kind)
        begin += length


def _packed(values: np.ndarray, dtype: str) -> str:
    return base64.b64encode(values.astype(dtype).tobytes()).decode()

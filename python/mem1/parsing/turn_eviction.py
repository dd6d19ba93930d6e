"""What a policy that writes tags forgets, as a value of `eviction_policy` for `model.generate`.

    rule = TurnEviction(Codec(tokenizer, stop_ids=stop_ids(model, tokenizer)))
    model.generate(**inputs, custom_generate=prune_generate, eviction_policy=rule, max_new_tokens=512)

With the log-probs that one forward over all tokens gives with positions 0 .. N-1 and the mask
`TrajectoryLayout.from_segments(rule.segments(tokens, cache.run_lengths[row]), prune=rule.prune).mask`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch import Tensor

from mem1.parsing.boundaries import TurnReader
from mem1.parsing.codec import Codec
from mem1_core.eviction import eviction_table
from mem1_core.eviction_policies import EvictionPolicy, resolve_policy
from mem1_core.segments import Segment


class TurnEviction:
    """The rule `prune` over the parts of turns that `codec` reads in what the policy wrote.

    A turn ends with the end tag of an action, with a token of `codec.stop_ids`, or where `generate` stops;
    what the policy writes after an action in the same call is its next turn. What it was given counts as
    prompt or observation, whatever it looks like.

    prune: see `mem1_core.eviction.evict_from_segments`.
    """

    def __init__(self, codec: Codec, prune: EvictionPolicy = "action") -> None:
        if not isinstance(codec, Codec):
            raise TypeError(f"codec: expected a Codec, got {type(codec).__name__}")
        resolve_policy(prune)  # refuses what is no rule
        self.codec, self.prune = codec, prune

    def __call__(self, tokens: list[int], runs: list[int], ended: bool) -> Tensor | None:
        """See `prune_generate`: which of a row's tokens the next one may see, None for all that stayed."""
        given = len(runs) % 2 == 1
        piece = self.codec.text.piece(tokens[-1]) or b""
        if not (ended or given or tokens[-1] in self.codec.stop_ids or b">" in piece):
            return None  # most tokens end nothing, and need no reading
        segments, event = self._read(tokens, runs, ended)
        return eviction_table(segments, self.prune).alive() if ended or given or event else None

    def segments(self, tokens: Sequence[int], runs: Sequence[int], ended: bool = True) -> list[Segment]:
        """A row in turns: what is given first is the prompt, later an `info`; what is written, actions.

        tokens: all of the row. runs: how many of them were given, then written, given, ... ended: whether
        the row has stopped writing, which completes its action.
        """
        return self._read(tokens, runs, ended)[0]

    def _read(
        self, tokens: Sequence[int], runs: Sequence[int], ended: bool
    ) -> tuple[list[Segment], str | None]:
        """The segments, and what the last token ends, if the policy wrote it: "state", "end" or nothing."""
        segments, turn, begin = [Segment("prompt", 0, runs[0])], 0, runs[0]
        event: str | None = None
        for n, length in enumerate(runs[1:]):
            end = begin + length
            if n % 2:
                segments.append(Segment("info", turn, length))
            else:
                reader: TurnReader | None = None
                for token in tokens[begin:end]:
                    if reader is None:
                        turn, reader = turn + 1, self.codec.turn(sys.maxsize)
                    event = reader.read(token)
                    if event == "end":
                        segments += _parts(reader, turn, over=True)
                        reader = None
                if reader is not None:
                    segments += _parts(reader, turn, over=ended or n + 2 < len(runs))
            begin = end
        return segments, event


def _parts(reader: TurnReader, turn: int, over: bool) -> list[Segment]:
    """The segments of a turn so far. One that is over has an action, be it without a token of its own."""
    rest = reader.num_tokens - reader.state_tokens
    parts = [Segment("state", turn, reader.state_tokens)] if reader.state_tokens else []
    return [*parts, Segment(reader.kind, turn, rest)] if rest or over else parts

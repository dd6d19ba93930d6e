"""Trajectories for people, as text."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from mem1.parsing.token_text import TokenText
from mem1.trajectory import Trajectory
from mem1_core.segments import by_policy


def transcript(trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase) -> str:
    """A line per segment; before each turn what was in memory when it began; at last how it went."""
    text_of, lines, start, latest = TokenText(tokenizer), list[str](), 0, 0
    for kind, turn, length in trajectory.segments:
        if turn != latest:
            lines.append(f"{turn:3d}  memory  {memory(trajectory, start)}")
            latest = turn
        text = text_of.decode(trajectory.tokens[start : start + length].tolist())
        said = "invalid" if turn in trajectory.invalid_turns and by_policy(kind) else kind
        lines.append(f"{turn:3d} {said:>7}  {text}")
        start += length
    lines.append(
        f"seed {trajectory.seed}: {trajectory.error or trajectory.finish_reason}, "
        f"reward {trajectory.reward:.3f}, {start} tokens, at most {trajectory.peak_tokens()} at once"
    )
    return "\n".join(lines)


def memory(trajectory: Trajectory, token: int) -> str:
    """What the token at a place sees before itself, as in "52 of 90 tokens: prompt, turn 2"; of a turn that
    is not there as a whole, its parts.
    """
    seen = trajectory.mask.evict_at[0, :token] > token
    live: dict[int, list[tuple[str, bool]]] = {}  # of each turn: kinds, and whether they are there as a whole
    start = 0
    for kind, turn, length in trajectory.segments:
        part = seen[start : start + length]
        start += length
        if start <= token:
            live.setdefault(turn, []).append((kind, bool(part.all())))
    said = []
    for turn, parts in live.items():
        kinds = [kind for kind, whole in parts if whole]
        whole = f"turn {turn}" if turn else "prompt"
        said += [whole] if len(kinds) == len(parts) else [f"{kind} of {whole}" for kind in kinds]
    return f"{int(seen.sum())} of {token} tokens: {', '.join(said) or 'nothing whole'}"

from __future__ import annotations

import torch

from mem1.config import RolloutConfig
from mem1.envs.toy.multihop import MultiHopEnv
from mem1.evaluation.transcripts import memory, transcript
from mem1.rollout.rollout_loop import play_expert
from mem1.trajectory import Trajectory
from mem1_core.segments import Segment


def played(tokenizer, prune) -> Trajectory:
    return next(play_expert(tokenizer, lambda: MultiHopEnv(2), [3], RolloutConfig(prune=prune)))


def test_a_transcript_says_what_was_in_memory(tokenizer):
    trajectory = played(tokenizer, "action")
    lines = transcript(trajectory, tokenizer).splitlines()
    memories = [line for line in lines if line[3:].lstrip().startswith("memory")]
    assert [line.split(": ")[1] for line in memories] == [
        "prompt",
        *(f"prompt, turn {n}" for n in (1, 2, 3, 4)),
    ]
    first = trajectory.segments[0].length
    assert memories[0] == f"  1  memory  {first} of {first} tokens: prompt"
    # Each is the memory with which the first token of its turn was made.
    places = [sum(s.length for s in trajectory.segments if s.turn < n) for n in (1, 2, 3, 4, 5)]
    for line, place in zip(memories, places, strict=True):
        seen = int(trajectory.mask.dense()[0, place].sum()) - 1  # without itself
        assert line.split()[2:5] == [str(seen), "of", str(place)]
    kinds = [line.split()[1] for line in lines[:-1]]
    assert kinds == ["prompt", *["memory", "state", "query", "info"] * 4, "memory", "state", "answer"]
    assert lines[-1].startswith("seed 3: answered, reward 1.000, ")


def test_of_a_turn_that_is_there_in_part_its_parts_are_named(tokenizer):
    trajectory = played(tokenizer, "state")
    place = sum(s.length for s in trajectory.segments if s.turn < 3)
    action = next(s for s in trajectory.segments if s.turn == 3 and s.kind == "state").length + place
    assert memory(trajectory, place).endswith(": prompt, turn 2")
    assert memory(trajectory, action).endswith(": prompt, turn 3"), "what there is of it"
    assert memory(trajectory, 0) == "0 of 0 tokens: nothing whole"
    cut = Trajectory(
        tokens=torch.arange(6),
        segments=[Segment("prompt", 0, 2), Segment("state", 1, 2), Segment("answer", 1, 2)],
        logprobs=torch.zeros(6),
        prune="never",
    )
    assert memory(cut, 3) == "3 of 3 tokens: prompt"


def test_invalid_turns_are_called_so(tokenizer):
    trajectory = played(tokenizer, "never")
    trajectory.invalid_turns.append(2)
    assert transcript(trajectory, tokenizer).count(" invalid  ") == 2  # its state and its query

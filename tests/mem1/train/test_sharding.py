"""The same update on 1, 2 and 4 processes, however it is split."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_step import CASES, MODEL

from mem1.config import RolloutConfig
from mem1.envs.toy.multihop import MultiHopEnv
from mem1.envs.toy.tokenizer import build_tokenizer
from mem1.models.build import build_model
from mem1.rollout.rollout_loop import rollout
from mem1.trajectory import TokenReward

PROGRAM = Path(__file__).with_name("sharded_step.py")
# One that wrote nothing else than others of its group, episodes of one token, more ranks than episodes of a
# minibatch: 9 episodes in minibatches of 6.
ROLLOUT = RolloutConfig(num_slots=9, max_action_tokens=24, max_turns=5)


@pytest.fixture(scope="module")
def results(tokenizer, tmp_path_factory) -> dict[int, list[dict[str, Any]]]:
    """By the number of processes, what rank 0 has in each case."""
    folder = tmp_path_factory.mktemp("sharded")
    model = build_model(tokenizer, MODEL, seed=3)
    played = list(rollout(model, tokenizer, lambda: MultiHopEnv((1, 3)), range(3), ROLLOUT, group_size=3))
    played.sort(key=lambda t: (t.seed, t.sampling_seed))
    for n, trajectory in enumerate(played):  # the last group has all earned the same
        reward = 1.0 if trajectory.seed == 2 else float(n % 2) + 0.25 * (n % 3)
        trajectory.rewards = [TokenReward(trajectory.tokens.numel() - 1, reward)]
    source = folder / "trajectories.jsonl"
    source.write_text("".join(trajectory.to_json() + "\n" for trajectory in played))
    found = {}
    for size in (1, 2, 4):
        out, store = folder / f"{size}.pt", folder / f"store{size}"
        ranks = [
            subprocess.Popen(
                [sys.executable, str(PROGRAM), str(source), str(store), str(out), str(rank), str(size)],
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]
        said = [process.communicate(timeout=300)[1] for process in ranks]
        assert [process.returncode for process in ranks] == [0] * size, "\n".join(said)
        found[size] = torch.load(out, weights_only=True)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_an_update_is_the_same_on_any_number_of_processes(results, case):
    place = CASES.index(case)
    whole = results[1][place]
    assert max(float(g.abs().max()) for g in whole["gradients"].values()) > 1e-3
    assert 0.0 < whole["metrics"]["clip_fraction"] < 1.0
    assert all(math.isfinite(value) for value in whole["metrics"].values() if isinstance(value, float))
    # Adam divides by the gradient's size: of one that is almost 0 a step of 1e-3 keeps few digits.
    embeddings = {name for name in whole["weights"] if "embed_tokens" in name}
    assert len(embeddings) == 1 + (case.algorithm == "ppo" and not case.shared)
    for size in (2, 4):
        other = results[size][place]
        assert other["gradients"].keys() == whole["gradients"].keys()
        for kind, atol, rtol in (("gradients", 2e-6, 1e-4), ("weights", 2e-5, 1e-5)):
            for name, value in whole[kind].items():
                error = float((other[kind][name] - value).abs().max())
                assert error <= atol + rtol * float(value.abs().max()), f"{kind} {name}"
        for name, value in whole["metrics"].items():
            assert other["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.slow
def test_an_update_is_the_same_for_any_budget_and_with_recomputed_activations(results):
    plain = [(n, case) for n, case in enumerate(CASES) if not (case.shared or case.rank)]
    carried = [(case.algorithm, results[1][n]) for n, case in plain if case.regime == "carry"]
    by_algorithm = {
        name: [one for algorithm, one in carried if algorithm == name] for name in ("ppo", "grpo")
    }
    for one, *others in by_algorithm.values():
        assert len(others) >= 2
        for other in others:
            for name, value in one["gradients"].items():
                torch.testing.assert_close(other["gradients"][name], value, atol=2e-6, rtol=1e-4)
            for name, value in one["metrics"].items():
                assert other["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.slow
def test_frozen_embeddings_stay_and_the_rest_learns(results, tokenizer):
    begun = build_model(build_tokenizer(), MODEL, 3).get_input_embeddings().weight
    for size, cases in results.items():
        for case, found in zip(CASES, cases, strict=True):
            names = [name for name in found["weights"] if name.startswith("actor") and "embed_tokens" in name]
            (name,) = names
            assert torch.equal(found["weights"][name], begun) == (case.frozen or case.rank > 0), (size, case)
            if case.rank:
                continue
            norm = next(name for name in found["weights"] if name.endswith("model.norm.weight"))
            assert not torch.equal(found["weights"][norm], torch.ones_like(found["weights"][norm]))
    pairs = list(zip(CASES, results[2], strict=True))
    plain, frozen = (next(found for case, found in pairs if case.frozen == how) for how in (False, True))
    assert len(frozen["gradients"]) == len(plain["gradients"]) - 2  # the actor's and the critic's

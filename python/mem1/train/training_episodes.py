"""The episodes that a run learns from and is measured by: all ranks play, each its share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from mem1.config import TrainConfig
from mem1.envs.tasks import TaskStream
from mem1.evaluation.evaluation_loop import evaluation_seeds
from mem1.evaluation.results import error_counts
from mem1.runtime.progress import Progress
from mem1.runtime.ranks import Ranks
from mem1.seeds import derive_seed
from mem1.train.batches import micro_batches
from mem1.trajectory import FinishReason, Trajectory

_EVALUATED = ("reward", "exact_match", "answered", "turns", "invalid_actions", "peak_tokens")
_ALL = 2**62  # episodes


class EpisodesFailed(RuntimeError):
    """More episodes of a batch have failed than a run can learn beside."""


class Episodes:
    """play: `rollout`, but for seeds, tasks and group_size. tasks, evaluation_tasks: their rows.
    Every method is called by all ranks and gives each the same.
    """

    def __init__(
        self,
        play: Callable[..., Iterator[Trajectory]],
        config: TrainConfig,
        tasks: TaskStream | None,
        evaluation_tasks: TaskStream | None,
        ranks: Ranks,
        progress: Progress,
    ) -> None:
        self._play, self._config, self._ranks, self._progress = play, config, ranks, progress
        self._tasks, self._held_out = tasks, evaluation_tasks

    def of_update(self, update: int) -> list[Trajectory]:
        """In the order of their seeds, without those that nobody waited for. EpisodesFailed if too many have
        failed.
        """
        config = self._config
        count = config.batch_size // config.group_size
        seeds = [derive_seed(config.seed, "training", update, i) for i in range(count)]
        tasks = self._tasks and [self._tasks[update * count + i] for i in range(count)]
        return self._played(seeds, tasks, config.group_size, f"update {update + 1}: rollout")

    def evaluation(self, updates: int) -> dict[str, float]:
        """What the policy earns in episodes that nobody is trained on, sampled as in training; nothing where
        none is due after so many updates. EpisodesFailed if too many have.
        """
        config = self._config
        if not config.evaluate_every or updates % config.evaluate_every:
            return {}
        seeds = evaluation_seeds(config.seed, config.evaluation_episodes)
        tasks = self._held_out and [self._held_out[i] for i in range(len(seeds))]
        found = describe(self._played(seeds, tasks, 1, f"update {updates}: evaluation"))
        return {f"evaluation_{name}": found[name] for name in _EVALUATED}

    def _played(
        self, seeds: list[int], tasks: list[Any] | None, group_size: int, name: str
    ) -> list[Trajectory]:
        ranks, place = self._ranks, {seed: i for i, seed in enumerate(seeds)}
        (mine,) = micro_batches(list(map(_length, tasks or seeds)), _ALL, ranks.size)[ranks.rank]
        own, given = [seeds[i] for i in mine], tasks and [tasks[i] for i in mine]
        late = ranks.overdue(name, self._config.scale.max_wait)
        played = []
        with self._progress.phase(name, len(mine) * group_size) as phase:
            for trajectory in self._play(seeds=own, tasks=given, group_size=group_size, stopped=late):
                played.append(trajectory)
                phase.advance(note=trajectory.error_kind)
        ranks.done(name)
        everyone = [trajectory for theirs in ranks.gather(played) for trajectory in theirs]
        _check_failures(everyone, len(seeds) * group_size, self._config.max_failed)
        return sorted(everyone, key=lambda t: (place[t.seed], t.sampling_seed))  # not by the clock


def _length(task: Any) -> int:
    """How long an episode is expected to be, in any unit: it has turns for each of its questions."""
    questions = task.get("questions") if isinstance(task, Mapping) else getattr(task, "questions", None)
    return max(1, len(questions)) if isinstance(questions, Sequence) else 1


def _check_failures(trajectories: list[Trajectory], expected: int, max_failed: float) -> None:
    failed = [t for t in trajectories if t.error_kind]
    late = expected - len(trajectories)
    if len(failed) + late <= max_failed * expected and len(failed) < len(trajectories):
        return
    kinds = [f"{kind} {count}" for kind, count in error_counts(failed).items()]
    kinds += [f"late {late}"] if late else []
    told = f"{len(failed) + late} of {expected} episodes failed ({', '.join(kinds)})"
    if failed:
        attempts = sum(len(t.failures) for t in failed)
        told += f", after {attempts} more attempts; the first: {failed[0].finish_reason}: {failed[0].error}"
    raise EpisodesFailed(told)


def describe(trajectories: list[Trajectory]) -> dict[str, Any]:
    """What a batch of episodes looks like. Means over those that did not fail; token counts are sums.

    errors: episodes lost for good, by kind. replays: attempts that the environment broke off and that were
    played again; dropped_turns, dropped_tokens: means over these and the lost episodes, to be held against
    turns and tokens: failures hit long episodes more often.
    """
    sound = [t for t in trajectories if not t.error_kind]
    replays = [failure for t in trajectories for failure in t.failures]
    dropped = [(f.turns, f.tokens) for f in replays]
    dropped += [(t.turns, t.tokens.numel()) for t in trajectories if t.error_kind]
    return {
        "reward": fmean(t.reward for t in sound),
        "exact_match": fmean(t.score.get("exact_match", 0.0) for t in sound),
        "answered": fmean(t.finish_reason == FinishReason.ANSWERED for t in sound),
        "turns": fmean(t.turns for t in sound),
        "invalid_actions": fmean(t.invalid_actions for t in sound),
        "peak_tokens": fmean(t.peak_tokens() for t in sound),
        "tokens": sum(t.tokens.numel() for t in sound),
        "policy_tokens": sum(int(t.policy_mask.sum()) for t in sound),
        "errors": error_counts(trajectories),
        "replays": len(replays),
        "dropped_turns": fmean(turns for turns, _ in dropped) if dropped else None,
        "dropped_tokens": fmean(tokens for _, tokens in dropped) if dropped else None,
    }

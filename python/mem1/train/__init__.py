"""Warm start and PPO; checkpoints and the folder of a run."""

"""Trajectories in a browser: one HTML file that needs nothing else."""

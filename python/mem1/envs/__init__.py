"""Environments: what the loop asks of one, and those that come with it."""

"""Worlds for the agent."""

"""The tags between which a policy writes and an environment answers."""

from __future__ import annotations

TAGS = ("<IS>", "</IS>", "<query>", "</query>", "<answer>", "</answer>", "<info>", "</info>")

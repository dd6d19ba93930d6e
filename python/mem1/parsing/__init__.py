"""Text and tokens: what the policy writes and what it reads."""

"""Text and tokens: what the policy wrote, and what it is told."""

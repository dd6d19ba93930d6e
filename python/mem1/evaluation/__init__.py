"""Against the full-context agent; tables and pictures."""

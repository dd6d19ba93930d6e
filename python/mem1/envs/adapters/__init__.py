"""Environments of other makes, and plain functions, as environments of this package."""

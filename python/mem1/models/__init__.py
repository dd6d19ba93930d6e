"""Decoders and critics."""

"""Operators of the raylm provider."""

"""Triggers of the raylm provider."""

"""Hooks of the raylm provider."""

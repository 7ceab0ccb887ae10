"""Links of the raylm provider."""

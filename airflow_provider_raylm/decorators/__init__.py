"""TaskFlow decorators of the raylm provider."""

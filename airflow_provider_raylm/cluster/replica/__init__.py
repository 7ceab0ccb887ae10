"""What lives inside a replica of an engine."""

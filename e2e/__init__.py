"""End to end."""

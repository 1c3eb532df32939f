"""Microbenchmarks."""

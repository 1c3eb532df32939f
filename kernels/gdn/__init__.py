"""Gated Delta Net."""

"""vLLM hooks."""

"""FP8 block-scaled mixture of experts."""

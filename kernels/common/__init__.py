"""What the operators share: the op library, input checks, FP8 layouts, chip facts, tuned tables, test tools."""

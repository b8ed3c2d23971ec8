"""Series of checkpoints, one for each step: find them, check, measure, evaluate and average them."""

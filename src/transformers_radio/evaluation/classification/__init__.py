"""k-NN and zero-shot classification."""

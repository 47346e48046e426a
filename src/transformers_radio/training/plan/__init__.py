"""What a recipe will cost, computed without training."""

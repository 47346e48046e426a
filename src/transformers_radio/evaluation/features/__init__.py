"""Statistics of features and position tables."""

"""LLaVA-1.5 with a student as its vision tower."""

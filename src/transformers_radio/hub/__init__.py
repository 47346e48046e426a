"""Checkpoints of others, and what goes to the Hub."""

"""Labeled images, resizing, and stored summaries."""

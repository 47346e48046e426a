"""Labelled images, resizing, and stored summaries."""

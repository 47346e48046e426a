"""A run on disk and its processes: folder, checkpoints, log, export."""

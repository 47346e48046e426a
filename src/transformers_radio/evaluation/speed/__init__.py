"""Images per second, latency, FLOPs and memory."""

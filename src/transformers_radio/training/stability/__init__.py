"""Spectral reparametrization, weight noise and the exponential moving average."""

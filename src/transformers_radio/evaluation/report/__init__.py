"""Tables, figures and model-card entries from result files."""

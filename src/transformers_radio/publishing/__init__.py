"""What goes to the Hub, and model cards."""

"""Pages to play with: a student of your own beside its teachers (`demo`), and a run while it trains (`watch`)."""

"""Training of one fold, on one process or on many nodes."""

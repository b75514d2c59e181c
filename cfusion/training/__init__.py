"""Training of one fold, from one process to many nodes."""

"""One run over several nodes."""

"""Apply a trained model: predict, explain, serve."""

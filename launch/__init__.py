"""Scripts and plans that start runs."""

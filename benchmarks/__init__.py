"""Claims of speed, each as a script that runs both sides."""

"""Turn whole-slide images into packed features."""

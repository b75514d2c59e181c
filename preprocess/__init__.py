"""From whole-slide images to packed features."""

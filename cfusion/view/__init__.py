"""The viewer: a page on loopback with deep zoom, heatmaps, a tile inspector and the patient's survival."""

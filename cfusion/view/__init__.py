"""Serve the slide viewer on loopback: deep zoom, heatmaps, a tile inspector and the patient's survival."""

"""Layers: attention, norms, rotary positions, experts. Nothing here knows a mesh or a model family."""

"""Cantata trains and fine-tunes multimodal mixture-of-experts models."""

__version__ = "0.1.0"

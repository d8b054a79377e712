"""Training system for image and video diffusion transformers."""

__version__ = "0.1.0"

"""Two-stage object detection on PyTorch: Faster R-CNN and its family, any one-stage detector as the first stage."""

__version__ = "0.1.0"

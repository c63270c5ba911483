"""rayrec: a real-time recommender on Ray. Logs and product images in, a live personal ranking out."""

__version__ = "0.1.0"

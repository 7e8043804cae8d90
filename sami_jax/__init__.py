"""SAMI in JAX: self-supervised alignment with mutual information (arXiv:2404.14313)."""

__version__ = "0.1.0"

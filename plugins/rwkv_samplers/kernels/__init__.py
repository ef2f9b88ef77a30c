"""Triton kernels for samplers on a GPU. Nothing here is imported before one is used: Triton may not be installed."""

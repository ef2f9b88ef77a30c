"""Triton kernels of the `fused` backend, a file for each concern, and the forward passes made of them.

Nothing here is imported before the backend is asked for a forward pass: Triton may not be installed.
"""

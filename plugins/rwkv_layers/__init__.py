"""Architectures that come with rwkv-runtime."""

"""Backends that come with rwkv-runtime."""

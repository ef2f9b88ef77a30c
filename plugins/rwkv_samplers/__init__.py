"""Samplers that come with rwkv-runtime."""

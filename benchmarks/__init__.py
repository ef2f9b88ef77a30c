"""Benchmarks: `pytest benchmarks` compares the backends with each other and with other programs."""

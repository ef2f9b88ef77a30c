"""What authors of plugins call in their tests; it needs nothing beyond rwkv-runtime itself.

    from rwkv_runtime.testing import check_sampler

    def test_my_sampler_keeps_the_rules():
        check_sampler(MySampler())

A check that fails raises AssertionError with one line for each mistake it found.
"""

from __future__ import annotations

from rwkv_runtime.testing.backends import check_backend
from rwkv_runtime.testing.models import byte_tokenizer, tiny_checkpoint, tiny_model
from rwkv_runtime.testing.samplers import check_sampler, distribution

__all__ = ["byte_tokenizer", "check_backend", "check_sampler", "distribution", "tiny_checkpoint", "tiny_model"]

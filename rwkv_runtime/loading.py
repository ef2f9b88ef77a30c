"""`load`: a checkpoint, a vocabulary and a backend become a Runtime. What takes long is done side by side."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from rwkv_runtime import collector, driver
from rwkv_runtime.backend import Backend
from rwkv_runtime.blank import blank_model
from rwkv_runtime.checkpoint import (
    Progress,
    build_model,
    check_file,
    check_sha256,
    open_tensors,
    own_dtype,
    recognise,
)
from rwkv_runtime.embedded import embedded_model
from rwkv_runtime.mapped import Mapped
from rwkv_runtime.model import Model
from rwkv_runtime.plugins import Plugins
from rwkv_runtime.runtime import AUTO, Runtime, in_order, why_not
from rwkv_runtime.settings import check_quant, parse_device, parse_dtype, parse_state_dtype
from rwkv_runtime.vocabulary import find_vocabulary, load_vocabulary

WARM_ROOM = 1.25
"""Of the weights' size, which a GPU is to have free: a small model as wide, with its prompts, takes less beside it."""
logger = logging.getLogger("rwkv_runtime")


@collector.at_rest()
def load(
    path: str | os.PathLike[str] | None = None,
    *,
    backend: str = AUTO,
    dtype: str | None = None,
    device: str | None = None,
    vocab: str | os.PathLike[str] | None = None,
    sha256: str | None = None,
    quant: str | None = None,
    state_dtype: str | None = None,
    plugins: Plugins | None = None,
    progress: Progress | None = None,
) -> Runtime:
    """Loads a checkpoint (.pth or .safetensors) for use; without a path, the embedded story model.

    dtype is "bfloat16", "float16" or "float32" (default: the file's own); device is "cpu" or "cuda"
    (default: CUDA where there is one). quant "int8" rounds the large matrices to 8 bits, which halves a 16-bit model;
    what is computed with them stays in dtype. state_dtype "float16" keeps the recurrent state in 16 bits, computed with
    in float32 (default: "float32"). The vocabulary is `vocab`, else a file `NAME.vocab.txt` beside the checkpoint, else
    RWKV World's where the model has its size. Raises CheckpointError, VocabularyError or OptionError.
    """
    plugins = plugins or load_plugins()
    where, kind, kept = parse_device(device), parse_dtype(dtype), parse_state_dtype(state_dtype)
    if backend != AUTO:
        plugins.backends.get(backend)
    check_quant(quant, plugins)
    path = embedded_model() if path is None else path
    if sha256:
        check_sha256(path, sha256)
    check_file(path)  # a wrong name is told at once, other mistakes when what warms up has ended: on a GPU 0.2 s
    numbered = torch.empty(0, device=where).device  # a thread has a current device of its own
    with ThreadPoolExecutor(2) as beside, _promised() as blank:
        beside.submit(_warm_up, in_order(plugins, backend), numbered, blank)
        tensors = Mapped(open_tensors(path), path)
        architecture, config = recognise(tensors, plugins.architectures, str(path))
        words = find_vocabulary(path, vocab, config.vocab_size)  # a missing one is told before gigabytes are read
        if _room(tensors, numbered):
            like = kind or own_dtype(tensors)
            blank.set_result(partial(blank_model, tensors, architecture, config, numbered, like, kept))
        else:
            blank.cancel()
        # What is read meanwhile does not hold the interpreter.
        tokenizer = beside.submit(load_vocabulary, words, config.vocab_size)
        model = build_model(tensors, [architecture], where, kind, str(path), progress, quant, kept)
    return Runtime(model, tokenizer.result(), plugins, backend)


@contextmanager
def _promised() -> Iterator[Future[Callable[[], Model]]]:
    """A future for whose result nobody waits when this is left."""
    future = Future[Callable[[], Model]]()
    try:
        yield future
    finally:
        future.cancel()


def _room(tensors: Mapping[str, Tensor], device: torch.device) -> bool:
    """Whether a GPU has memory for more than the weights, so that a blank model does not take it from them."""
    needed = WARM_ROOM * sum(tensor.nbytes for tensor in tensors.values())
    return device.type != "cuda" or torch.cuda.mem_get_info(device)[0] > needed


def _warm_up(candidates: Sequence[Backend], device: torch.device, blank: Future[Callable[[], Model]]) -> None:
    """Warms up the first that is usable on this machine. What fails here fails in its `forward`, too, and is told."""
    backend = next((b for b in candidates if why_not(b, None) is None), None)
    if backend and type(backend).warm_up is not Backend.warm_up:
        driver.wait()
        try:
            backend.warm_up(device, lambda: blank.result()())
        except CancelledError:
            return
        except Exception as error:
            logger.debug(f"backend {backend.name} cannot warm up: {error}")


def load_plugins() -> Plugins:
    """Every installed plugin; one logged warning names those that are broken."""
    plugins = Plugins.load()
    if warning := plugins.warning():
        logger.warning(warning)
    return plugins

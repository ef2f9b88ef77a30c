"""int8 weights: how far they are from those of the file, in size and in meaning, whatever runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cli_runs import rwkv_run, save_tiny_model
from helpers import CPU, PRESENT, Tensors, apart, logits_of, off, only, tiny_config, tokens_of
from rwkv_backends.compile import Compile
from rwkv_backends.eager import Eager
from rwkv_backends.script import Script
from rwkv_layers.linear import Matrix, linear, linears, times
from rwkv_layers.matrices import quantize
from rwkv_samplers.nucleus import Nucleus
from torch import Tensor

import rwkv_runtime
from rwkv_runtime.backend import Backend
from rwkv_runtime.checkpoint import build_model
from rwkv_runtime.embedded import embedded_model
from rwkv_runtime.engine import Engine
from rwkv_runtime.errors import OptionError
from rwkv_runtime.model import Architecture, Model
from rwkv_runtime.plugins import Plugins
from rwkv_runtime.runtime import Runtime
from rwkv_runtime.snapshot import load_snapshot, save_snapshot
from rwkv_runtime.testing import tiny_model
from rwkv_runtime.tokenizer import Tokenizer

TOKENS = tokens_of(40)
DTYPES = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
ROUNDING = 0.03
"""What rounding to 8 bits may move the logits of a tiny random model by, as a share of their norm."""


def small(model: Tensors, plugins: Plugins, dtype: torch.dtype | None = None) -> Model:
    return build_model(model, plugins.architectures, CPU, dtype, quant="int8")


def matrices(weights: object) -> Iterator[Matrix]:
    """Every matrix of a model, wherever in its weights it is."""
    if isinstance(weights, Matrix):
        yield weights
    elif isinstance(weights, tuple):
        for part in weights:
            yield from matrices(part)


def tensors_of(weights: object) -> Iterator[Tensor]:
    if isinstance(weights, Tensor):
        yield weights
    elif isinstance(weights, tuple):
        for part in weights:
            yield from tensors_of(part)


def nbytes(weights: object) -> int:
    return sum(t.numel() * t.element_size() for t in tensors_of(weights))


def widened(weights: object) -> object:
    """The same weights with every matrix in float32, each the value that its 8 bits stand for."""
    if isinstance(weights, Matrix):
        assert weights.scale is not None
        return Matrix(weights.weight.float() * weights.scale.unsqueeze(-1), None)
    if isinstance(weights, tuple):
        parts = [widened(part) for part in weights]
        return type(weights)(*parts) if hasattr(weights, "_fields") else tuple(parts)
    return weights


def random_matrix(*shape: int) -> Tensor:
    rows = torch.logspace(-3, 1, shape[-2]).unsqueeze(1)  # each row of a size of its own
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))) * rows


@pytest.fixture(scope="module")
def int8(checkpoint: Tensors, plugins: Plugins) -> Model:
    return small(checkpoint, plugins)


def test_no_weight_is_moved_by_more_than_half_its_rows_step() -> None:
    weight = random_matrix(50, 64)
    values, steps = quantize(weight)
    assert values.dtype == torch.int8
    assert values.abs().amax(dim=1).tolist() == [127] * 50
    assert torch.equal(steps, steps.bfloat16().float())
    assert bool(((values * steps[:, None] - weight).abs() <= steps[:, None] / 2 * (1 + 1e-6)).all())


def test_rows_of_nothing_and_of_next_to_nothing_stay_what_they_are() -> None:
    weight = torch.tensor([[0.0, 0.0], [1e-38, -1e-38], [3e38, 1.0]])
    values, steps = quantize(weight)
    assert values.tolist() == [[0, 0], [1, -1], [127, 0]]
    torch.testing.assert_close(values * steps[:, None], weight, rtol=0.2, atol=1.5)


@pytest.mark.parametrize("C", [16, 32, 48, 20, 33])  # torch's kernel needs whole groups of 16
@pytest.mark.parametrize("M", [1, 3, 8, 9, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scripted", [False, True], ids=["eager", "scripted"])
def test_products_are_those_with_the_rounded_weights(scripted: bool, dtype: torch.dtype, M: int, C: int) -> None:
    values, steps = (
        torch.stack(parts) for parts in zip(*(quantize(random_matrix(24, C)) for _ in range(3)), strict=True)
    )
    exact = values.double() * steps.double().unsqueeze(-1)
    x = torch.randn(3, M, C, generator=torch.Generator().manual_seed(1)).to(dtype)
    one, all_ = Matrix(values[0], steps[0]), Matrix(values, steps)
    ops = [torch.jit.script(op) if scripted else op for op in (linear, linears, times)]
    for ours, theirs in (
        (ops[0](x[0], one), F.linear(x[0].double(), exact[0])),
        (ops[0](x[0].unsqueeze(0), one)[0], F.linear(x[0].double(), exact[0])),
        (ops[1](x, all_), torch.bmm(x.double(), exact.transpose(1, 2))),
        (ops[2](one, x[0].t()), exact[0] @ x[0].double().t()),
        (ops[2](one, x[0].t().contiguous()), exact[0] @ x[0].double().t()),
    ):
        assert ours.dtype == dtype
        assert apart(ours, theirs) < DTYPES[dtype]


def test_all_large_matrices_are_rounded_and_nothing_else(int8: Model, model: Model) -> None:
    found = list(matrices(int8.weights))
    assert len(found) == len(list(matrices(model.weights))) > 4 * int8.config.n_layer
    for matrix in found:
        assert matrix.weight.dtype == torch.int8
        assert matrix.scale is not None
        assert matrix.scale.shape == matrix.weight.shape[:-1]
    rounded = sum(matrix.weight.numel() for matrix in found)
    sizes = int8.config
    by_hand = sizes.n_layer * (2 * sizes.n_ffn * sizes.n_embd + 4 * sizes.n_embd**2) + sizes.vocab_size * sizes.n_embd
    assert rounded >= by_hand
    assert int8.quant == "int8"
    assert model.quant is None


def test_logits_are_exactly_those_of_the_rounded_weights(int8: Model) -> None:
    exact = replace(int8, weights=widened(int8.weights))
    assert apart(logits_of(int8, TOKENS), logits_of(exact, TOKENS)) < 1e-5
    assert apart(logits_of(int8, TOKENS, pieces=(1, 1, 17)), logits_of(exact, TOKENS)) < 1e-5


@pytest.mark.parametrize(
    ("dtype", "more"), [(torch.float32, 0.0), (torch.bfloat16, 0.02), (torch.float16, 0.003)], ids=str
)
def test_logits_stay_near_the_oracles(
    dtype: torch.dtype, more: float, architecture: Architecture, checkpoint: Tensors, plugins: Plugins
) -> None:
    oracle = architecture.reference(checkpoint, TOKENS)
    distance = off(logits_of(small(checkpoint, plugins, dtype), TOKENS), oracle)
    assert distance < ROUNDING + more
    assert distance > 1e-3  # rounding is not free: something was rounded


@only("rwkv6")
def test_float16_halves_the_stream_of_a_rounded_model_too(architecture: Architecture, plugins: Plugins) -> None:
    tensors = architecture.random(tiny_config(architecture, layers=13))
    full, half = (small(tensors, plugins, dtype).weights.blocks[12] for dtype in (torch.float32, torch.float16))
    for ours, theirs in ((half.att.output, full.att.output), (half.ffn.value, full.ffn.value)):
        assert torch.equal(ours.weight, theirs.weight)
        assert torch.equal(ours.scale, theirs.scale / 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", [Eager(), Script(), Compile()], ids=lambda b: b.name)
def test_backends_agree(
    backend: Backend, dtype: torch.dtype, architecture: Architecture, tokenizer: Tokenizer, plugins: Plugins
) -> None:
    model = small(architecture.random(tiny_config(architecture, layers=1)), plugins, dtype)
    if reason := backend.why_not(model):
        pytest.skip(f"{backend.name} cannot be used here: {reason}")
    expected = logits_of(model, TOKENS[:6])
    engine = Engine(model, backend, Nucleus(), tokenizer, rows=2)
    for size in (1, 2):
        for row in range(size):
            engine.state.clear(row)
        for token, logits in zip(TOKENS, expected, strict=False):
            engine.tokens[:size] = token
            engine._ticks[size]()
            for ours in engine.logits[:size]:
                assert apart(ours[PRESENT], logits[PRESENT]) < (1e-4 if dtype == torch.float32 else 0.05)


def test_a_state_goes_from_a_dense_model_to_its_rounded_one_and_back(
    model: Model, int8: Model, tokenizer: Tokenizer, plugins: Plugins, tmp_path: Path
) -> None:
    """It is the same memory of the same text, off by the rounding."""
    for writer, reader in ((model, int8), (int8, model)):
        engine = Runtime(writer, tokenizer, plugins, "eager").engine("greedy")
        request = Runtime(writer, tokenizer, plugins, "eager").request("a text", max_tokens=1)
        generation = engine.submit(replace(request, keep=True))
        list(engine.stream(generation))
        assert generation.prompt_snapshot
        save_snapshot(generation.prompt_snapshot, tmp_path / "state")
        kept = load_snapshot(tmp_path / "state", reader)
        assert kept.pending == generation.prompt_snapshot.pending
        own = Runtime(reader, tokenizer, plugins, "eager").forward(tokenizer.encode("a text")[:-1])[1]
        for name, t in kept.state.tensors.items():
            assert off(t, own[name]) < ROUNDING


def test_a_rounded_model_takes_about_half_the_memory_of_a_16_bit_one() -> None:
    dense = rwkv_runtime.load(backend="eager").model
    int8 = rwkv_runtime.load(backend="eager", quant="int8").model
    assert dense.dtype == int8.dtype == torch.bfloat16
    assert nbytes(tuple(matrices(int8.weights))) / nbytes(tuple(matrices(dense.weights))) == pytest.approx(
        0.5, abs=0.01
    )
    kept = int8.config.vocab_size * int8.config.n_embd * 2  # the embedding, of which a step reads one row
    assert (nbytes(int8.weights) - kept) / (nbytes(dense.weights) - kept) < 0.62  # adapters and norms stay


LOAD = """
import json, sys
from pathlib import Path
import torch
from rwkv_runtime import Plugins
from rwkv_runtime.checkpoint import build_model, open_tensors

def own_memory():  # without the pages of mapped files, which the system takes back as it needs
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

def load(path, progress=None):
    architectures = Plugins.load({"RWKV_PLUGINS": ""}).architectures
    return build_model(open_tensors(path), architectures, torch.device("cpu"), progress=progress, quant="int8")

load(sys.argv[1])
before, peak = own_memory(), []
model = load(sys.argv[2], lambda done, total: peak.append(own_memory() - before))
mapped = sys.argv[2] in Path("/proc/self/maps").read_text()
print(json.dumps([max(peak), own_memory() - before, mapped]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the kernel's count of memory")
def test_loading_needs_hardly_more_memory_than_the_rounded_model(
    architecture: Architecture, checkpoint: Tensors, plugins: Plugins, tmp_path: Path
) -> None:
    tensors = architecture.random(architecture.sizes(4, 1024, 30000), dtype=torch.bfloat16)
    size = nbytes(small(tensors, plugins).weights)
    torch.save(checkpoint, tmp_path / "tiny.pth")
    torch.save(tensors, tmp_path / "large.pth")
    paths = [tmp_path / "tiny.pth", tmp_path / "large.pth"]
    result = subprocess.run([sys.executable, "-c", LOAD, *paths], capture_output=True, text=True, check=True)
    peak, kept, mapped = json.loads(result.stdout)
    assert 0.9 * size < kept < 1.2 * size  # the C library may keep what the last rounding needed
    assert peak < 1.2 * size
    assert not mapped  # the file may be deleted, and its memory is not counted as ours


def test_the_command_line_takes_it(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path)
    args = ("hello", "--max-tokens", "8", "--seed", "1", "--backend", "eager")
    dense, rounded = rwkv_run(model, *args), rwkv_run(model, *args, "--quant", "int8")
    assert (dense.exit_code, rounded.exit_code) == (0, 0)
    assert rounded.stdout.startswith("hello")


@pytest.mark.parametrize("value", ["int4", "INT8", ""])
def test_another_name_is_refused_before_anything_is_loaded(value: str) -> None:
    result = rwkv_run(Path("missing.pth"), "hello", "--quant", value)
    assert result.exit_code == 2
    assert f"there is no quantization {value!r}; there is only int8" in result.stderr
    with pytest.raises(OptionError, match="there is only int8"):
        rwkv_runtime.load("missing.pth", quant=value)


def test_an_architecture_that_has_no_quantization_says_so(checkpoint: Tensors, plugins: Plugins) -> None:
    class Plain(type(next(iter(plugins.architectures)))):  # type: ignore[misc]
        quantizations = ()

    family = Plain()
    with pytest.raises(OptionError, match=r"^tiny: rwkv\d has no quantization 'int8'; it has none$"):
        build_model(family.random(tiny_config(family)), [family], CPU, source="tiny", quant="int8")


def test_plugin_authors_can_ask_for_a_tiny_one(architecture: Architecture) -> None:
    runtime = tiny_model(architecture.name, quant="int8")
    assert runtime.model.quant == "int8"
    assert len(runtime.generate("Hi", max_tokens=3, seed=0).generation.request.prompt) == 2


def test_the_story_model_loses_next_to_nothing() -> None:
    """The figures of docs/usage.md come from `python -m benchmarks.quantized`; this holds their order."""
    from benchmarks.quantized import bits_per_byte, sample

    models = [rwkv_runtime.load(embedded_model(), backend="eager", quant=quant) for quant in (None, "int8")]
    dense, rounded = (bits_per_byte(model, sample()[:3]) for model in models)
    assert dense < 1.5
    assert abs(rounded - dense) < 0.01

"""Backends differ in speed alone: the same logits, and a backend that cannot work says why and gives way."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from cli_runs import save_tiny_model
from engines import finish
from helpers import PRESENT, VOCAB_SIZE, Tensors, apart, built, controls_of, logits_of, tiny_config, tokens_of
from rwkv_backends.compile import Compile
from rwkv_backends.eager import Eager
from rwkv_backends.graphs import Captured
from rwkv_backends.script import Script
from rwkv_samplers.nucleus import Nucleus
from torch import Tensor
from torch._dynamo.utils import counters

from rwkv_runtime.backend import Backend, Forward, Tick
from rwkv_runtime.engine import Engine
from rwkv_runtime.errors import BackendError
from rwkv_runtime.generation import Request
from rwkv_runtime.model import Architecture, Model
from rwkv_runtime.plugins import Plugins
from rwkv_runtime.runtime import Runtime, usable
from rwkv_runtime.sampler import check_params
from rwkv_runtime.state import State
from rwkv_runtime.testing import tiny_model
from rwkv_runtime.tokenizer import Tokenizer

TOKENS = tokens_of(60)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Relative to the largest logit, under teacher forcing."""

needs_compiler = pytest.mark.skipif(
    Compile().why_not(None) is not None, reason=f"torch.compile cannot be used here: {Compile().why_not(None)}"
)


@pytest.fixture(scope="module")
def half(checkpoint: Tensors, plugins: Plugins) -> Model:
    return built(checkpoint, plugins, torch.bfloat16)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def either(request: pytest.FixtureRequest, model: Model, half: Model) -> Model:
    return model if request.param == torch.float32 else half


@pytest.fixture(scope="module")
def compiled(architecture: Architecture, tokenizer: Tokenizer, plugins: Plugins) -> Iterator[Engine]:
    """The one engine that is compiled, of a single layer: it takes a while."""
    model = built(architecture.random(tiny_config(architecture, layers=1), dtype=torch.bfloat16), plugins)
    yield Engine(model, Compile(), Nucleus(), tokenizer)
    torch._dynamo.reset()


def forced(engine: Engine, tokens: Sequence[int]) -> Tensor:
    """Logits of the ids that there are after each token, read one by one through the engine's own decode step."""
    engine.state.clear(0)
    rows = []
    for token in tokens:
        engine.tokens[0] = token
        engine._ticks[1]()
        rows.append(engine.logits[0, PRESENT].clone())
    return torch.stack(rows)


@pytest.mark.parametrize("backend", [Eager(), Script()], ids=lambda b: b.name)
def test_logits_are_those_of_plain_pytorch(backend: Backend, either: Model, tokenizer: Tokenizer) -> None:
    expected = logits_of(either, TOKENS)
    forward = backend.forward(either)
    at_once = forward(torch.tensor([TOKENS]), either.new_state(), every=True)[0]
    assert apart(at_once, expected) < TOLERANCE[either.dtype]
    singly = forced(Engine(either, backend, Nucleus(), tokenizer), TOKENS)
    assert apart(singly, expected[:, PRESENT]) < TOLERANCE[either.dtype]


@needs_compiler
def test_logits_of_the_compiled_step_are_those_of_plain_pytorch(compiled: Engine) -> None:
    expected = logits_of(compiled.model, TOKENS)
    assert apart(forced(compiled, TOKENS), expected[:, PRESENT]) < TOLERANCE[torch.bfloat16]
    at_once = compiled.forward(torch.tensor([TOKENS]), compiled.model.new_state(), every=True)[0]
    assert torch.equal(at_once, expected)  # prompts are not compiled


@needs_compiler
def test_the_compiled_step_draws_what_its_sampler_draws(compiled: Engine) -> None:
    forced(compiled, TOKENS[:3])
    for seed in (0, -1, 1 << 62):
        compiled.controls.set(0, check_params(Nucleus(), {"top_p": 0.95, "temperature": 1.5}), seed, 0)
        for position in range(20):
            compiled._ticks[1]()
            assert int(compiled.controls.position) == position + 1
            controls = controls_of(Nucleus(), 1, VOCAB_SIZE, seed, top_p=0.95, temperature=1.5)
            controls.position[0] = position
            assert torch.equal(compiled.drawn, Nucleus().sample(compiled.logits, controls))
            assert int(compiled.tokens) == int(compiled.drawn)


@needs_compiler
def test_compiling_leaves_no_trace_in_the_first_text(compiled: Engine) -> None:
    """Compiling runs the step once; the row is as fresh afterwards as before."""
    request = Request(TOKENS[:9], {"temperature": 0}, max_tokens=12)
    first, second = finish(compiled, request)[0], finish(compiled, request)[0]
    assert first.tokens == second.tokens


@needs_compiler
def test_nothing_is_compiled_again_for_other_texts(compiled: Engine) -> None:
    finish(compiled, Request(max_tokens=2))
    graphs = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        generations = [
            finish(compiled, Request(tokens_of(length), params, max_tokens=5, seed=seed))[0]
            for length, params, seed in (
                (1, {"temperature": 0.5}, 1),
                (70, {"top_k": 3}, -1),
                (8, {"top_p": 0.0}, 1 << 63),
            )
        ]
    assert [len(g.tokens) for g in generations] == [5, 5, 5]
    assert counters["stats"]["unique_graphs"] == graphs


START = """
import json
from torch._dynamo.utils import counters
from rwkv_runtime import Plugins
from rwkv_runtime.testing import tiny_model

runtime = tiny_model(backend="compile", n_layer=1, n_embd=32, plugins=Plugins.load({"RWKV_PLUGINS": ""}))
text = "".join(runtime.generate("Hi", sampler="greedy", max_tokens=5))
print(json.dumps([runtime.backend.name, text, dict(counters["inductor"])]))
"""


@needs_compiler
def test_the_second_start_compiles_nothing_anew(tmp_path: Path) -> None:
    """What the first process compiled, the second one takes from the disk, though its ticks have other names."""
    environ = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    starts = [
        json.loads(subprocess.run([sys.executable, "-c", START], env=environ, capture_output=True, check=True).stdout)
        for _ in range(2)
    ]
    (cold, text, first), (warm, again, second) = starts
    assert (cold, warm, text) == ("compile", "compile", again)
    assert (first["fxgraph_cache_miss"], first.get("fxgraph_cache_hit", 0)) == (1, 0)
    assert (second["fxgraph_cache_hit"], second.get("fxgraph_cache_miss", 0)) == (1, 0)


TALKATIVE = """
import logging, warnings
import torch

def compile(step, **options):
    untried = [True]
    def compiled():
        if untried:
            untried.clear()
            logging.getLogger("torch._inductor.utils").warning("Not enough SMs")
            warnings.warn("TensorFloat32 is available but not enabled")
        step()
    return compiled

torch.compile = compile
from rwkv_runtime.cli import main
main()
"""


@pytest.mark.parametrize("asked", [{}, {"TORCH_LOGS": "inductor"}], ids=["as usual", "asked for by TORCH_LOGS"])
def test_compiling_is_said_once_and_torch_is_heard_where_it_is_asked_for(asked: dict[str, str], tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('"Hello"\n' * 5, encoding="utf-8")
    words = ["--model", str(save_tiny_model(tmp_path)), "--prompts", str(source), "--output", str(output)]
    words += ["--rows", "5", "--backend", "compile", "--max-tokens", "3"]  # three sizes of batch

    def errors(*more: str) -> list[str]:
        output.unlink(missing_ok=True)
        env = {name: value for name, value in os.environ.items() if name != "TORCH_LOGS"}
        run = [sys.executable, "-c", TALKATIVE, *words, *more]
        env |= {"CXX": sys.executable, **asked}
        return subprocess.run(run, env=env, capture_output=True, text=True, check=True).stderr.splitlines()

    said, heard = errors(), errors("--quiet")
    assert said.count("preparing the decode step: minutes the first time, seconds once it is compiled") == 1
    assert said[-1].startswith("5 of 5 lines done")
    for warning in ("Not enough SMs", "TensorFloat32 is available"):
        assert any(warning in line for line in heard) == bool(asked)
    if not asked:
        assert (len(said), heard) == (2, [])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_gpu_the_compiled_step_is_a_graph(
    architecture: Architecture, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = tiny_model(architecture.name, backend="compile", n_layer=1, device="cuda")
    engine = runtime.engine("nucleus")
    assert [record.message for record in caplog.records if record.name == "rwkv_runtime"] == []
    assert runtime.backend.name == "compile"
    assert isinstance(engine._ticks[1], Captured)
    plain = Engine(runtime.model, Eager(), Nucleus(), runtime.tokenizer)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert apart(forced(engine, TOKENS), forced(plain, TOKENS)) < 1e-3
        assert len(finish(engine, Request([5], max_tokens=9, seed=2))[0].tokens) == 9


def test_a_missing_compiler_is_noticed_before_it_hurts(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    for asked in (model, None):
        assert Compile().why_not(asked).startswith("no C++ compiler found: there is no ")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler" in str(Compile().why_not(model))
    assert (Eager().why_not(model), Script().why_not(model)) == (None, None)


def test_every_backend_says_whether_it_is_usable_here(
    plugins: Plugins, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    reasons = usable(plugins, model)
    assert reasons.keys() >= {"eager", "script", "compile"}
    assert (reasons["eager"], reasons["script"]) == (None, None)
    assert "compiler" in str(reasons["compile"])


class Broken(Backend):
    """Fails where it is told to."""

    name = "broken"
    priority = 99

    def __init__(self, where: str, error: Exception | str) -> None:
        self.where, self.error = where, error

    def fail(self, where: str) -> None:
        if self.where == where and isinstance(self.error, Exception):
            raise self.error

    def why_not(self, model: Model | None) -> str | None:
        self.fail("why_not")
        return str(self.error) if self.where == "refuse" else None

    def forward(self, model: Model) -> Forward:
        self.fail("forward")
        return Eager().forward(model)

    def new_state(self, model: Model, rows: int) -> State:
        self.fail("new_state")
        return super().new_state(model, rows)

    def freeze(self, tick: Tick, buffers: Sequence[Tensor]) -> Tick:
        self.fail("freeze")
        return tick


def plugins_with(backend: Backend) -> Plugins:
    """One backend and `eager`, to which it gives way."""
    plugins = Plugins.empty()
    plugins.samplers.add(Nucleus(), "test")
    for added in (backend, Eager()):
        plugins.backends.add(added, "test")
    return plugins


@pytest.mark.parametrize(
    ("broken", "warning"),
    [
        (Broken("refuse", "it is not well"), "it is not well"),
        (Broken("why_not", RuntimeError("no idea")), "RuntimeError: no idea"),
        (Broken("forward", BackendError("no kernel for this")), "no kernel for this"),
        (Broken("forward", RuntimeError("out of luck")), "RuntimeError: out of luck"),
        (Broken("new_state", RuntimeError("no such dtype")), "no such dtype"),
        (Broken("freeze", BackendError("cannot capture")), "cannot capture"),
        (Broken("freeze", RuntimeError("nvcc said no\nmany\nlines")), "nvcc said no"),
        (Broken("freeze", AssertionError()), "AssertionError"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.where,
)
def test_a_backend_that_fails_is_named_once_and_the_text_is_written(
    broken: Broken, warning: str, model: Model, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    expected = "".join(Runtime(model, tokenizer, plugins_with(Broken("", ""))).generate("a", max_tokens=9, seed=1))
    with caplog.at_level(logging.WARNING, "rwkv_runtime"):
        runtime = Runtime(model, tokenizer, plugins_with(broken), "broken")
        texts = ["".join(runtime.generate("a", max_tokens=9, seed=1)) for _ in range(2)]
    assert texts == [expected, expected]
    assert [record.getMessage() for record in caplog.records] == [f"backend broken: {warning}; using eager instead"]
    assert runtime.backend.name == "eager"


def test_a_backend_that_refuses_and_was_not_asked_for_is_passed_over_quietly(
    model: Model, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = Runtime(model, tokenizer, plugins_with(Broken("refuse", "it is not well")))
    assert runtime.backend.name == "eager"
    assert caplog.records == []


def test_where_no_backend_is_left_the_reason_is_the_error(model: Model, tokenizer: Tokenizer) -> None:
    plugins = Plugins.empty()
    plugins.backends.add(Broken("forward", RuntimeError("out of luck")), "test")
    with pytest.raises(BackendError, match="backend broken: RuntimeError: out of luck; no other backend can run"):
        Runtime(model, tokenizer, plugins)


def test_rows_that_have_no_room_are_too_many_for_any_backend(model: Model, tokenizer: Tokenizer) -> None:
    runtime = Runtime(model, tokenizer, plugins_with(Broken("new_state", torch.OutOfMemoryError("no room"))), "broken")
    with pytest.raises(torch.OutOfMemoryError):
        runtime.generate_batch(["a"], rows=2)
    assert runtime.backend.name == "broken"


def test_a_runtime_has_one_forward_pass_for_all_its_engines(model: Model, tokenizer: Tokenizer) -> None:
    """Each may hold weights in a form of its own."""

    class Counting(Broken):
        made = 0

        def forward(self, model: Model) -> Forward:
            self.made += 1
            return super().forward(model)

    backend = Counting("", "")
    runtime = Runtime(model, tokenizer, plugins_with(backend))
    runtime.forward(TOKENS)
    for rows in (1, 2):
        runtime.engine("nucleus", rows)
    assert backend.made == 1

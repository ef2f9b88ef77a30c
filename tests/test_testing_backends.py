"""What `check_backend` promises to authors: the built-in backends pass, and each mistake is named."""

from __future__ import annotations

from functools import partial

import pytest
from rwkv_backends.compile import Compile

from rwkv_runtime import Backend, BackendError
from rwkv_runtime.state import State
from rwkv_runtime.testing import check_backend


@pytest.mark.parametrize("name", ["eager", "script"])
def test_a_built_in_backend_passes(plugins, name):
    assert check_backend(plugins.backends.get(name)) is None


def test_the_compile_backend_passes(plugins):
    if reason := Compile().why_not(None):
        pytest.skip(reason)
    assert check_backend(Compile(), n_layer=1, n_embd=16) is None


class Twin(Backend):
    """A correct backend, to be broken in many ways."""

    name = "twin"

    def __init__(self, wrap=None, why=None, freeze=None, state=State, trusting=False):
        self.wrap, self.why, self.frozen, self.state, self.trusting = wrap, why, freeze, state, trusting

    def why_not(self, model):
        return self.why

    def forward(self, model):
        forward = partial(model.architecture.forward, model.architecture.ops, model.weights)
        return partial(self.wrap, forward) if self.wrap else forward

    def settle(self, token, logits, refused, outcome):
        return super().settle(token, logits, refused or self.trusting, outcome)

    def new_state(self, model, rows):
        plain = model.new_state(rows)
        return self.state(plain.tensors, plain.initial, plain.architecture)

    def freeze(self, tick, buffers):
        return self.frozen(tick, buffers) if self.frozen else tick


class Keeps(State):
    """Names a tensor of its own nowhere, so that it leaves the engine with every row."""

    def __init__(self, tensors, initial, architecture):
        mine = {"mine": tensors.get("mine", tensors["att_x_prev"])}
        super().__init__(tensors | mine, initial, architecture)

    def copy(self, source, source_row, row):
        self.tensors["att_kv"][:, row] = source["att_kv"][:, source_row]


class Forgets(State):
    def settled(self, row):
        fresh = super().settled(row)
        fresh.clear(0)
        return fresh


def on_a_copy(forward, tokens, state, every=False):
    return forward(tokens, state.clone(), every)


def with_new_tensors(forward, tokens, state, every=False):
    state.tensors = {name: t.clone() for name, t in state.tensors.items()}
    return forward(tokens, state, every)


def beyond_its_rows(forward, tokens, state, every=False):
    for t in state.tensors.values():
        if t._base is not None:
            t._base[:, -1] += 1
    return forward(tokens, state, every)


def one_row_for_all(forward, tokens, state, every=False):
    return forward(tokens[:1].expand_as(tokens).contiguous(), state, every)


def no_chunks(forward, tokens, state, every=False):
    if tokens.shape[1] == 17:
        return forward(tokens[:, :16], state, every)
    return forward(tokens, state, every)


def only_the_last(forward, tokens, state, every=False):
    return forward(tokens, state)


def in_half(forward, tokens, state, every=False):
    return forward(tokens, state, every).bfloat16()


def rounded(forward, tokens, state, every=False):
    return forward(tokens, state, every).bfloat16().float()


def no_memory(forward, tokens, state, every=False):
    raise MemoryError("no room for this")


def ran_once(tick, buffers):
    tick()
    return tick


def a_stale_answer(tick, buffers):
    return lambda: None


def eager_to_finish(tick, buffers):
    def double():
        tick()
        buffers[-1].add_(1)

    return double


def build_fails(tick, buffers):
    raise BackendError("no compiler")


BACKENDS = {
    "rwkv6: cannot be used here: no such chip": Twin(why="no such chip"),
    "rwkv6: why_not gives False, not None or one line": Twin(why=False),
    "rwkv6: 1 token after 1 others: is .*; the caller's state is not updated": Twin(on_a_copy),
    "rwkv6: the caller's state gets new tensors; write into the ones it has": Twin(with_new_tensors),
    "rwkv6: it changes rows of the state that are not in the view": Twin(beyond_its_rows),
    "rwkv6: a prompt in one piece: is .* away from the reference, 1e-04 is allowed": Twin(one_row_for_all),
    "rwkv6: 17 tokens after 2 others: is ": Twin(no_chunks),
    r"rwkv6: every=True: gives float32 \[2, 257\] where float32 \[2, 64, 257\] is expected": Twin(only_the_last),
    r"rwkv6: a prompt in one piece: gives bfloat16 \[2, 257\]": Twin(in_half),
    "rwkv6: every=True: is .* away": Twin(rounded),
    "rwkv6: a prompt in pieces raises MemoryError: no room for this": Twin(no_memory),
    "rwkv6: freeze does not leave the buffers as it found them": Twin(freeze=ran_once),
    "rwkv6: the frozen decode step, token 1: is ": Twin(freeze=a_stale_answer),
    r"rwkv6: the frozen decode step ran \[8, 8\] times, not 4": Twin(freeze=eager_to_finish),
    r"rwkv6: settle gives \[3, -1, -1, 7, -1, 9\], not \[3, -1, -1, -1, -1, -1\]": Twin(trusting=True),
    "rwkv6: a row taken out of its state is a State of .*, mine": Twin(state=Keeps),
    "rwkv6: a row taken out of its state after 0 decode steps: is ": Twin(state=Forgets),
    "rwkv6: the frozen decode step raises BackendError: no compiler": Twin(freeze=build_fails),
}


def test_a_correct_backend_passes():
    assert check_backend(Twin()) is None


@pytest.mark.parametrize("message", BACKENDS)
def test_a_mistake_in_a_backend_is_named(plugins, message):
    with pytest.raises(AssertionError, match=f"(?m)^backend twin: {message}"):
        check_backend(BACKENDS[message], plugins.architectures, n_layer=1, n_embd=32)


def test_a_backend_that_raises_in_forward_is_named(plugins):
    class Unready(Twin):
        def forward(self, model):
            raise ImportError("libfast.so is missing")

    with pytest.raises(AssertionError, match=r"forward raises ImportError: libfast\.so is missing"):
        check_backend(Unready(), plugins.architectures)


def test_a_backend_that_cannot_warm_up_is_named(plugins):
    class Cold(Twin):
        def warm_up(self, device, blank):
            raise OSError("no such library")

    with pytest.raises(AssertionError, match="warm_up raises OSError: no such library"):
        check_backend(Cold(), plugins.architectures)


def test_a_backend_is_not_passed_without_trying_it():
    with pytest.raises(AssertionError, match="no architecture to try it with"):
        check_backend(Twin(), [])

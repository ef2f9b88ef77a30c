"""What `rwkv_runtime.testing` promises to authors: the built-in samplers pass, and each mistake is named."""

from __future__ import annotations

import pytest
import torch

from rwkv_runtime import Controls, OptionError, Param, Sampler, TensorSpec
from rwkv_runtime.testing import byte_tokenizer, check_sampler, distribution, tiny_checkpoint, tiny_model

INF = torch.inf


class Floor(Sampler):
    """A correct sampler, to be broken in many ways."""

    name = "floor"
    runs = "graph"
    params = {"floor": Param(0.1, 0.0, 1.0, "least probability, as a share of the best token's", off=0.0)}

    def filter(self, logits, controls):
        return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + controls["floor"].log(), -INF)


class Recent(Floor):
    """A correct sampler with a memory: what was drawn last is drawn less."""

    name = "recent"
    params = {"less": Param(1.0, 0.0, 10.0)}

    def slots(self, vocab_size):
        return {"drawn": TensorSpec((vocab_size,), torch.float32)}

    def filter(self, logits, controls):
        return logits - controls["less"] * controls.slots["drawn"]

    def update(self, tokens, logits, controls):
        controls.slots["drawn"].copy_((controls.ids == tokens[:, None]).float())


def test_every_built_in_sampler_passes(plugins):
    assert len(plugins.samplers.names()) >= 2
    for sampler in plugins.samplers:
        check_sampler(sampler)


@pytest.mark.parametrize("sampler", [Floor(), Recent()])
def test_a_correct_sampler_passes(sampler):
    assert check_sampler(sampler) is None


def test_a_sampler_on_the_host_may_filter_by_what_its_prompt_left_in_its_notes():
    class Prompted(Floor):
        name, runs = "prompted", "host"

        def prime(self, tokens, controls):
            controls.notes[0]["last"] = int(tokens[-1])

        def filter(self, logits, controls):
            kept = logits.clone()
            kept[:, 0] -= torch.tensor([note["last"] for note in controls.notes])
            return super().filter(kept, controls)

    check_sampler(Prompted())


def test_a_sampler_that_says_it_refuses_bad_rows_must_do_so():
    class Careless(Floor):
        refuses = True

        def sample(self, logits, controls):
            return self.filter(logits, controls).argmax(dim=-1)

    with pytest.raises(AssertionError, match="says that it refuses rows that cannot be drawn from, and draws from one"):
        check_sampler(Careless())


def broken(filter=None, *, sample=None, update=None, prime=None, prepare=None, runs="graph", params=None, slots=None):
    """Floor with some of its parts replaced."""
    sampler = Floor()
    sampler.name, sampler.runs = "mine", runs
    if slots is not None:
        sampler.slots = lambda vocab_size: slots
    if params is not None:
        sampler.params = params
    methods = {"filter": filter, "sample": sample, "update": update, "prime": prime, "prepare": prepare}
    for name, method in methods.items():
        if method:
            setattr(sampler, name, method)
    return sampler


def brings_back(z, controls):
    return z.masked_fill(z < z.amax(dim=-1, keepdim=True) - 2, -1e9)


def in_place(z, controls):
    return z.masked_fill_(z < z.amax(dim=-1, keepdim=True) - 2, -INF)


def clamps_its_parameter(z, controls):
    controls["floor"].clamp_(min=0.5)
    return z


def sorts_once(z, controls):
    return z.masked_fill(z < z.max() - 2, -INF)  # the best of the whole batch


def forgets_its_seed(z, controls):
    kept = Floor().filter(z, controls)
    return (kept + torch.rand_like(kept)).argmax(-1)  # an id that filter keeps, whatever the numbers: found at each run


COUNT = {"count": TensorSpec((1,), torch.int64)}


def raising(controls):
    raise ValueError("not ready")


def counts_too_early(z, controls):
    controls.slots["count"].add_(1)
    return z


def replaces_its_slot(tokens, z, controls):
    controls.slots["count"] = controls.slots["count"] + 1


MISTAKES = {
    "changes the logits it is given": broken(in_place),
    "changes the parameters, the seed or the position in its controls": broken(clamps_its_parameter),
    "a row's result depends on its batch-mates": broken(sorts_once),
    "filter gives NaN": broken(lambda z, c: z.softmax(-1).log() * c["floor"].clamp(max=0.0)),
    "filter keeps no token at all": broken(lambda z, c: z.masked_fill(z <= z.amax(-1, keepdim=True), -INF)),
    "filter brings back a masked id: one whose logit was -inf": broken(brings_back),
    "it gives probabilities where logits are expected": broken(lambda z, c: z.softmax(-1)),
    "filter gives float64 [1, 64], not float32 [1, 64]": broken(lambda z, c: z.double()),
    "filter gives float32 [1, 63], not float32 [1, 64]": broken(lambda z, c: z[:, 1:]),
    "sample gives int64 [1, 1], not int64 [1]": broken(sample=lambda z, c: z.argmax(-1, keepdim=True)),
    "sample gives int32 [1], not int64 [1]": broken(sample=lambda z, c: z.argmax(-1).int()),
    "sample draws 64, which is no token id": broken(sample=lambda z, c: z.argmax(-1) * 0 + 64),
    "sample draws a token that filter does not keep": broken(sample=lambda z, c: z.argmin(-1)),
    "does not repeat with the same seed": broken(sample=forgets_its_seed),
    "over 4096 seeds it draws token 0 4096 times": broken(sample=lambda z, c: z.argmax(-1)),
    "over 4096 positions it draws": broken(sample=lambda z, c: Controls.draw(Fixed(c), Floor().filter(z, c))),
    "the default of p is out of its own bounds: p is a number from 0 to 1, not 2": broken(
        params={"p": Param(2.0, 0, 1)}
    ),
    "the neutral value of k is out of its own bounds": broken(params={"k": Param(5, 1, 9, off=0)}),
    "'seed' cannot be a parameter": broken(params={"seed": Param(1)}),
    "'top-p' cannot be a parameter": broken(params={"top-p": Param(1)}),
    "raises RuntimeError: selected index k out of range": broken(
        lambda z, c: z.masked_fill(z < z.topk(int(c["k"].max()))[0].amin(-1, keepdim=True), -INF),
        params={"k": Param(5, 1, 1000)},
    ),
    "runs is 'gpu', not one of graph, device, host": broken(runs="gpu"),
    "raises IndexError: index": broken(prime=lambda tokens, c: tokens[99]),
    "raises ValueError: not ready": broken(prepare=raising, runs="host"),
    "changes its slots before a token is drawn": broken(counts_too_early, slots=COUNT),
    "puts another tensor in the place of a slot": broken(update=replaces_its_slot, slots=COUNT),
    "(logits: all equal; floor=0.1)": broken(lambda z, c: z / (z != 0).any(-1, keepdim=True)),
}


class Fixed:
    """Controls whose position never moves."""

    def __init__(self, controls):
        self.seed, self.position, self.ids = controls.seed, controls.position * 0, controls.ids


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_in_a_sampler_is_named(message):
    with pytest.raises(AssertionError) as caught:
        check_sampler(MISTAKES[message])
    assert message in str(caught.value)
    assert all(line.startswith("sampler mine: ") for line in str(caught.value).splitlines())


WAITS = {
    "item": lambda z, c: z + z.isnan().any().item(),
    "if": lambda z, c: z if (z > 0).any() else z + 0,
    "tolist": lambda z, c: z + 0 * len(z.tolist()),
    "numpy": lambda z, c: z + torch.from_numpy(z.numpy() * 0),
    "nonzero": lambda z, c: z + 0 * len(z.nonzero()),
    "mask": lambda z, c: z + 0 * z[z > 0].numel(),
    "masked assignment": lambda z, c: z.clone().index_put_((z < 0,), z[z < 0]),
    "cpu": lambda z, c: z.cpu(),
    "equal": lambda z, c: z + 0 * torch.equal(z, z),
}


@pytest.mark.parametrize("how", WAITS)
def test_waiting_for_the_host_inside_a_graph_is_named_with_its_line(how):
    def quiet(z, controls):
        return WAITS[how](z.nan_to_num(0, 9, -9), controls) * 0 + z

    with pytest.raises(
        AssertionError, match=r'waits for the host.* or say runs = "device" \[test_testing.py, line \d+: '
    ):
        check_sampler(broken(quiet))
    check_sampler(broken(quiet, runs="device"))


def test_a_tensor_made_on_another_device_is_named_with_its_line():
    with pytest.raises(
        AssertionError, match=r"mixes devices; make tensors with device=logits.device \[test_testing.py"
    ):
        check_sampler(broken(lambda z, c: z + torch.zeros(z.shape[-1])))


def test_several_mistakes_are_a_line_each():
    with pytest.raises(AssertionError) as caught:
        check_sampler(broken(lambda z, c: z + z.nan_to_num(0, 0, 0)[:, 0].mean().item() * c.ids / 100))
    assert [("batch-mates" in line, "waits" in line) for line in str(caught.value).splitlines()] == [(1, 0), (0, 1)]


def test_a_check_that_refuses_the_defaults_is_named():
    class Choosy(Floor):
        def check(self, params):
            raise OptionError("nothing is good enough")

    with pytest.raises(AssertionError, match="its check refuses the defaults: OptionError: nothing is good enough"):
        check_sampler(Choosy())


def test_the_distribution_is_exact_and_has_a_setting_for_each_row():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    got = distribution(Floor(), logits.expand(3, -1), floor=[0.0, 0.3, 0.9])
    expected = torch.tensor([[4, 2, 1, 1], [16 / 3, 8 / 3, 0, 0], [8, 0, 0, 0]], dtype=torch.float64) / 8
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(distribution(Floor(), logits, floor=0.3), expected[1:2])


def test_a_row_that_cannot_be_drawn_from_has_no_probability():
    logits = torch.tensor([[0.0, 1.0], [torch.nan, 1.0], [-INF, -INF], [INF, 0.0]])
    assert distribution(Floor(), logits).sum(dim=-1).tolist() == [1, 0, 0, 0]


def test_a_distribution_has_what_is_set_by_a_text(plugins):
    logits = torch.tensor([0.6, 0.3, 0.1]).log()
    got = distribution(plugins.sampler("banned"), logits, banned="0")
    torch.testing.assert_close(got, torch.tensor([[0.0, 0.75, 0.25]], dtype=torch.float64), rtol=1e-6, atol=1e-6)
    with pytest.raises(OptionError, match="'99' is none"):
        distribution(plugins.sampler("banned"), logits, banned="99")


def test_a_distribution_takes_no_parameter_that_the_runtime_would_refuse():
    with pytest.raises(OptionError, match="did you mean floor"):
        distribution(Floor(), torch.zeros(4), flor=0.1)
    with pytest.raises(OptionError, match="from 0 to 1"):
        distribution(Floor(), torch.zeros(4), floor=7)


def test_a_tiny_model_reads_and_writes_like_any_other(plugins):
    model = tiny_model(plugins=plugins)
    assert model.tokenizer.encode("Hi") == [73, 106]
    assert model.logits([73, 106]).shape == (2, 257)
    texts = ["".join(model.generate("Hi", max_tokens=12, seed=4)) for _ in range(2)]
    assert texts[0] == texts[1] != ""
    assert model.backend.name == "eager"
    assert not torch.equal(model.logits([1]), tiny_model(plugins=plugins, seed=1).logits([1]))


def test_a_tiny_model_of_an_unknown_family_is_refused(plugins):
    with pytest.raises(OptionError, match="did you mean rwkv6"):
        tiny_model("rwkv66", plugins=plugins)


def test_a_tiny_checkpoint_can_be_made_without_any_plugin_manager(plugins):
    tensors = tiny_checkpoint(plugins.architectures.get("rwkv6"), n_layer=1, n_embd=32)
    assert tensors["emb.weight"].shape == (byte_tokenizer().vocab_size, 32)

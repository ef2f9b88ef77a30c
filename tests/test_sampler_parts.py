"""The parts samplers are made of: parameters, controls of each row, memory, and chains."""

from __future__ import annotations

import math

import pytest
import torch
from engines import Once
from helpers import CPU, controls_of
from rwkv_samplers.greedy import Greedy
from rwkv_samplers.nucleus import Nucleus
from torch import Tensor

from rwkv_runtime.controls import Controls
from rwkv_runtime.errors import OptionError, PluginError
from rwkv_runtime.plugins import Plugins
from rwkv_runtime.sampler import Chain, Param, Sampler, check_params


class Floor(Sampler):
    name = "floor"
    params = {"floor": Param(0.0, -100.0, 100.0)}
    runs = "host"

    def filter(self, logits: Tensor, controls: Controls) -> Tensor:
        return logits.masked_fill(logits < controls["floor"], -torch.inf)


@pytest.mark.parametrize(
    ("param", "value", "result"),
    [
        (Param(1.0, 0.0, 2.0), "0.5", 0.5),
        (Param(1.0, 0.0, 2.0), 2, 2.0),
        (Param(0, 0, 1 << 31), "40", 40),
        (Param(0, 0), 3.0, 3),
        (Param(1.0), "-inf", -math.inf),
    ],
)
def test_a_value_becomes_a_number_of_its_parameters_type(param: Param, value: object, result: float) -> None:
    checked = param.check("x", value)
    assert (checked, type(checked)) == (result, type(param.default))


@pytest.mark.parametrize(
    ("param", "value", "reason"),
    [
        (Param(1.0, 0.0, 2.0), 2.1, "top is a number from 0 to 2, not 2.1"),
        (Param(1.0, 0.0, 2.0), "nan", "top is a number from 0 to 2, not nan"),
        (Param(1.0), "much", "top is a number, not 'much'"),
        (Param(1.0), None, "top is a number, not None"),
        (Param(1.0), True, "top is a number, not True"),
        (Param(3, 0, 9), 2.5, "top is a whole number from 0 to 9, not 2.5"),
        (Param(3, 0), "inf", "top is a whole number from 0 to inf, not inf"),
        (Param(0), 1 << 63, "top is a whole number of at most 9.0072e+15, not 9223372036854775808"),
        (Param(1.0), 1e39, "top is a number of at most 3.40282e+38, not 1e+39"),
        (Param("some"), None, "top is a text, not None"),
        (Param("some"), False, "top is a text, not False"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_with_what_does(param: Param, value: object, reason: str) -> None:
    with pytest.raises(OptionError) as caught:
        param.check("top", value)
    assert str(caught.value) == reason


def test_a_sampler_takes_its_own_parameters_only() -> None:
    assert check_params(Nucleus(), {"top_p": "0.5"}) == {"temperature": 1.0, "top_p": 0.5, "top_k": 0}
    with pytest.raises(OptionError, match="has no parameter 'top_q'; did you mean top_p"):
        check_params(Nucleus(), {"top_q": 1})
    with pytest.raises(OptionError, match="has no parameter 'colour'; it has temperature, top_p, top_k"):
        check_params(Nucleus(), {"colour": 1})
    with pytest.raises(OptionError, match="it has none"):
        check_params(Greedy(), {"colour": 1})


def test_whole_numbers_reach_the_sampler_exactly() -> None:
    controls = controls_of(Nucleus(), 2, 4, top_k=[(1 << 31) - 1, 0], temperature=0.5)
    assert controls["top_k"].tolist() == [[(1 << 31) - 1], [0]]
    assert (controls["top_k"].dtype, controls["temperature"].dtype) == (torch.int64, torch.float32)


def test_a_row_is_started_afresh_and_moves_with_all_it_has() -> None:
    sampler = Chain([Nucleus(), Once()])
    controls = controls_of(sampler, 3, 5, temperature=[0.1, 0.2, 0.3], seed=7)
    sampler.update(torch.tensor([0, -1, 2]), torch.zeros(3, 1), controls)
    controls.move(2, 0)
    assert controls["temperature"][:, 0].tolist() == pytest.approx([0.3, 0.2, 0.3])
    assert controls.position[:, 0].tolist() == [2, 1, 2]
    assert controls.slots["drawn"].nonzero().tolist() == [[0, 2], [2, 2]]  # the failed row remembers nothing
    controls.set(2, check_params(sampler, {}), -5, 40)
    assert not bool(controls.slots["drawn"][2].any())
    assert (int(controls.seed[2]), int(controls.position[2])) == (-5, 40)
    assert int(controls.seed[0]) == 7


def test_a_view_of_the_first_rows_is_the_same_memory() -> None:
    controls = Controls.allocate(Once(), 4, 5, CPU)
    Once().update(torch.tensor([3, 4]), torch.zeros(2, 1), controls.view(0, 2))
    assert controls.slots["drawn"].nonzero().tolist() == [[0, 3], [1, 4]]


def test_each_row_remembers_its_own() -> None:
    sampler = Once()
    controls = controls_of(sampler, 2, 4)
    logits = torch.tensor([[9.0, 6.0, 3.0, 0.0], [0.0, 3.0, 6.0, 9.0]]) * 10
    drawn = []
    for _ in range(4):
        tokens = sampler.sample(logits, controls)
        sampler.update(tokens, logits, controls)
        drawn.append(tokens.tolist())
    assert drawn == [[0, 3], [1, 2], [2, 1], [3, 0]]
    assert sampler.sample(logits, controls).tolist() == [-1, -1]  # nothing is left


def test_a_chain_filters_in_its_order_and_draws_once(plugins: Plugins) -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    first, second = Chain([Floor(), Nucleus()]), Chain([Nucleus(), Floor()])
    params = {"floor": 1.5, "top_p": 1.0, "temperature": 10.0}
    kept = first.filter(logits, controls_of(first, 1, 4, **params))
    assert kept.isfinite().tolist() == [[True, True, False, False]]
    none = second.filter(logits, controls_of(second, 1, 4, **params))  # nucleus leaves logits of at most zero
    assert second.sample(logits, controls_of(second, 1, 4, **params)).tolist() == [-1]
    assert not bool(none.isfinite().any())
    assert plugins.sampler("greedy, nucleus").name == "greedy,nucleus"


def test_a_chain_is_the_sum_of_its_parts() -> None:
    chain = Chain([Once(), Nucleus(), Floor()])
    assert chain.name == "once,nucleus,floor"
    assert list(chain.params) == ["strength", "temperature", "top_p", "top_k", "floor"]
    assert list(chain.slots(4)) == ["drawn"]
    assert chain.runs == "host"  # as the most demanding of them
    assert Chain([Nucleus(), Greedy()]).runs == "graph"
    assert Chain([Nucleus(), Once()]).runs == "device"


def test_a_chain_refuses_what_clashes() -> None:
    with pytest.raises(OptionError, match="has 'temperature' twice"):
        Chain([Nucleus(), Nucleus()])

    class Alone(Sampler):
        name = "alone"

        def sample(self, logits: Tensor, controls: Controls) -> Tensor:
            return logits.argmin(dim=-1)

    with pytest.raises(OptionError, match="alone draws in its own way"):
        Chain([Alone(), Nucleus()])

    class Other(Once):
        name = "other"
        params = {}

    with pytest.raises(PluginError, match="its slot 'drawn' is another sampler's"):
        Controls.allocate(Chain([Once(), Other()]), 1, 4, CPU)

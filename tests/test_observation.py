"""Log-probabilities and --explain: what was drawn, from what."""

from __future__ import annotations

import json
import math

import pytest
import torch
from click.testing import CliRunner
from helpers import byte_tokenizer, controls_of
from rwkv_samplers.greedy import Greedy
from rwkv_samplers.nucleus import Nucleus

from rwkv_runtime.cli import command
from rwkv_runtime.cli.explain import as_record, table
from rwkv_runtime.observation import observe
from rwkv_runtime.runtime import Runtime
from rwkv_runtime.sampler import Chain

LOGITS = torch.tensor([[0.4, 0.3, 0.15, 0.1, 0.05]]).log()


def test_an_observation_shows_the_probabilities_after_the_model_and_after_every_stage() -> None:
    sampler = Chain([Nucleus(), Greedy()])
    controls = controls_of(sampler, 1, 5, top_p=0.75)
    seen = observe(sampler, LOGITS, controls).row(0, token=4, count=2)
    assert seen.stages == ("model", "nucleus", "greedy")
    assert seen.candidates == (0, 1, 4)  # the likeliest two, and the drawn one
    assert [math.exp(p) for p in seen.of(0)] == pytest.approx([0.4, 0.4 / 0.75, 1.0])
    assert [math.exp(p) for p in seen.of(4)] == pytest.approx([0.05, 0.0, 0.0])


def test_a_candidate_that_only_sampling_made_likely_is_shown_too() -> None:
    class Reversed(Nucleus):
        def filter(self, logits, controls):
            return -logits

    sampler = Reversed()
    seen = observe(sampler, LOGITS, controls_of(sampler, 1, 5)).row(0, token=4, count=1)
    assert seen.candidates == (4, 0)


def test_a_table_marks_the_drawn_token_and_what_is_not_kept() -> None:
    sampler = Nucleus()
    logits = torch.full((1, 260), -20.0)
    logits[0, [66, 67]] = torch.tensor([2.0, 1.0])
    seen = observe(sampler, logits, controls_of(sampler, 1, 260, top_p=0.5)).row(0, token=66, count=2)
    lines = table(seen, byte_tokenizer()).splitlines()
    assert lines[0] == "'A'"
    assert lines[1].split() == ["model", "nucleus"]
    assert lines[2].split() == [">", "'A'", "73.11%", "100.00%"]
    assert lines[3].split() == ["'B'", "26.89%", "-"]
    assert as_record(seen, byte_tokenizer())["candidates"][1]["log_probs"][1] is None


@pytest.mark.usefixtures("lag")
def test_log_probabilities_do_not_change_what_is_written(runtime: Runtime) -> None:
    plain = runtime.generate("abc", max_tokens=12, seed=3)
    watched = runtime.generate("abc", max_tokens=12, seed=3, logprobs=4)
    assert "".join(watched) == "".join(plain)
    observations = watched.generation.observations
    assert [o.token for o in observations] == watched.generation.tokens == plain.generation.tokens
    assert plain.generation.observations == []


@pytest.mark.usefixtures("lag")
def test_the_log_probability_before_sampling_is_the_models(runtime: Runtime) -> None:
    writing = runtime.generate([5, 6, 7], max_tokens=4, seed=3, logprobs=1)
    assert "".join(writing)
    read = [5, 6, 7, *writing.generation.tokens[:-1]]
    logits = runtime.logits(read)[2:].clone()
    logits[:, runtime.tokenizer.absent(logits.shape[1])] = -torch.inf
    expected = torch.log_softmax(logits, -1)
    for step, observation in enumerate(writing.generation.observations):
        assert observation.of(observation.token)[0] == pytest.approx(expected[step, observation.token].item(), abs=1e-4)


def test_the_command_line_gives_log_probabilities_and_explains_every_step() -> None:
    story = ["Tom found a map", "--seed", "1", "--max-tokens", "3"]
    record = json.loads(CliRunner().invoke(command, [*story, "--json", "--logprobs", "2"]).stdout)
    assert len(record["logprobs"]) == record["tokens"] == 3
    assert all(entry["before"] < 0 for entry in record["logprobs"])
    explained = CliRunner().invoke(command, [*story, "--explain"]).stdout
    assert explained.count("model  nucleus") == 3
    assert explained.endswith(f"Tom found a map{record['text']}\n")
    steps = CliRunner().invoke(command, [*story, "--explain", "--json", "--logprobs", "2"]).stdout.splitlines()
    assert [json.loads(line)["token"] for line in steps[:3]] == [entry["token"] for entry in record["logprobs"]]
    wrong = CliRunner().invoke(command, [*story, "--logprobs", "2"])
    assert (wrong.exit_code, wrong.stderr) == (2, "Error: --logprobs goes with --json, --explain or --prompts\n")

"""The training code: its WKV against the naive recurrence, exact resumption, export."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from rwkv_backends.fused import interpreted
from story_models import TINY, shaken_model, text_windows
from torch import Tensor

from training.data import Heldout
from training.export import export, load_model
from training.optimizers import set_rate
from training.options import TrainOptions, kernels_wanted
from training.sample import LayerState, model_step, sample
from training.schedule import Budget, Schedule, format_mix, parse_mix
from training.train import Trainer
from training.wkv import wkv, wkv_recurrence

CPU = torch.device("cpu")


def wkv_inputs(decays: str, length: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """r, k, v, lw [2, T, 2, 8] and u [2, 8], from a fixed seed."""
    generator = torch.Generator().manual_seed(5)
    r, k, v, noise = torch.randn(4, 2, length, 2, 8, generator=generator, dtype=torch.float64)
    uniform = torch.rand(noise.shape, generator=generator, dtype=torch.float64)
    lw = {
        "strong": torch.full_like(noise, -20.0),
        "weak": -1e-6 * uniform,
        "mixed": -torch.exp(uniform * 12 - 9),  # log w from -20 to -1e-4
        "far apart": torch.where(noise > 0, -20.0, -1e-6).double(),
    }[decays]
    u = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    return [x.to(dtype).requires_grad_() for x in (r, k, v, lw, u)]


def apply_wkv(inputs: Sequence[Tensor], chunk: int = 16) -> Tensor:
    r, k, v, lw, u = inputs
    return wkv(r, k, v, lw, u, chunk)


def with_gradients(out: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """A result and its gradients for a fixed direction."""
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    return [out, *torch.autograd.grad(out, inputs, direction.to(out.dtype))]


@pytest.mark.parametrize("decays", ["strong", "weak", "mixed", "far apart"])
@pytest.mark.parametrize(("length", "chunk"), [(2, 16), (16, 16), (37, 16), (96, 32), (9, 4)])
def test_chunked_wkv_is_the_recurrence(decays: str, length: int, chunk: int) -> None:
    inputs = wkv_inputs(decays, length)
    expected = with_gradients(wkv_recurrence(*inputs), inputs)
    actual = with_gradients(apply_wkv(inputs, chunk), inputs)
    for value, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("decays", ["strong", "weak", "mixed", "far apart"])
def test_chunked_wkv_in_fp32_is_close_to_fp64(decays: str) -> None:
    inputs = wkv_inputs(decays, 96)
    single = wkv_inputs(decays, 96, torch.float32)
    expected = with_gradients(wkv_recurrence(*inputs), inputs)
    actual = with_gradients(apply_wkv(single), single)
    for value, reference in zip(actual, expected, strict=True):
        # A gradient that all but vanishes is a difference of terms of order 1.
        error = (value.double() - reference).abs().max() / reference.abs().max().clamp(min=1.0)
        assert error < 5e-5


def test_wkv_passes_gradcheck() -> None:
    inputs = [x.detach()[:1, :5].clone().requires_grad_() for x in wkv_inputs("mixed", 5)[:4]]
    bonus = wkv_inputs("mixed", 5)[4]
    assert torch.autograd.gradcheck(lambda *x: apply_wkv(x, 4), (*inputs, bonus))


@torch.no_grad()
def test_stepwise_decoding_is_the_whole_sequence() -> None:
    model = shaken_model(TINY)
    tokens = torch.randint(TINY.vocab_size, (3, 40), generator=torch.Generator().manual_seed(1))
    states = [LayerState.zero(model.layer(index), 3) for index in range(2)]
    stepped = torch.stack([model_step(model, tokens[:, t], states) for t in range(40)], dim=1)
    torch.testing.assert_close(stepped, model(tokens), rtol=1e-4, atol=1e-4)


def test_exported_names_and_shapes_are_blinkdls(tmp_path: Path) -> None:
    model = shaken_model(TINY)
    export(model.state_dict(), tmp_path / "model.safetensors")
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = safetensors.load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes["emb.weight"] == shapes["head.weight"] == (300, 128)
    assert shapes["blocks.0.ln0.weight"] == (128,)
    assert "blocks.1.ln0.weight" not in shapes
    assert shapes["blocks.1.att.time_maa_w"] == shapes["blocks.1.att.time_decay"] == (1, 1, 128)
    assert shapes["blocks.1.att.time_maa_w1"] == (128, 160)
    assert shapes["blocks.1.att.time_maa_w2"] == (5, 32, 128)
    assert shapes["blocks.1.att.time_decay_w1"] == (128, 64)
    assert shapes["blocks.1.att.time_decay_w2"] == (64, 128)
    assert shapes["blocks.1.att.time_faaaa"] == (2, 64)
    assert shapes["blocks.1.ffn.key.weight"] == (448, 128)
    reloaded = load_model(tmp_path / "model.safetensors")
    for name, tensor in reloaded.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name].bfloat16().float(), rtol=0, atol=0)


def held_out() -> Heldout:
    tokens = torch.randint(1, 300, (4, 33), generator=torch.Generator().manual_seed(3))
    return Heldout(["one", "two"], tokens, torch.tensor([0, 0, 1, 1]), torch.tensor([64, 64]))


def trainer(folder: Path, steps: int = 4, heldout: Heldout | None = None) -> Trainer:
    folder.mkdir(exist_ok=True)
    options = TrainOptions(
        model=TINY,
        schedule=Schedule(peak=3e-3, warmup_steps=2, decay_share=0.5),
        budget=Budget(steps),
        main_mix={"one": 0.7, "two": 0.3},
        decay_mix={"two": 1.0},
        rows=3,
        length=32,
        compiled=False,
        log_every=1,
        evaluate_every=3,
        decay_evaluate_every=1,
        best_of=("two",),
    )
    return Trainer(options, text_windows(), heldout, folder)


def test_a_resumed_run_repeats_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole")
    whole.run()
    first = trainer(tmp_path / "parts")
    for _ in range(2):
        first.train_step(first.progress())
    first.save("last.pt")
    second = trainer(tmp_path / "parts")
    second.load(tmp_path / "parts" / "last.pt")
    second.run()
    assert second.step == whole.step == 4
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name
    assert not list(tmp_path.glob("*/*.partial"))


def test_a_run_goes_on_with_its_own_rate_wherever_it_was_begun(tmp_path: Path) -> None:
    """A checkpoint from a GPU has rates that are tensors there; one without a GPU has numbers."""
    first = trainer(tmp_path)
    first.train_step(0.0)
    first.save("last.pt")
    content = torch.load(tmp_path / "last.pt", weights_only=True)
    for optimizer in content["optimizers"]:
        for group in optimizer["param_groups"]:
            group["lr"], group["capturable"] = torch.tensor(123.0), True
    torch.save(content, tmp_path / "last.pt")
    second = trainer(tmp_path)
    second.load(tmp_path / "last.pt")
    set_rate(second.optimizers, 0.25)
    groups = [group for optimizer in second.optimizers for group in optimizer.param_groups]
    assert sorted(group["lr"] for group in groups) == [0.25, 0.25, 0.25, 0.5]
    assert not any(group.get("capturable") for group in groups)


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    run = trainer(tmp_path, steps=30)
    run.run()
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "rate" in record]
    assert losses[-1] < losses[0] - 0.1
    assert (tmp_path / "stable.pt").exists()


def scored(run: Trainer, patch: pytest.MonkeyPatch, bits: dict[int, float]) -> None:
    """Evaluations of a run with these results, by step."""
    patch.setattr(run, "evaluate", lambda: {"one": 0.0, "two": bits[run.step]})


def test_the_best_of_the_decay_phase_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of eight steps are in it: what was better before counts for nothing."""
    bits = {3: 0.5, 5: 2.0, 6: 1.25, 7: 1.5, 8: 1.75}
    run = trainer(tmp_path, 8, held_out())
    scored(run, monkeypatch, bits)
    run.run()
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    seen = {record["step"] for record in records if "heldout" in record}
    assert seen == set(bits)
    assert [(r["step"], r["bits"]) for r in records if r.get("event") == "best"] == [(5, 2.0), (6, 1.25)]
    assert run.chosen() == tmp_path / "best.pt"
    assert torch.load(run.chosen(), weights_only=True)["step"] == 6

    resumed = trainer(tmp_path, 10, held_out())
    resumed.load(tmp_path / "last.pt")
    scored(resumed, monkeypatch, {9: 1.5, 10: 1.5})
    resumed.run()
    assert torch.load(resumed.chosen(), weights_only=True)["step"] == 6
    other = trainer(tmp_path / "other", 10, held_out())
    other.load(tmp_path / "last.pt")  # whose best is not in this folder
    assert other.chosen() == tmp_path / "other" / "last.pt"


def test_without_sources_to_choose_by_the_last_checkpoint_is_exported(tmp_path: Path) -> None:
    run = trainer(tmp_path, heldout=held_out())
    run.options = replace(run.options, best_of=())
    assert run.start_of_best() is None
    run.options = replace(run.options, best_of=("three",))
    with pytest.raises(ValueError, match="unknown sources \\['three'\\]"):
        run.start_of_best()
    assert run.evaluate().keys() == {"one", "two"}


def test_kernels_run_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.options.find_spec", lambda name: name)
    assert kernels_wanted(None, "cuda")
    assert kernels_wanted("kernels", "cuda:1")
    assert not kernels_wanted("plain", "cuda")
    assert not kernels_wanted(None, "cpu")
    with pytest.raises(ValueError, match="needs a CUDA device"):
        kernels_wanted("kernels", "cpu")
    monkeypatch.setattr("training.options.find_spec", lambda name: None)
    assert not kernels_wanted(None, "cuda")
    with pytest.raises(ValueError, match="needs Triton, which is not installed"):
        kernels_wanted("kernels", "cuda")


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(interpreted(), reason="Triton's interpreter is on, which compiles nothing")
@pytest.mark.parametrize("chunk", [16, 32])
def test_the_kernels_compile_for_hopper_and_spill_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from sm90 import compiled_by

    from training import wkv_kernels

    r, k = torch.zeros(2, 1, 64, 4, 64, dtype=torch.bfloat16)
    lw, u = torch.zeros(1, 64, 4, 64), torch.zeros(4, 64)

    def both() -> None:
        towards = wkv_kernels.factors(r, k, lw, u, chunk)
        wkv_kernels.factor_gradients(r, k, lw, u, *towards, chunk)

    kernels = compiled_by(both, monkeypatch)
    assert {kernel.name: kernel.spilled for kernel in kernels} == {"factors_kernel": 0, "gradients_kernel": 0}


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    with torch.no_grad():
        run.model.head.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="nan"):
        run.run()
    assert not (tmp_path / "last.pt").exists()


def test_schedule_follows_steps_or_time_whichever_is_further() -> None:
    budget = Budget(steps=100, minutes=2.0)
    assert budget.progress(50, 0.0) == 0.5
    assert budget.progress(50, 90.0) == 0.75
    schedule = Schedule(peak=1.0, warmup_steps=10, decay_share=0.25)
    assert schedule.rate(0, 0.0) == pytest.approx(0.1)
    assert schedule.rate(50, 0.5) == 1.0
    assert schedule.decaying(0.75)
    assert not schedule.decaying(0.74)
    assert schedule.rate(90, 1.0) == 0.0
    assert parse_mix(format_mix({"one": 0.25, "two": 0.75})) == {"one": 0.25, "two": 0.75}


def test_samples_depend_on_the_seed_alone() -> None:
    model = shaken_model(TINY)
    first = sample(model, [5], 4, 20, 0.8, 0.9, seed=1)
    assert first == sample(model, [5], 4, 20, 0.8, 0.9, seed=1)
    assert first != sample(model, [5], 4, 20, 0.8, 0.9, seed=2)
    assert all(story[0] == 5 and 0 not in story for story in first)

"""What the benchmarks are made of: checkpoints, the file of results, the report. Nothing is timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import apart

from benchmarks import suite
from benchmarks.ceilings import Ceilings
from benchmarks.checkpoints import SIZES, make_checkpoint
from benchmarks.contestants import PER_OP, TUNED
from benchmarks.entrants import entrants
from benchmarks.fla import CHUNKED, OP, STEP, with_recurrence
from benchmarks.kernels import decode_share, with_zeros
from benchmarks.llama import gguf_tensors
from benchmarks.package import PACKAGE, SWITCHES
from benchmarks.report import main
from benchmarks.results import Results, read
from benchmarks.room import Unavailable, free_bytes, require
from benchmarks.sparsity import zero_inputs
from benchmarks.targets import cpu_targets, gpu_targets
from rwkv_runtime import Architecture, Plugins
from rwkv_runtime.checkpoint import build_model, open_tensors
from rwkv_runtime.embedded import embedded_model

CPU = torch.device("cpu")
MACHINE = {
    "cpu_model": "Some CPU",
    "cpu_flags": ["avx2"],
    "cores": 2,
    "threads": 1,
    "load_average": 0.25,
    "python": "3.11.4",
    "versions": {"torch": "2.13.0", "rwkv": "0.8.32"},
    "rwkv_package": "without its CUDA kernels (not on a GPU)",
    "device": "cpu",
}
GPU = {**MACHINE, "gpu": "Some GPU", "gpu_memory_gb": 80, "cuda": "13.0", "clocks": {"clocks.sm": "1980 MHz"}}
COMMAND = "pytest benchmarks --size 0.1b"


def result(case: str, contestant: str, **figures: Any) -> dict[str, Any]:
    common = {"device": "cpu", "ms_p50": 20.0, "ms_p99": 30.0, "ratio_to_package": None, "smoke": False}
    return {"case": case, "contestant": contestant} | common | figures


def decode(contestant: str, batch: int, speed: float, ratio: float | None, **more: Any) -> dict[str, Any]:
    model = {"architecture": "rwkv6", "size": "0.1b", "dtype": "bfloat16", "batch": batch}
    figures = {"tokens_per_second": speed, "ratio_to_package": ratio, "read_share": 0.5}
    return result("decode", contestant, **model | figures | more)


def prefill(contestant: str, **figures: Any) -> dict[str, Any]:
    model = {"architecture": "rwkv6", "size": "0.1b", "dtype": "bfloat16", "prompts": 1, "length": 128}
    return result("prefill", contestant, **model | figures)


RESULTS = [
    {"case": "ceiling", "contestant": "copy", "rate": 12.5, "unit": "GB/s", "smoke": False},
    decode("rwkv package", 1, 40.0, 1.0),
    decode("eager", 1, 64.0, 1.6),
    decode("eager", 8, 3200.0, 10.4, read_share=1.25, flag="125% of the ceiling: impossible"),
    prefill("eager", tokens_per_second=999.6, matmul_share=0.4),
    result("tokenizer load", "rwkv-runtime", ms_p50=85.4, ratio_to_package=25.0),
    result("start", "compile", size="0.1b", ms_p50=3100.0, peak_gb=1.24, warm_imports=0.5, warm_reading=0.2)
    | {"cold_first_token": 31.7, "warm_first_token": 3.1, "architecture": "rwkv6", "dtype": "bfloat16"}
    | {"torch_alone": 0.42},
    result("overhead", "eager", share_outside=0.04, profile=[["engine.py:1 step", 1.0, 12.5]], host_us=77.7),
    result("growth", "eager", growth=1.01, grown_mb=0.5, written=10_000, context=10_000),
]


def save(path: Path, *runs: tuple[dict[str, Any], list[dict[str, Any]]]) -> Path:
    for machine, records in runs:
        results = Results(path, machine, COMMAND)
        for record in records:
            results.add(record)
    return path


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tmp_path / "saved.json", (MACHINE, RESULTS))


def report(tmp_path: Path, *files: Path) -> str:
    output = tmp_path / "docs" / "benchmarks.md"
    main([*map(str, files), "--output", str(output)])
    return output.read_text()


def test_report_sets_ours_beside_the_package(saved: Path, tmp_path: Path) -> None:
    text = report(tmp_path, saved)
    assert "| copy | 12.50 GB/s |" in text
    assert "|  | eager | rwkv package |" in text
    assert "| rwkv6 0.1b bfloat16 batch 1 cpu | 64.0 (1.60x, 50% of the limit, p99 30.0 ms) | 40.0 (50% of the" in text
    assert "| rwkv6 0.1b bfloat16 batch 8 cpu | 3,200 (10.40x, 125% of the limit, p99 30.0 ms) |  |" in text
    assert "| rwkv6 0.1b bfloat16 prompts 1 length 128 cpu | 1,000 (40% of the limit) |" in text
    assert "| cpu | 85 ms (25.00x) |" in text
    assert "| 3.1 (imports 0.5 (torch alone 0.4), reading 0.2, the rest 2.4), 1.2 GB; 31.7 with empty caches |" in text
    assert "| cpu | 4.0% of 20.00 ms; the host's own 78 us a token |" in text
    assert "| context 10000 cpu | 1.01x; +0.5 MB while 10,000 more were written |" in text
    assert "| `engine.py:1 step` | 1.0 | 12.5 |" in text


def test_report_names_the_machine_the_command_and_what_is_too_good(saved: Path, tmp_path: Path) -> None:
    text = report(tmp_path, saved)
    assert "- Some CPU, 2 cores, 1 threads (avx2), load 0.2" in text
    assert "- Python 3.11.4, torch 2.13.0, rwkv 0.8.32" in text
    assert "- `pytest benchmarks --size 0.1b`" in text
    assert "- `rwkv` package: without its CUDA kernels (not on a GPU)" in text
    assert "- decode rwkv6 0.1b bfloat16 batch 8 cpu, eager: 125% of the ceiling: impossible" in text


def test_each_machine_has_a_section_with_its_own_targets(saved: Path, tmp_path: Path) -> None:
    shares = {"1.6b": 0.85, "3b": 0.876}
    steps = [decode("fused", 1, 900.0, 7.5, size=size, read_share=share) for size, share in shares.items()]
    gpu = save(tmp_path / "gpu.json", (GPU, steps))
    text = report(tmp_path, saved, gpu)
    cpu, gpu_section = text.split("## Some GPU\n")
    assert "## Some CPU\n" in cpu
    assert "- Some GPU, 80 GB, CUDA 13.0, clocks.sm 1980 MHz" in gpu_section
    assert "| decode 0.1b bfloat16, one row: times the `rwkv` package | at least 1.60x | 1.60x (eager) | yes |" in cpu
    assert "| decode 1.6b, one row: share of the read rate | at least 80% | 85% (fused) | yes |" in gpu_section
    assert "| decode 3b, one row: share of the read rate | at least 88% | 87.6% (fused) | no |" in gpu_section
    assert "| decode 1.6b, one row: times the `rwkv` package | at least 6.0x | 7.5x (fused) | yes |" in gpu_section
    unknown = next(line for line in gpu_section.splitlines() if line.startswith("Not measured on this machine: "))
    assert ": decode 7b, one row: share of the read rate (at least 92%); " in unknown


def test_a_target_that_was_missed_says_so(tmp_path: Path) -> None:
    saved = save(tmp_path / "saved.json", (GPU, [decode("fused", 1, 900.0, 7.5, size="1.6b", read_share=0.7)]))
    assert "| at least 80% | 70% (fused) | no |" in report(tmp_path, saved)


def test_a_start_is_judged_without_the_reading_of_its_weights() -> None:
    target = next(target for target in gpu_targets() if target.what.startswith("warm start"))
    model = {"architecture": "rwkv6", "size": "1.6b", "dtype": "bfloat16", "warm_load": 1.0}
    starts = [
        result("start", "fused", **model, warm_first_token=3.0, warm_reading=0.75),
        result("start", "eager", **model, warm_first_token=1.5),  # of before reading was measured
        result("start", PACKAGE, **model, warm_first_token=1.5, warm_reading=0.75),
    ]
    assert target.find(starts) == (2.25, "fused")


def test_a_start_is_judged_of_the_backend_that_is_fast_afterwards() -> None:
    target = next(target for target in gpu_targets() if target.what.startswith("warm start"))
    model = {"architecture": "rwkv6", "size": "1.6b", "dtype": "bfloat16", "warm_load": 1.0}
    starts = [
        result("start", "fused", **model, warm_first_token=3.0, warm_reading=0.75),
        result("start", "eager", **model, warm_first_token=2.0, warm_reading=0.75),
    ]
    steps = [decode(who, 1, 0.0, None, size="1.6b", ms_p50=ms) for who, ms in (("eager", 5.0), ("fused", 1.0))]
    assert target.find(starts) == (1.25, "eager")
    assert target.find(starts + steps) == (2.25, "fused")
    assert target.find(starts[1:] + steps) is None


def test_a_whole_step_through_torch_compile_counts_as_the_better_of_tuned_and_not() -> None:
    target = next(target for target in gpu_targets() if "through torch.compile" in target.what)
    steps = [("compile", 2.0), (TUNED, 1.5), ("fused", 1.0), (PER_OP, 0.5)]
    results = [decode(who, 1, 0.0, None, size="1.6b", ms_p50=ms) for who, ms in steps]
    assert target.find(results) == (1.5, "fused")
    assert target.find(results[:2]) is None


def test_targets_look_at_no_peer_and_at_no_smoke_run() -> None:
    target = next(iter(gpu_targets()))
    peers = [decode(peer, 1, 900.0, 7.5, size="1.6b") for peer in (PACKAGE, TUNED, PER_OP, "fla wkv", "llama.cpp")]
    assert target.find(peers) is None
    assert target.find([decode("fused", 1, 900.0, 7.5, size="1.6b", smoke=True)]) is None


def test_every_target_can_be_asked_of_any_results() -> None:
    for target in (*gpu_targets(), *cpu_targets()):
        assert target.find([]) is None
        target.find(RESULTS)
        assert target.aim()


def test_report_of_a_smoke_run_says_that_it_means_nothing(tmp_path: Path) -> None:
    smoke = save(tmp_path / "smoke.json", (MACHINE, [decode("eager", 1, 64.0, None, smoke=True)]))
    assert "figures mean nothing" in report(tmp_path, smoke)
    full = save(tmp_path / "full.json", (MACHINE, [decode("eager", 1, 64.0, None)]))
    assert "figures mean nothing" not in report(tmp_path, full)


def test_report_draws_plots_beside_the_page(saved: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = report(tmp_path, saved)
    plots = sorted(path.name for path in (tmp_path / "docs" / "images").iterdir())
    assert "some-cpu-rwkv6-tokens-a-second-against-batch.png" in plots
    assert len(plots) == 4
    assert all(f"(images/{plot})" in text for plot in plots)


def test_a_later_run_adds_to_a_file_and_replaces_what_it_measured_again(tmp_path: Path) -> None:
    path = save(
        tmp_path / "saved.json",
        (MACHINE, [decode("eager", 1, 64.0, 1.6), decode("eager", 8, 99.0, 2.0)]),
        (MACHINE, [decode("eager", 1, 70.0, 1.7)]),
    )
    (machine,) = read([path])
    assert [(r["batch"], r["tokens_per_second"]) for r in machine.results] == [(1, 70.0), (8, 99.0)]
    assert machine.commands == [COMMAND]


def test_versions_are_the_latest_known_and_a_gpu_is_one_machine_whatever_its_hosts_threads(tmp_path: Path) -> None:
    once = {**GPU, "versions": {"torch": "2.12.0", "fla-core": "0.6.0"}}
    again = {**GPU, "threads": 7, "versions": {"torch": "2.13.0"}}
    machines = once, again, MACHINE, {**MACHINE, "threads": 7}
    path = save(tmp_path / "saved.json", *((machine, [decode("eager", 1, 64.0, 1.6)]) for machine in machines))
    on_gpu, *on_cpu = read([path])
    assert on_gpu.info["versions"] == {"torch": "2.13.0", "fla-core": "0.6.0"}
    assert len(on_cpu) == 2


def test_results_are_on_disk_as_soon_as_there_are_any(tmp_path: Path) -> None:
    results = Results(tmp_path / "new" / "saved.json", MACHINE, COMMAND)
    results.add(decode("eager", 1, 64.0, 1.6))
    assert len(json.loads((tmp_path / "new" / "saved.json").read_text())["runs"][0]["results"]) == 1


def test_every_backend_takes_part(plugins: Plugins) -> None:
    assert set(plugins.backends.names()) < set(entrants(plugins, tune=True))


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


def test_layers_of_a_random_checkpoint_differ(
    architecture: Architecture, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.checkpoints.SIZES", {**SIZES, "four layers": (4, 64)})
    monkeypatch.setattr("benchmarks.checkpoints.VOCAB_SIZE", 260)
    checkpoint = make_checkpoint(architecture, "four layers", "float32", weights)
    tensors = checkpoint.tensors()
    config = architecture.config({name: tuple(t.shape) for name, t in tensors.items()})
    assert config.n_layer == 4
    outputs = [tensors[f"blocks.{i}.att.output.weight"] for i in range(4)]
    assert not any(torch.equal(outputs[i], outputs[j]) for i in range(4) for j in range(i))
    assert make_checkpoint(architecture, "four layers", "float32", weights).matrix_bytes == checkpoint.matrix_bytes
    checkpoint.delete()
    assert not checkpoint.pth.exists()


def test_what_does_not_fit_is_refused_with_the_figures() -> None:
    require(1, CPU, "nothing much")
    with pytest.raises(Unavailable, match=r"a batch needs .* GB on cpu, .* GB are free"):
        require(2 * free_bytes(CPU), CPU, "a batch")


def test_llama_cpp_gets_every_tensor_in_a_layout_it_reads(
    architecture: Architecture, checkpoint: dict[str, torch.Tensor]
) -> None:
    tensors = gguf_tensors(checkpoint, architecture.name)
    names = {name.split(".", 2)[2] for name in tensors if name.startswith("blk.1.")}
    assert {"attn_norm.weight", "attn_norm_2.bias", "time_mix_ln.weight", "time_mix_lerp_fused.weight"} < names
    assert {"time_mix_output.weight", "channel_mix_key.weight", "channel_mix_value.weight"} < names
    C = checkpoint["ln_out.weight"].shape[0]
    stacked = {"rwkv6": 5, "rwkv7": 6}[architecture.name]
    assert tensors["blk.0.time_mix_lerp_fused.weight"].shape == (stacked, 1, 1, C)
    assert tensors["blk.1.time_mix_w1.weight"].shape[-1] == C  # turned round: [rank, C]
    assert {f"{name}.weight" for name in ("token_embd", "token_embd_norm", "output_norm", "output")} < set(tensors)


def test_the_package_is_known_for_every_architecture(plugins: Plugins) -> None:
    assert set(SWITCHES) == set(plugins.architectures.names())


def test_fla_is_put_where_the_layers_call_their_own_recurrence(plugins: Plugins) -> None:
    """With the layers' own recurrence under other names in its place, nothing changes; and it is called."""
    architecture = plugins.architectures.get("rwkv6")
    model = build_model(architecture.random(architecture.sizes(2, 64, 260)), plugins.architectures, CPU)
    op, called = architecture.ops[OP], []

    def watched(name: str) -> Any:
        own = op.__globals__[name]  # type: ignore[attr-defined]
        return lambda *args: (called.append(name), own(*args))[1]

    ops = {**architecture.ops, OP: with_recurrence(op, {name: watched(name) for name in (STEP, CHUNKED)})}
    for tokens, name in (([[1, 2, 3]], CHUNKED), ([[1]], STEP)):
        logits = architecture.forward(ops, model.weights, torch.tensor(tokens), model.new_state())
        expected = architecture.forward(architecture.ops, model.weights, torch.tensor(tokens), model.new_state())
        assert apart(logits, expected) == 0
        assert called == [name] * 2
        called.clear()


def test_the_suite_knows_its_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        suite.main([str(tmp_path), "--part", "decode 1.7b", "--device", "cpu"])
    assert "there is no part decode 1.7b; there are tests, decode 1.6b" in capsys.readouterr().err


def test_the_suite_leaves_out_what_there_is_no_time_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert suite.main([str(tmp_path), "--seconds", "0", "--device", "cpu", "--smoke"]) == 0
    assert "left out, the time is over: benchmarks -k ceiling or (test_decode" in capsys.readouterr().out


def test_zeros_among_the_inputs_of_the_value_matrix_are_counted() -> None:
    model = build_model(open_tensors(embedded_model()), Plugins.load().architectures, CPU, torch.float32)
    shares = zero_inputs(model, range(100, 164))
    assert len(shares) == model.config.n_layer
    assert all(0.5 < share < 1 for share in shares)  # trained: more than by chance


def test_a_step_moves_the_bytes_that_its_states_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugins = Plugins.load()
    checkpoint = make_checkpoint(plugins.architectures.get("rwkv6"), "tiny", "float32", tmp_path)
    monkeypatch.setattr(Ceilings, "read", lambda self: 1.0)
    moved, rows = {}, 10_000
    for dtype in (torch.float32, torch.float16):
        model = build_model(checkpoint.tensors(), plugins.architectures, CPU, state_dtype=dtype)
        text = decode_share(checkpoint, model, rows, Ceilings(CPU, smoke=True))(1.0)
        moved[dtype] = float(text.split(", ")[1].split("%")[0]) * 1e7
    c = model.config
    saved = 2 * rows * c.n_layer * c.n_head * c.head_size**2 * 2
    assert moved[torch.float32] - moved[torch.float16] == pytest.approx(
        saved, abs=2e6
    )  # printed are tenths of a percent of 1 GB


def test_zeros_are_made_as_many_as_asked_for(tmp_path: Path) -> None:
    plugins = Plugins.load()
    checkpoint = make_checkpoint(plugins.architectures.get("rwkv6"), "tiny", "float32", tmp_path)
    model = build_model(with_zeros(checkpoint.tensors(), 0.8), plugins.architectures, CPU)
    shares = zero_inputs(model, range(1, 65))
    assert sum(shares) / len(shares) == pytest.approx(0.8, abs=0.03)
    with pytest.raises(ValueError, match=r"0\.4 is not between 0\.5 and 1"):
        with_zeros({}, 0.4)

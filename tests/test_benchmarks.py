"""The report that is made of saved benchmark results; nothing is timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import main, page

MACHINE = {
    "cpu_model": "Some CPU",
    "cpu_flags": ["avx2"],
    "cores": 2,
    "threads": 1,
    "load_average": 0.25,
    "python": "3.11.4",
    "versions": {"torch": "2.13.0", "rwkv": "0.8.32"},
    "command": "pytest benchmarks --size 0.1b",
}


def result(case: str, contestant: str, **figures: Any) -> dict[str, Any]:
    common = {"device": "cpu", "ms_p50": 20.0, "ms_p99": 30.0, "ratio_to_package": None, "smoke": False}
    return {"case": case, "contestant": contestant, **common, **figures}


def decode(contestant: str, batch: int, speed: float, ratio: float | None, **more: Any) -> dict[str, Any]:
    figures = {"size": "0.1b", "dtype": "bfloat16", "batch": batch, "tokens_per_second": speed, "read_share": 0.5}
    return result("decode", contestant, ratio_to_package=ratio, **figures | more)


RESULTS = [
    {"case": "ceiling", "contestant": "copy", "rate": 12.5, "unit": "GB/s", "smoke": False},
    decode("rwkv package", 1, 40.0, 1.0),
    decode("eager", 1, 64.0, 1.6),
    decode("eager", 8, 3200.0, 10.4, read_share=1.25, flag="125% of the ceiling: impossible"),
    result("prefill", "eager", size="0.1b", dtype="bfloat16", length=128, tokens_per_second=999.6, matmul_share=0.4),
    result("tokenizer load", "rwkv-runtime", ms_p50=85.4, ratio_to_package=25.0),
    result("start", "compile", size="0.1b", dtype="bfloat16", ms_p50=3100.0, peak_gb=1.24, cold_first_token=31.7),
]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "saved.json"
    benchmarks = [{"name": "test", "extra_info": r} for r in RESULTS] + [{"name": "other", "extra_info": {}}]
    path.write_text(json.dumps({"machine_info": {"node": "host", "rwkv_runtime": MACHINE}, "benchmarks": benchmarks}))
    return path


def test_report_sets_ours_beside_the_package(saved: Path, tmp_path: Path) -> None:
    output = tmp_path / "docs" / "benchmarks.md"
    main([str(saved), "--output", str(output)])
    text = output.read_text()
    assert "| copy | 12.50 GB/s |" in text
    assert "|  | eager | rwkv package |" in text
    assert "| 0.1b bfloat16 batch 1 cpu | 64.0 (1.60x, 50% of the limit) | 40.0 (50% of the limit) |" in text
    assert "| 0.1b bfloat16 batch 8 cpu | 3,200 (10.40x, 125% of the limit) |  |" in text
    assert "| 0.1b bfloat16 length 128 cpu | 1,000 (40% of the limit) |" in text
    assert "| cpu | 85 ms (25.00x) |" in text
    assert "| 3.1, 1.2 GB; 31.7 with an empty compiler cache |" in text


def test_report_names_the_machine_the_command_and_what_is_too_good(saved: Path, tmp_path: Path) -> None:
    output = tmp_path / "benchmarks.md"
    main([str(saved), "--output", str(output)])
    text = output.read_text()
    assert "- Some CPU, 2 cores, 1 threads (avx2), load 0.2" in text
    assert "- Python 3.11.4, torch 2.13.0, rwkv 0.8.32" in text
    assert "- `pytest benchmarks --size 0.1b`" in text
    assert "- decode 0.1b bfloat16 batch 8 cpu, eager: 125% of the ceiling: impossible" in text
    assert "host" not in text  # the name of the machine is nobody's business


def test_report_of_a_smoke_run_says_that_it_means_nothing() -> None:
    assert "figures mean nothing" in page([], [decode("eager", 1, 64.0, None, smoke=True)])
    assert "figures mean nothing" not in page([], [decode("eager", 1, 64.0, None)])


def test_report_draws_plots_beside_the_page(saved: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    output = tmp_path / "benchmarks.md"
    main([str(saved), "--output", str(output)])
    plots = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert "tokens-a-second-against-batch.png" in plots
    assert len(plots) == 4
    assert all(f"(images/{plot})" in output.read_text() for plot in plots)

"""What begins before torch is imported: a driver, torch's libraries, the vocabulary, modules."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent
from types import ModuleType

import pytest
from click.testing import CliRunner

from rwkv_runtime import CheckpointError, Tokenizer, VocabularyError, beginning, driver, tokenizer
from rwkv_runtime.checkpoint import open_tensors
from rwkv_runtime.cli import command
from rwkv_runtime.tokenizer import world_vocabulary
from rwkv_runtime.vocabulary import find_vocabulary, load_vocabulary

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere libraries have other names")
BYTES = Tokenizer.from_tokens({i + 1: bytes([i]) for i in range(256)})


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What is begun, in order; nothing really is but the vocabulary."""
    begun: list[object] = []
    monkeypatch.setenv("OPENBLAS_THREAD_TIMEOUT", "4")
    monkeypatch.setattr(driver, "begin", begun.append)
    monkeypatch.setattr(beginning, "map_libraries", lambda: begun.append("libraries"))
    return begun


def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Vocabularies that are read from their files from here on."""
    files: list[Path] = []
    from_file = Tokenizer.from_file

    def noted(path: str) -> Tokenizer:
        files.append(Path(path))
        return from_file(path)

    tokenizer._cached_tokenizer.cache_clear()
    monkeypatch.setattr(Tokenizer, "from_file", noted)
    return files


def test_the_vocabulary_is_read_once(tmp_path: Path, begun: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the time a model is loaded it is there: World's, that of a file beside the model, or the one that is named."""
    files = read(monkeypatch)
    model, beside, named = tmp_path / "model.pth", tmp_path / "model.vocab.txt", tmp_path / "named.txt"
    for vocabulary in (beside, named):
        BYTES.to_file(vocabulary)
    for path, vocab, expected in (
        (tmp_path / "a.pth", None, world_vocabulary()),
        (model, None, beside),
        (model, named, named),
    ):
        beginning.begin(path, vocab, "cpu")
        assert files == [expected.resolve()]
        load_vocabulary(expected, 65536)
        assert len(files) == 1
        files.clear()


def test_a_driver_begins_first(tmp_path: Path, begun: list[object]) -> None:
    beginning.begin(tmp_path / "model.pth", None, "cuda:1")
    driver.wait()
    assert begun == ["cuda:1", "libraries"]


def test_the_embedded_models_vocabulary_is_not_read_before(
    begun: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is small, and in no file of its own."""
    files = read(monkeypatch)
    beginning.begin(None, None, None)
    driver.wait()
    assert (begun, files) == ([None, "libraries"], [])


def test_modules_are_imported_that_a_load_imports_and_that_do_not_import_torch() -> None:
    """On their own, they cost what they save."""
    before = (
        "import sys; from importlib.util import find_spec; from rwkv_runtime import beginning, driver;"
        "beginning.map_libraries = lambda: None; "
    )
    installed = "{name for name in beginning.MODULES if find_spec(name)}"
    after = f"print({installed} - {{*sys.modules}}, 'torch' in sys.modules)"
    for code, seen in (
        (f"beginning.begin(None, None, 'cpu'); {after}", "set() False"),
        (f"import rwkv_runtime; rwkv_runtime.load; {after}", "set() True"),
    ):
        done = subprocess.run([sys.executable, "-c", before + code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == seen


@pytest.mark.parametrize("triton", [True, False])
def test_nothing_that_has_a_library_is_imported_while_others_are_mapped(triton: bool) -> None:
    """It would wait for them, and hold the interpreter."""
    if triton:
        pytest.importorskip("triton")
    code = f"""
        from importlib import import_module
        from importlib.machinery import ExtensionFileLoader
        from rwkv_runtime import beginning, driver

        begun, loaded, create = [], [], ExtensionFileLoader.create_module

        def noted(self, spec):
            loaded.extend([spec.name] if begun else [])
            return create(self, spec)

        class Mapping(driver.Beginning):
            def start(self):
                begun.append(self)

        driver.Beginning, ExtensionFileLoader.create_module = Mapping, noted
        driver.begin = lambda device: import_module("triton.runtime.cache") if {triton} else None
        beginning.begin("no.pth", None, None)
        print(len(begun), loaded)
    """
    done = subprocess.run([sys.executable, "-c", dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout == "1 []\n"


@pytest.mark.parametrize("triton", [True, False])
def test_what_triton_imports_is_imported_where_it_has_begun(
    triton: bool, begun: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    imported: list[str] = []
    monkeypatch.setattr(beginning, "import_module", imported.append)
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    if triton:
        monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    beginning.begin(None, None, "cuda")
    after = [*beginning.MODULES, *(beginning.OF_TRITON if triton else ())]
    assert imported == [*beginning.WITH_LIBRARIES, *after]


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_triton_imports_it_for_a_kernels_first_argument_or_before() -> None:
    """Of its own it does not import torch."""
    own = "import triton; from importlib import import_module; [*map(import_module, beginning.OF_TRITON)]"
    argument = (
        "from triton.runtime import jit; from triton.backends.compiler import BaseBackend; "
        "jit.native_specialize_impl(BaseBackend, 1, False, True, True)"
    )
    for code, seen in ((own, "True False"), (argument, "True True")):
        after = "print({*beginning.OF_TRITON} <= {*sys.modules}, 'torch' in sys.modules)"
        whole = f"import sys; from rwkv_runtime import beginning; {code}; {after}"
        done = subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == seen


@pytest.mark.parametrize("error", [ImportError, AttributeError])
def test_one_that_cannot_be_imported_is_told_by_who_needs_it(
    error: type[Exception], begun: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def fails(name: str) -> None:
        tried.append(name)
        raise error(name)

    monkeypatch.setattr(beginning, "import_module", fails)
    beginning.begin(None, None, "cpu")
    before = [*beginning.WITH_LIBRARIES, *beginning.MODULES]
    assert tried[: len(before)] == before


@pytest.mark.parametrize(("given", "kept"), [(None, "4"), ("20", "20")])
def test_numpys_threads_do_not_spin_unless_they_are_asked_to(
    given: str | None, kept: str, begun: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENBLAS_THREAD_TIMEOUT")
    if given:
        monkeypatch.setenv("OPENBLAS_THREAD_TIMEOUT", given)
    beginning.begin(None, None, "cpu")
    assert os.environ["OPENBLAS_THREAD_TIMEOUT"] == kept


def test_numpy_is_imported_later() -> None:
    """Its library reads that variable as it is loaded."""
    code = (
        "import sys; from rwkv_runtime import beginning, driver; from rwkv_runtime.cli import main;"
        "driver.begin = lambda device: (print('numpy' in sys.modules), sys.exit(0)); main()"
    )
    done = subprocess.run([sys.executable, "-c", code, "Once"], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("vocabulary", ["missing.txt", "damaged.txt"])
def test_a_vocabulary_that_is_wrong_is_told_by_who_needs_it(
    vocabulary: str, tmp_path: Path, begun: list[object]
) -> None:
    (tmp_path / "damaged.txt").write_text("no vocabulary")
    beginning.begin(tmp_path / "model.pth", tmp_path / vocabulary, "cpu")
    assert begun[0] == "cpu"
    with pytest.raises(VocabularyError, match=vocabulary):
        load_vocabulary(find_vocabulary(tmp_path / "model.pth", tmp_path / vocabulary, 65536), 65536)


@pytest.mark.parametrize("model", ["", ".", "/", "a" * 300, "\0"])
def test_so_is_a_model_that_cannot_be_one(model: str, begun: list[object]) -> None:
    beginning.begin(model, None, "cpu")
    assert begun[0] == "cpu"
    with pytest.raises(CheckpointError):
        open_tensors(model)


@on_linux
@pytest.mark.parametrize(
    ("names", "mapped"),
    [(beginning.LIBRARIES, True), (("no.so", "libtorch.so"), True), (("no.so", "neither.so"), False)],
)
def test_torch_works_with_what_libraries_are_mapped(names: tuple[str, str], mapped: bool) -> None:
    """They are before torch is imported; of what is not there torch finds its own."""
    code = (
        f"import sys; from rwkv_runtime import beginning, driver; beginning.LIBRARIES = {names};"
        "beginning.begin('no.pth', None, 'cpu'); driver.wait();"
        "print('torch' in sys.modules, 'libtorch_cpu.so' in open('/proc/self/maps').read());"
        "import torch; print(int(torch.arange(5).sum()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == (f"False {mapped}\n10\n", "")


@on_linux
def test_the_interpreter_is_free_meanwhile() -> None:
    """Or all of this would be in vain: a thread that counts goes on while libraries are mapped."""
    code = (
        "import threading, time; from rwkv_runtime import beginning;"
        "thread = threading.Thread(target=beginning.map_libraries); counts = [time.perf_counter()]; thread.start()\n"
        "while thread.is_alive(): counts.append(time.perf_counter())\n"
        "print(max(b - a for a, b in zip(counts, counts[1:])), counts[-1] - counts[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    longest, whole = map(float, done.stdout.split())
    assert longest < whole * 0.8


def test_rwkv_run_begins_with_what_it_will_load(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(beginning, "begin", lambda *arguments: asked.append(arguments))
    CliRunner().invoke(command, ["Once", "--model", "no.pth", "--vocab", "no.txt", "--device", "cpu"])
    assert asked == [("no.pth", "no.txt", "cpu")]


def test_a_torch_that_cannot_be_imported_ends_it_while_libraries_are_mapped(tmp_path: Path) -> None:
    """Of which none may be taken down before it is there."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('it is broken')")
    code = (
        "import time; from rwkv_runtime import beginning; from rwkv_runtime.cli import main;"
        "beginning.map_libraries = lambda: time.sleep(60); main()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", code, "Once", "--model", "no.pth", "--device", "cpu"],
        env=environment, capture_output=True, text=True, check=False, timeout=50,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.endswith("ImportError: it is broken\n")


def test_rwkv_run_begins_it_for_a_text_and_not_for_a_table(begun: list[object]) -> None:
    CliRunner().invoke(command, ["--backends"])
    assert begun == []
    assert CliRunner().invoke(command, ["Once", "--device", "cpu", "-n", "1", "-q"]).exit_code == 0
    driver.wait()
    assert begun == ["cpu", "libraries"]

"""
machine.py: torchvision over any build of torch. One test per sentence.

    python -m pytest -q tests/test_machine.py

A false torchvision stands in for other systems (macOS, ROCm, two CPU builds). Its library declares
an operator when it is loaded. It is torch's own libtorchbind_test, under torchvision's name.
"""
import shutil, subprocess, sys
from pathlib import Path
import pytest
import torch

SOURCE = Path(__file__).resolve().parents[1] / "machine.py"
LIBRARY = Path(torch.__file__).parent / "lib/libtorchbind_test.so"


def start(folder, library, then=""):
    """Run machine.py in a new process, beside a torchvision with this library. The library's
    operator stands in for torchvision::nms."""
    package = folder / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("", encoding="utf-8")
    if library:
        library(package / "_C.so")
    code = SOURCE.read_text(encoding="utf-8")
    code = code.replace("torchvision::{name}", "_TorchScriptTesting::{name}")
    code = code.replace('("nms", "qnms")', '("takes_foo",)') + "\nprint('imported')\n" + then
    (folder / "program.py").write_text(code, encoding="utf-8")
    run = [sys.executable, "program.py"]
    return subprocess.run(run, cwd=folder, capture_output=True, text=True)


@pytest.mark.skipif(not LIBRARY.exists(), reason="this torch does not have the library")
def test_operators_that_a_library_declares_itself_are_not_declared_again(tmp_path):
    again = ("torch.ops.load_library('torchvision/_C.so')\n"
             "print(torch.ops._TorchScriptTesting.takes_foo)")
    done = start(tmp_path, lambda file: shutil.copy(LIBRARY, file), again)
    assert done.returncode == 0 and "imported" in done.stdout, done.stderr[-500:]
    naive = tmp_path / "naive"                          # the naive form: always declare
    naive.mkdir()
    code = ("import torch\ntorch.library.define('_TorchScriptTesting::takes_foo', '(Tensor x) -> "
            f"Tensor')\ntorch.ops.load_library({str(LIBRARY)!r})\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=naive, capture_output=True)
    assert done.returncode < 0                          # it aborts


def test_operators_of_a_library_that_does_not_load_are_declared(tmp_path):
    def built_for_another_torch(file):
        file.write_bytes(b"not a library")

    then = "print(torch.ops._TorchScriptTesting.takes_foo)"
    done = start(tmp_path, built_for_another_torch, then)
    assert done.returncode == 0, done.stderr[-500:]
    assert "_TorchScriptTesting.takes_foo" in done.stdout


def test_without_a_library_nothing_is_declared(tmp_path):
    then = "print(hasattr(torch.ops._TorchScriptTesting, 'takes_foo'))"
    done = start(tmp_path, None, then)
    assert done.returncode == 0 and "False" in done.stdout, done.stderr[-500:]


def test_torchvision_can_be_imported_here():
    code = "import machine, torchvision; print(torchvision.transforms.Resize(3))"
    done = subprocess.run([sys.executable, "-c", code], cwd=SOURCE.parent, capture_output=True)
    assert done.returncode == 0, done.stderr[-500:]


def test_cudnns_attention_is_off_and_flash_attention_is_on(tmp_path):
    then = ("print(torch.backends.cuda.cudnn_sdp_enabled())\n"
            "print(torch.backends.cuda.flash_sdp_enabled())")
    done = start(tmp_path, None, then)
    assert done.stdout.split() == ["imported", "False", "True"], done.stderr[-500:]

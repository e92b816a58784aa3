"""The tool as others have it: without torch, on another ONNX Runtime, on another provider, from the wheel."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_bundle

from edifice_export.scaffolding.scaffold import SAMPLES
from edifice_reference.models.registry import ARCHITECTURES

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "exported/hymba_tiny"

ABSENT = ("torch", "onnxscript", "onnx_ir", "safetensors")
"""What a slim deployment leaves out."""


SETS = {"window": 2, "stream": 3, "prefill": 2}
"""How many test data sets each graph of the sample has."""


def command(python: str | Path, *arguments: str | Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    code = "import sys; from edifice_export.cli.app import main; main(sys.argv[1:])"
    environment = {"PATH": "", "PYTHONPATH": str(path)} if path else {"PATH": ""}
    given = [str(python), "-c", code, *map(str, arguments)]
    return subprocess.run(given, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH in which importing what a slim deployment lacks fails."""
    folder = tmp_path_factory.mktemp("absent")
    for name in ABSENT:
        (folder / f"{name}.py").write_text(f"raise ImportError('no {name} here')\n")
    return folder


def check_every_verb(python: str | Path, folder: Path, path: Path | None = None) -> None:
    """list, verify, run, bench, inspect and doctor work; build says what to install."""
    listed = command(python, "list", path=path)
    assert "hymba" in listed.stdout

    verified = command(python, "verify", SAMPLE, "--json", path=path)
    assert verified.returncode == 0, verified.stderr
    report = json.loads(verified.stdout)
    assert report["passed"]
    assert report["reference"] == "test data"
    sources = [case["source"] for case in report["cases"]]
    data = [f"{graph}/test_data_set_{index}" for graph, sets in SETS.items() for index in range(sets)]
    assert sorted(sources) == sorted([*data, "stream/test_sequence"] * len(report["providers"]))
    assert "needs torch" in command(python, "verify", SAMPLE, path=path).stdout

    np.save(folder / "x.npy", np.ones((20, 8), np.float32))
    ran = command(python, "run", SAMPLE, "--input", folder / "x.npy", "--output", folder / "y.npy", path=path)
    assert ran.returncode == 0, ran.stderr
    assert np.load(folder / "y.npy").shape == (9, 16)
    arguments = ("run", SAMPLE, "--stream", "--input", folder / "x.npy", "--output", folder / "y.npy")
    streamed = command(python, *arguments, path=path)
    assert streamed.returncode == 0, streamed.stderr
    assert np.load(folder / "y.npy").shape == (20, 16)

    benched = command(python, "bench", SAMPLE, "--rounds=1", "--threads=1", "--json", path=path)
    assert benched.returncode == 0, benched.stderr
    figures = json.loads(benched.stdout)
    assert {result["contestant"] for result in figures["results"]} == {"bundle", "step"}
    assert [note.partition(":")[0] for note in figures["notes"]] == ["no products, and outputs not compared"]
    refused = command(python, "bench", SAMPLE, "--against=eager", path=path)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "against eager needs torch" in refused.stderr

    inspected = command(python, "inspect", SAMPLE, "--json", path=path)
    assert json.loads(inspected.stdout)["functions"]

    diagnosed = command(python, "doctor", "--json", path=path)
    assert json.loads(diagnosed.stdout)["can_build"] is False

    refused = command(python, "build", "hymba", path=path)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
    assert refused.stderr.count("\n") == 1
    assert "pip install torch" in refused.stderr
    assert "--state-size" in command(python, "build", "hymba", "--help", path=path).stdout


def test_every_verb_without_torch(without_torch: Path, tmp_path: Path) -> None:
    check_every_verb(sys.executable, tmp_path, without_torch)


@pytest.mark.parametrize(
    "arguments",
    [
        "--help",
        "--version",
        "list",
        "build --help",
        *(f"build {name} --help" for name in ARCHITECTURES),
        f"inspect {SAMPLE} --explain",
        f"run {SAMPLE} --input=x.npy --output=y.npy",
        f"run {SAMPLE} --stream --input=x.npy --output=y.npy",
        f"scaffold cpp {SAMPLE} --output=sample",
    ],
)
def test_what_computes_no_reference_does_not_import_torch(arguments: str, tmp_path: Path) -> None:
    """Nor does help import what only bundles need."""
    np.save(tmp_path / "x.npy", np.ones((20, 8), np.float32))
    code = f"""
        import sys
        from edifice_export.cli.app import main
        try:
            main({arguments.split()!r})
        except SystemExit as ended:
            assert not ended.code
        print(*{{name.split(".")[0] for name in sys.modules}}, file=sys.stderr)
    """
    given = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(given, capture_output=True, text=True, cwd=tmp_path, check=True)
    heavy = {"torch", "onnxscript"}
    if str(SAMPLE) not in arguments:
        heavy |= {"numpy", "onnx", "onnxruntime"}
    assert not heavy & set(done.stderr.split())


def test_loading_does_not_import_torch() -> None:
    code = f"import sys, edifice_export as ee; ee.load({str(SAMPLE)!r}).stream(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_the_api_says_what_to_install(without_torch: Path) -> None:
    code = "import edifice_export as ee\ntry: ee.build('hymba')\nexcept ee.RequestError as error: print(error)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(without_torch)}, check=True
    )
    assert "pip install torch" in done.stdout


def test_a_stream_goes_back_without_safetensors_and_its_states_need_it(without_torch: Path, tmp_path: Path) -> None:
    code = f"""
        import numpy as np, edifice_export as ee
        stream = ee.load({str(SAMPLE)!r}).stream()
        stream.step(np.ones(8, np.float32))
        stream.rewind(1)
        for act in (stream.save, stream.load):
            try:
                act({str(tmp_path / "state")!r})
            except ee.RequestError as error:
                print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(without_torch)},
        check=True,
    )
    assert done.stdout.count("install it with `pip install safetensors`") == 2
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_output_fails_without_torch_too(without_torch: Path) -> None:
    done = command(sys.executable, "verify", SAMPLE, "--tolerance", "1e-12", path=without_torch)
    assert done.returncode == 1
    assert done.stderr.startswith("error: verify ")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT], check=True)
    (found,) = folder.glob("*.whl")
    return found


@pytest.mark.slow
def test_the_wheel_holds_the_packages_their_types_and_the_samples(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for package, source in (("edifice_export", ROOT / "edifice_export"), ("edifice_reference", ROOT / "reference")):
        expected = {f"{package}/{path.relative_to(source).as_posix()}" for path in source.rglob("*.py")}
        assert expected | {f"{package}/py.typed"} <= set(names)
    assert not any(name.startswith(("tests/", "reference/", "examples/")) for name in names)
    samples = {name for name in names if name.startswith("edifice_examples/") and name.count("/") > 1}
    assert samples == {
        f"edifice_examples/{folder}/{path.name}"
        for folder in sorted({folder for folders in SAMPLES.values() for folder in folders})
        for path in (ROOT / "examples" / folder).iterdir()
        if path.is_file()
    }


def environment(folder: Path, *requirements: str | Path) -> Path:
    """A new virtual environment with these packages and the wheel, which it does not let pull in more."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin/python"
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    pins = folder / "pins.txt"
    pins.write_text("\n".join(line for line in constraints if not line.startswith("onnxruntime==")))
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "-c", pins, "numpy", "onnx", "typer", *requirements], check=True
    )
    return python


@pytest.mark.slow
@pytest.mark.parametrize("version", ["1.24.1", "1.31.1", "1.32.0"])
def test_a_slim_deployment_on_each_onnxruntime(wheel: Path, tmp_path: Path, version: str) -> None:
    python = environment(tmp_path / "venv", f"onnxruntime=={version}")
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", wheel], check=True)
    found = subprocess.run(
        [python, "-c", "import onnxruntime; print(onnxruntime.__version__)"], capture_output=True, text=True
    )
    assert found.stdout.strip() == version
    check_every_verb(python, tmp_path)


@pytest.mark.slow
def test_another_provider_really_computes(
    wheel: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """OpenVINO, a provider other than the CPU's own, which takes Intel's processors; WebGPU, which needs a GPU."""
    python = environment(
        tmp_path / "venv", "onnxruntime==1.31.1", "onnxruntime-ep-openvino==1.8.1", "onnxruntime-ep-webgpu==0.4.0"
    )
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", wheel], check=True)
    states = {state["name"]: state for state in json.loads(command(python, "doctor", "--json").stdout)["providers"]}
    assert states["openvino"]["usable"] == ("GenuineIntel" in Path("/proc/cpuinfo").read_text())
    assert states["cpu"]["usable"]
    for bundle in (SAMPLE, *(tiny_bundle(name, tmp_path_factory).path for name in ARCHITECTURES)):
        found = command(python, "verify", bundle, "--json")
        assert found.stderr == ""
        report = json.loads(found.stdout)
        assert report["passed"]
        assert set(report["providers"]) == {name for name, state in states.items() if state["usable"]}
    np.save(tmp_path / "x.npy", np.ones((12, 8), np.float32))
    arguments = ("run", SAMPLE, "--input", tmp_path / "x.npy", "--output", tmp_path / "y.npy", "--json")
    for name, needs in (("openvino", "an Intel processor"), ("web", "a GPU")):
        asked = command(python, *arguments, "--provider", name)
        if states[name]["usable"]:
            placed = json.loads(asked.stdout)["providers"]
            assert max(placed, key=placed.get) == name
            continue
        assert needs in states[name]["missing"]
        assert asked.returncode == 2
        assert "no device was found" in asked.stderr
        fallen_back = json.loads(command(python, *arguments, "--provider", name, "--provider", "cpu").stdout)
        assert list(fallen_back["providers"]) == ["cpu"]

"""Coverage-guided fuzzing of the readers of weights files, for CI: `python tests/fuzz_containers.py --seconds 60`.

Needs atheris, which is no dependency of the tests. Exit status 0: nothing found. Otherwise the last line is the path of
the input, and `python tests/fuzz_containers.py --input PATH` runs that one again.

What must hold of any bytes: nothing but FormatError is raised, within 10 seconds and 2 GB; what can be read can be
written, and reads as the same again.
"""

from __future__ import annotations

import argparse
import contextlib
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import atheris
import torch

with atheris.instrument_imports(include=["edifice_export.weights"]):
    from edifice_export.weights.formats import etf, nx, nx_checkpoint
    from edifice_export.weights.formats.error import FormatError

SAMPLES = Path(__file__).parent / "golden" / "containers"
CHECKPOINT_HEADER = struct.Struct(">BI")


def check_term(data: bytes) -> None:
    """An Erlang term."""
    term = etf.decode(data)
    with no_refusal():
        assert etf.decode(etf.encode(term)) == term


def check_nx(data: bytes) -> None:
    """What Nx.serialize writes."""
    tensors = nx.read_nx(data)
    with no_refusal():
        check_same(nx.read_nx(nx.write_nx(tensors)), tensors)
        # Axon doesn't have every tree of tensors that Nx has.
        with contextlib.suppress(FormatError):
            axon = nx.write_axon(tensors)
            with no_refusal():
                check_same(nx.read_nx(axon), tensors)


def check_description(data: bytes) -> None:
    """The term of what Nx.serialize writes, with the right size before it, and as many zeros behind it as data says."""
    size = int.from_bytes(data[:2], "big")
    check_nx(struct.pack(">2sBBQ", b"nx", 1, 0, len(data[2:])) + data[2:] + bytes(size))


def check_checkpoint(data: bytes) -> None:
    """An Edifice checkpoint."""
    tensors, metadata = nx_checkpoint.read_nx_checkpoint(data)
    spec = nx_checkpoint.spec_of(metadata) or (None, None)
    with no_refusal():
        for compressed in (False, True):
            written = nx_checkpoint.write_nx_checkpoint(tensors, *spec, compressed=compressed)
            again, metadata = nx_checkpoint.read_nx_checkpoint(written)
            check_same(again, tensors)
            assert (nx_checkpoint.spec_of(metadata) or (None, None)) == spec


def check_compressed(data: bytes) -> None:
    """The compressed tensors of an Edifice checkpoint: no mutation hits upon a zlib stream's checksum."""
    check_checkpoint(CHECKPOINT_HEADER.pack(1, 0) + zlib.compress(data))


def check_metadata(data: bytes) -> None:
    """The metadata of an Edifice checkpoint that is right otherwise."""
    check_checkpoint(CHECKPOINT_HEADER.pack(0, len(data)) + data + nx.write_nx({}))


CHECKS = (check_term, check_nx, check_description, check_checkpoint, check_compressed, check_metadata)
"""By the first byte of an input."""

TERMS = {check_term: 1, check_description: 3, check_metadata: 1}
"""Where the term begins in the inputs that are one."""

VALUES = [
    *(0, 1, -1, 2**31, -(2**31), 2**62, 2**64, 2**500, 0.5, (), [], {}, b"", b"a", b"a/b", b"\xff"),
    *map(etf.Atom, ("", "t", "ok", "nil", "true", "f", "u", "f3", "embed_dim", "obs_size")),
]
"""What a part of a term becomes."""


@contextlib.contextmanager
def no_refusal() -> Iterator[None]:
    """Around what is done with what could be read."""
    try:
        yield
    except FormatError as error:
        raise AssertionError("could be read, and not written or read again") from error


def check_same(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert {name: bits(tensor) for name, tensor in tensors.items()} == {
        name: bits(tensor) for name, tensor in expected.items()
    }


def bits(tensor: torch.Tensor) -> tuple[Any, ...]:
    flat = tensor.reshape(-1)
    return tensor.dtype, tensor.shape, flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def run_one(data: bytes) -> None:
    if not data:
        return
    with contextlib.suppress(FormatError):
        CHECKS[data[0] % len(CHECKS)](data[1:])


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """A change of the bytes, as libFuzzer makes it, or of the term in them: changed bytes hardly ever are a term."""
    random = Random(seed)
    start = TERMS.get(CHECKS[data[0] % len(CHECKS)]) if data else None
    if start and random.random() < 0.7:
        with contextlib.suppress(ValueError, TypeError):
            term = etf.decode(data[start:])
            changed = data[:start] + etf.encode(change(term, random.randrange(parts(term)), random))
            if len(changed) <= max_size:
                return changed
    return bytes(atheris.Mutate(data, max_size))


def change(term: Any, place: int, random: Random) -> Any:
    """The same term but for one of its parts, by number."""
    items = list(term.items() if isinstance(term, dict) else term) if isinstance(term, (dict, list, tuple)) else []
    if place == 0:
        if not items or random.random() < 0.3:
            numbers = [-term, term + 1, term - 1, term * 2] if isinstance(term, int) else []
            return random.choice(VALUES + 3 * numbers)
        one = items.pop(random.randrange(len(items)))
        for _ in range(random.randrange(3)):
            items.insert(random.randint(0, len(items)), one)
        return type(term)(items)
    place -= 1
    for number, item in enumerate(items):
        if place < parts(item):
            items[number] = change(item, place, random)
            break
        place -= parts(item)
    return type(term)(items)


def parts(term: Any) -> int:
    if isinstance(term, dict):
        return 1 + sum(map(parts, term.items()))
    return 1 + sum(map(parts, term)) if isinstance(term, (list, tuple)) else 1


def seeds() -> list[bytes]:
    """What the samples are, with two tensors: the smaller an input is, the more of its mutations hit something."""
    tensors = {"norm/gamma": torch.tensor([1.5, -2.0]), "dense/none": torch.zeros(0, 3, dtype=torch.bfloat16)}
    plain, axon = nx.write_nx(tensors), nx.write_axon(tensors)
    options = {"embed_dim": 12, "dropout": 0.5, "causal": True, "activation": "silu", "sizes": [300, None]}
    checkpoint = nx_checkpoint.write_nx_checkpoint(tensors, "hymba", options, compressed=False)
    compressed = nx_checkpoint.write_nx_checkpoint(tensors, "hymba", options, compressed=True)
    _, size = CHECKPOINT_HEADER.unpack_from(checkpoint)
    metadata = checkpoint[CHECKPOINT_HEADER.size : CHECKPOINT_HEADER.size + size]
    sample = (SAMPLES / "hymba_small_ckpt_spec.nx").read_bytes()
    _, sample_size = CHECKPOINT_HEADER.unpack_from(sample)
    sample_metadata = sample[CHECKPOINT_HEADER.size : CHECKPOINT_HEADER.size + sample_size]
    inputs = {
        check_term: [metadata, sample_metadata, described(axon)[2:], etf.encode([2**70, -1, (), {}, b"", 1.5])],
        check_nx: [plain, axon],
        check_description: [described(plain), described(axon)],
        check_checkpoint: [checkpoint, compressed],
        check_compressed: [plain, axon],
        check_metadata: [metadata, sample_metadata],
    }
    return [bytes([CHECKS.index(check)]) + data for check, several in inputs.items() for data in several]


def described(data: bytes) -> bytes:
    """What `check_description` takes for these bytes of Nx.serialize."""
    size = int.from_bytes(data[4:12], "big")
    return (len(data) - 12 - size).to_bytes(2, "big") + data[12 : 12 + size]


def fuzz(arguments: list[str]) -> None:
    """Hands over to libFuzzer, which ends the process."""
    atheris.Setup(
        [sys.argv[0], *arguments, "-timeout=10", "-rss_limit_mb=2048", "-max_len=4096", "-mutate_depth=2"],
        run_one,
        custom_mutator=mutate,
    )
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="how long (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="of libFuzzer's random numbers (default: any)")
    parser.add_argument("--input", type=Path, help="run this input alone")
    options = parser.parse_args()
    if options.input:
        run_one(options.input.read_bytes())
        return 0
    with tempfile.TemporaryDirectory() as corpus:
        for number, data in enumerate(seeds()):
            CHECKS[data[0]](data[1:])
            Path(corpus, str(number)).write_bytes(data)
        findings = Path(tempfile.mkdtemp(prefix="fuzz_containers_"))
        limits = [
            corpus,
            f"-max_total_time={options.seconds}",
            f"-seed={options.seed}",
            f"-artifact_prefix={findings}/",
        ]
        # In a process of its own, which libFuzzer ends as it likes.
        status = subprocess.run([sys.executable, __file__, "--fuzz", *limits], check=False).returncode
    found = sorted(findings.iterdir())
    if status == 0 and not found:
        findings.rmdir()
        return 0
    print(*found, sep="\n")
    return status or 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--fuzz"]:
        fuzz(sys.argv[2:])
    sys.exit(main())

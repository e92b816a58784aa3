"""The containers that Edifice's users save weights in: the same tensors from each, FormatError from damaged ones."""

from __future__ import annotations

import contextlib
import math
import re
import struct
import time
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from edifice_export.weights.formats import etf, nx, nx_checkpoint
from edifice_export.weights.formats.error import FormatError
from edifice_export.weights.formats.etf import Atom

Tensors = dict[str, torch.Tensor]

FOLDER = Path(__file__).parent / "golden" / "containers"
DATA, PLAIN, SPEC, ZLIB = (
    f"hymba_small_{name}" for name in ("data.nxbin", "ckpt_plain.nx", "ckpt_spec.nx", "ckpt_zlib.nx")
)
AXONS = ["hymba_small.axon", "hymba_small_otp26atoms.axon"]
BYTES = {name: (FOLDER / name).read_bytes() for name in (DATA, PLAIN, SPEC, ZLIB, *AXONS)}
TENSORS = {
    name.replace(".", "/", 1): tensor for name, tensor in load_file(FOLDER / "hymba_small_ckpt_dot.safetensors").items()
}
OPTIONS = {"embed_dim": 12, "hidden_size": 16, "num_layers": 2, "window_size": 10}

MAP, NIL, OK = Atom("Elixir.Nx.Container.Map"), Atom("nil"), Atom("ok")
DTYPES = [
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
]
SMALL = {
    "norm/gamma": torch.tensor([1.5, -2.0]),
    "dense/kernel": torch.arange(6, dtype=torch.float64).reshape(2, 3),
    "dense/none": torch.zeros(0, 2),
}
SMALL_BYTES = {
    "small.nxbin": nx.write_nx(SMALL),
    "small.axon": nx.write_axon(SMALL),
    "small.nx": nx_checkpoint.write_nx_checkpoint(SMALL, "h3", {"embed_dim": 3, "dropout": 0.5}, compressed=False),
    "small_zlib.nx": nx_checkpoint.write_nx_checkpoint(SMALL, "h3", {"embed_dim": 3, "dropout": 0.5}, compressed=True),
}


def read(name: str, data: bytes) -> Tensors:
    if name.endswith(".nx"):
        tensors, metadata = nx_checkpoint.read_nx_checkpoint(data)
        # Damaged metadata may say anything, but not raise anything.
        with contextlib.suppress(FormatError):
            nx_checkpoint.spec_of(metadata)
        return tensors
    return nx.read_nx(data)


def bits(tensors: Tensors) -> dict[str, tuple[Any, ...]]:
    # Cloned, since a view as bytes needs a stride of 1.
    flat = {
        name: torch.clone(tensor.reshape(-1), memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    return {
        name: (tensor.dtype, tensor.shape, flat[name].view(torch.uint8).tolist() if tensor.numel() else [])
        for name, tensor in tensors.items()
    }


def header_size(name: str, data: bytes) -> int:
    """Bytes before the tensors' own; all of a compressed file's."""
    start = 5 + int.from_bytes(data[1:5], "big") if name.endswith(".nx") else 0
    return (
        len(data)
        if name.endswith(".nx") and data[0]
        else start + 12 + int.from_bytes(data[start + 4 : start + 12], "big")
    )


def part(name: str) -> bytes:
    """The bytes of Nx.serialize in a sample."""
    data = BYTES[name]
    if not name.endswith(".nx"):
        return data
    data_part = data[5 + int.from_bytes(data[1:5], "big") :]
    return zlib.decompress(data_part) if data[0] else data_part


def term_of(data: bytes) -> Any:
    return etf.decode(data[12 : 12 + int.from_bytes(data[4:12], "big")])


def serialized(term: Any, buffers: bytes = b"") -> bytes:
    encoded = etf.encode(term)
    return struct.pack(">2sBBQ", b"nx", 1, 0, len(encoded)) + encoded + buffers


def described(offset: Any = 0, size: Any = 8, **other: Any) -> tuple[Any, ...]:
    """A tensor of two float32 in a term."""
    fields = {"shape": (2,), "type": (Atom("f"), 32), "names": [NIL], "vectorized": [], **other}
    return (Atom("t"), *fields.values(), offset, size)


def map_of(*pairs: Any) -> Any:
    return (MAP, list(pairs), OK)


def peak(call: Callable[[], Any], expected: str) -> int:
    """The most memory that Python takes during a call that is refused."""
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=expected):
            call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", BYTES)
def test_samples(name: str) -> None:
    """Names and bits are those of the safetensors sample; the tensors may be written to, and torch warns of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensors = read(name, BYTES[name])
    assert bits(tensors) == bits(TENSORS)
    for tensor in tensors.values():
        tensor.zero_()
    assert bits(read(name, memoryview(BYTES[name]))) == bits(TENSORS)


def test_samples_are_written_again() -> None:
    """The same bytes, but that Axon lists the names of a layer's parameters in the order they were declared in."""
    for name in (DATA, PLAIN, SPEC, ZLIB):
        assert nx.write_nx(read(name, BYTES[name])) == part(name)
    assert nx_checkpoint.write_nx_checkpoint(read(PLAIN, BYTES[PLAIN]), None, None, compressed=False) == BYTES[PLAIN]
    for name in AXONS:
        data, expected = nx.write_axon(read(name, BYTES[name])), BYTES[name]
        term, expected_term = term_of(data), term_of(expected)
        for parameters in (term[2][0][1], expected_term[2][0][1]):
            for names in parameters.values():
                names.sort()
        assert repr(term) == repr(expected_term)
        assert data[-len(data) + header_size(name, data) :] == expected[header_size(name, expected) :]
    assert len(nx.write_axon(read(AXONS[0], BYTES[AXONS[0]]))) == len(BYTES[AXONS[0]])


def test_small_maps_are_in_erlangs_order() -> None:
    """Whatever the order of the tensors; a shorter name before a longer one."""
    one = {
        "b/x": SMALL["norm/gamma"],
        "a/y": SMALL["norm/gamma"],
        "a/x": SMALL["norm/gamma"],
        "a.b/x": SMALL["norm/gamma"],
    }
    assert list(nx.read_nx(nx.write_nx(one))) == ["a/x", "a/y", "a.b/x", "b/x"]
    assert nx.write_nx(one) == nx.write_nx(dict(reversed(one.items())))
    assert nx.write_axon(one) == nx.write_axon(dict(reversed(one.items())))


def test_specs() -> None:
    for name, expected in ((PLAIN, None), (SPEC, ("hymba", OPTIONS)), (ZLIB, ("hymba", OPTIONS))):
        _, metadata = nx_checkpoint.read_nx_checkpoint(BYTES[name])
        assert nx_checkpoint.spec_of(metadata) == expected
    assert metadata[b"__edifice_spec__"]["created_at"] == b"2026-11-21T23:29:38.047816Z"
    options = {"seq_len": 7, "dropout": 0.5, "causal": True, "activation": "silu", "mode": "true", "sizes": [3, 300]}
    for compressed in (False, True):
        data = nx_checkpoint.write_nx_checkpoint(SMALL, "h3", options | {"none": None}, compressed)
        assert data == nx_checkpoint.write_nx_checkpoint(SMALL, "h3", options | {"none": None}, compressed)
        tensors, metadata = nx_checkpoint.read_nx_checkpoint(data)
        assert bits(tensors) == bits(SMALL)
        assert repr(nx_checkpoint.spec_of(metadata)) == repr(("h3", options))
        assert metadata[b"__edifice_spec__"].keys() == {"arch", "build_opts", "external"}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ([("obs_size", 12)], {"embed_dim": 12}),
        ([("embed_size", 12), ("embed_dim", NIL), ("seq_len", 60)], {"embed_dim": 12, "seq_len": 60}),
        ([("a", b"text"), ("b", Atom("false")), ("c", (1, [2.5]))], {"a": "text", "b": False, "c": [1, [2.5]]}),
        ([("a", 1), ("a", 1)], {"a": 1}),
        ([], {}),
        ([("embed_dim", 12), ("input_size", 13)], "embed_dim 12, input_size 13"),
        ([("embed_dim", 12), ("input_dim", 12.0)], "embed_dim 12, input_dim 12.0"),
        ([("a", 1), ("a", Atom("true"))], "the option :a is both 1 and True"),
        ([("a", {})], "the option :a is a map of 0"),
        ([("a", b"\xff")], "the option :a is text that is not UTF-8"),
    ],
)
def test_build_options(spec: list[Any], expected: Any) -> None:
    metadata = {
        Atom("architecture"): Atom("mamba"),
        b"__edifice_spec__": {
            Atom("arch"): Atom("h3"),
            Atom("build_opts"): [(Atom(name), term) for name, term in spec],
        },
    }
    metadata = etf.decode(etf.encode(metadata))
    if isinstance(expected, str):
        with pytest.raises(FormatError, match=re.escape(expected)):
            nx_checkpoint.spec_of(metadata)
    else:
        assert repr(nx_checkpoint.spec_of(metadata)) == repr(("h3", expected))


@pytest.mark.parametrize(
    "spec",
    [
        *(1, [], {}, {Atom("arch"): Atom("h3")}, {Atom("arch"): Atom("h3"), Atom("build_opts"): {}}),
        *({Atom("arch"): arch, Atom("build_opts"): []} for arch in (b"h3", NIL, 3)),
        *({Atom("arch"): Atom("h3"), Atom("build_opts"): [item]} for item in (1, (Atom("a"),), (b"a", 1))),
    ],
)
def test_malformed_specs(spec: Any) -> None:
    with pytest.raises(FormatError, match=r"metadata: .*give the options yourself"):
        nx_checkpoint.spec_of({b"__edifice_spec__": spec})


def test_no_spec() -> None:
    """Nothing of the metadata counts but a spec of Edifice's own."""
    external = {Atom("arch"): Atom("h3"), Atom("build_opts"): [], Atom("external"): Atom("true")}
    for metadata in (None, [], {}, {Atom("architecture"): Atom("h3")}, {b"__edifice_spec__": external}):
        assert nx_checkpoint.spec_of(metadata) is None


NAMES = st.text(st.characters(exclude_categories=("C", "Z"), exclude_characters="/"), min_size=1, max_size=12)


@st.composite
def named_tensors(draw: st.DrawFn) -> Tensors:
    names = draw(st.lists(st.tuples(NAMES, NAMES).map("/".join), unique=True, max_size=6))
    tensors = {}
    for name in names:
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(st.lists(st.integers(0, 3), max_size=4))
        data = draw(st.binary(min_size=(size := math.prod(shape) * dtype.itemsize), max_size=size))
        flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
        tensors[name] = flat.reshape(shape)
    return tensors


@settings(deadline=None)
@given(named_tensors(), st.booleans())
def test_round_trips(tensors: Tensors, compressed: bool) -> None:
    expected = bits(tensors)
    assert bits(nx.read_nx(nx.write_nx(tensors))) == expected
    assert bits(nx.read_nx(nx.write_axon(tensors))) == expected
    written = nx_checkpoint.write_nx_checkpoint(tensors, None, None, compressed)
    assert bits(nx_checkpoint.read_nx_checkpoint(written)[0]) == expected


def test_trees() -> None:
    """Tensors in no map, in maps of maps, of views and of more layers than Erlang keeps in order."""
    step = torch.arange(8.0).reshape(2, 4).t()[::2]
    deep = {"a/b/c": step, "a/b/d": step, "e/f": step}
    many = {f"layer_{number}/bias": torch.tensor([number]) for number in range(300, 0, -1)}
    for tensors in ({"top": step[0, ::2]} | deep, deep, many, {}):
        assert bits(nx.read_nx(nx.write_nx(tensors))) == bits(tensors)
    assert list(nx.read_nx(nx.write_nx(many))) == list(many)
    assert term_of(nx.write_axon(deep))[2][0][1] == {b"a": {b"b": [b"c", b"d"]}, b"e": [b"f"]}


@pytest.mark.parametrize(
    ("write", "tensors", "expected"),
    [
        (nx.write_nx, {"a/b": torch.zeros(1, dtype=torch.complex64)}, "a/b: Nx has no complex64"),
        (nx.write_nx, {"a/b": torch.zeros(1, dtype=torch.bool)}, "a/b: Nx has no bool"),
        (nx.write_nx, {"a": torch.zeros(1), "a/b": torch.zeros(1)}, "a/b: there is also a tensor a"),
        (nx.write_nx, {"a/b": torch.zeros(1), "a": torch.zeros(1)}, "a: there are also tensors below it"),
        *((nx.write_nx, {name: torch.zeros(1)}, "a name must be") for name in ("", "/", "a//b", "a/", "a\n", "\ud800")),
        (nx.write_nx, {"a/" + 511 * "b": torch.zeros(1)}, "more than 512 characters"),
        (nx.write_axon, {"a": torch.zeros(1)}, "a: a tensor outside every layer"),
        (nx.write_axon, {"a/b": torch.zeros(1), "a/c/d": torch.zeros(1)}, "a: has both tensors and maps"),
    ],
)
def test_what_cant_be_written(write: Callable[[Tensors], bytes], tensors: Tensors, expected: str) -> None:
    with pytest.raises(FormatError, match=re.escape(expected)):
        write(tensors)


@pytest.mark.parametrize("name", [*BYTES, *SMALL_BYTES])
def test_truncated(name: str) -> None:
    """Every length in the headers, and some in the tensors; and a byte too many."""
    data = (BYTES | SMALL_BYTES)[name]
    header = min(header_size(name, data), 10000)
    for size in {*range(header), *range(header, len(data), 499), *range(len(data) - 20, len(data))}:
        with pytest.raises(FormatError):
            read(name, data[:size])
    with pytest.raises(FormatError):
        read(name, data + b"\0")


def check_damaged(name: str, data: bytes, place: int, mask: int, expected: Tensors) -> bool:
    """Whether a file with a byte changed is still read. If so its tensors are right, or have other names."""
    damaged = bytearray(data)
    damaged[place] ^= mask
    try:
        tensors = read(name, bytes(damaged))
    except FormatError:
        return False
    # The shape of a tensor without elements can't be checked, and matters to nobody.
    found, right = (bits({name: t[name] for name in t if t[name].numel()}) for t in (tensors, expected))
    assert tensors.keys() != expected.keys() or found == right, (place, mask)
    return True


@pytest.mark.parametrize("name", SMALL_BYTES)
def test_every_flipped_bit(name: str) -> None:
    data = SMALL_BYTES[name]
    places = range(header_size(name, data))
    read_still = sum(
        check_damaged(name, data, place, mask, SMALL)
        for place in places
        for mask in (*(1 << n for n in range(8)), 0xFF)
    )
    assert read_still < len(places) * 9 / 2


@pytest.mark.parametrize("name", BYTES)
def test_flipped_bits_of_samples(name: str) -> None:
    """Another byte of every eight of the header in each sample, and of a compressed one."""
    data, shift = BYTES[name], list(BYTES).index(name)
    for place in range(shift, min(header_size(name, data), 10000), 8):
        check_damaged(name, data, place, 1 << (place // 8 % 8), TENSORS)


@pytest.mark.parametrize("name", [DATA, SPEC, *AXONS])
def test_flipped_bits_of_tensors(name: str) -> None:
    """One tensor is another then: that of the place."""
    data, expected = BYTES[name], bits(TENSORS)
    for place in range(header_size(name, data), len(data), 9973):
        tensors = bits(read(name, data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]))
        assert sum(tensors[key] != expected[key] for key in expected) == 1


@pytest.mark.parametrize(
    ("term", "expected"),
    [
        (b"a\xff", 255),
        (b"b\xff\xff\xff\xfe", -2),
        (b"n\x02\x01\x01\x02", -513),
        (b"o\0\0\0\x40\0" + 64 * b"\xff", 2**512 - 1),
        (b"F\x80" + bytes(7), -0.0),
        (b"d\0\x02ok", Atom("ok")),
        (b"s\x01\xe9", Atom("\xe9")),
        (b"v\0\x02\xc3\xa9", Atom("\xe9")),
        (b"w\x15Elixir.System.halt(1)", Atom("Elixir.System.halt(1)")),
        (b"w\x04true", Atom("true")),
        (b"h\x02a\x01j", (1, [])),
        (b"i\0\0\0\x01a\x01", (1,)),
        (b"k\0\x03abc", [97, 98, 99]),
        (b"l\0\0\0\x01a\x01j", [1]),
        (b"m\0\0\0\x02\xff\0", b"\xff\0"),
        (b"t\0\0\0\x02a\x01jd\0\x01aa\x02", {1: [], Atom("a"): 2}),
    ],
)
def test_terms(term: bytes, expected: Any) -> None:
    """Atoms are text, whatever they name."""
    decoded = etf.decode(memoryview(b"\x83" + term))
    assert repr(decoded) == repr(expected)
    assert type(decoded) is type(expected)
    assert repr(etf.decode(etf.encode(decoded))) == repr(expected)


@pytest.mark.parametrize(
    ("term", "expected"),
    [
        (b"", "byte 7: 1 bytes should follow and 0 do"),
        (b"\x84a\x01", "byte 7: 132 in place of 131"),
        (b"\x83", "byte 8: 1 bytes should follow"),
        (b"\x83a\x01a", "byte 10: 1 bytes behind the end"),
        (b"\x83\0", "byte 8: 0 is no tag"),
        *((bytes([131, tag]) + bytes(40), rf"byte 8: .*tag {tag}\).*not evaluated") for tag in etf._REFUSED),
        (b"\x83F\x7f\xf0" + bytes(6), "byte 9: the float inf"),
        (b"\x83F\x7f\xf8" + bytes(6), "byte 9: the float nan"),
        (b"\x83w\x02\xc3\x28", "byte 9: an atom that is not UTF-8"),
        (b"\x83d\x01\0" + 256 * b"a", "byte 9: an atom of 256 characters"),
        (b"\x83n\x41\0" + 65 * b"\1", "byte 9: an integer of 65 bytes"),
        (b"\x83o\xff\xff\xff\xff\0", "byte 9: an integer of 4294967295 bytes"),
        (b"\x83n\x01\x02\x01", "byte 9: 2 is no sign"),
        (b"\x83l\0\0\0\x01a\x01a\x02", "byte 15: a list that does not end with the empty list"),
        (b"\x83t\0\0\0\x02a\x01ja\x01j", "byte 16: the key 1 for the second time"),
        (b"\x83t\0\0\0\x02d\0\x01ajw\x01aj", "byte 18: the key :a for the second time"),
        (b"\x83t\0\0\0\x01jj", "byte 13: a list of 0 as the key of a map"),
        (b"\x83t\0\0\0\x01n\x05\0\0\0\0\0\1j", "byte 13: 4294967296 as the key of a map"),
        *((b"\x83" + tag + 4 * b"\xff" + b"jjjj", "byte 13: 4294967295 .* follow") for tag in (b"i", b"l", b"t", b"m")),
        (b"\x83k\xff\xffab", "byte 11: 65535 bytes should follow and 2 do"),
        (b"\x83" + 64 * b"h\x01" + b"j", "byte 136: terms nested deeper than 64"),
        (b"\x83" + 1_000_000 * b"l\0\0\0\x01", "nested deeper than 64"),
        (b"\x83m\x01\0\0\0" + bytes(2**24), "byte 7: a term of 16777222 bytes; at most 16777216"),
    ],
)
def test_refused_terms(term: bytes, expected: str) -> None:
    """With the place, and in memory that does not depend on what a length claims."""
    assert peak(lambda: etf.decode(term, 7), expected) < 100_000 + 2 * len(term)


def test_number_of_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even the terms that take a byte each."""
    monkeypatch.setattr(etf, "_MAX_TERMS", 1000)
    for tag, count in ((b"l\0\0", 999), (b"k", 999)):
        assert etf.decode(b"\x83" + tag + count.to_bytes(2, "big") + 999 * b"j" + (b"j" if tag[0] == 108 else b""))
        term = b"\x83" + tag + b"\x03\xe8" + 1001 * b"j"
        assert peak(lambda term=term: etf.decode(term), "more than 1000 terms") < 100_000 + 65 * len(term)


@pytest.mark.parametrize("value", [True, None, "text", {1, 2}, [None], 1j, bytearray(b"a")])
def test_what_is_no_term(value: Any) -> None:
    with pytest.raises(TypeError):
        etf.encode(value)


@pytest.mark.parametrize("value", [math.nan, -math.inf, 2**512, -(2**512), Atom(256 * "a"), Atom("\ud800")])
def test_what_erlang_doesnt_have(value: Any) -> None:
    with pytest.raises(ValueError, match=r"Erlang|written|surrogates"):
        etf.encode(value)


ATOMS = st.text(max_size=255).filter(lambda text: text.isprintable()).map(Atom)
KEYS = st.one_of(ATOMS, st.binary(max_size=9), st.integers(-(2**31), 2**31 - 1))
TERMS = st.recursive(
    st.one_of(KEYS, st.integers(1 - 2**512, 2**512 - 1), st.floats(allow_nan=False, allow_infinity=False)),
    lambda inner: st.one_of(
        st.lists(inner), st.lists(inner, max_size=300).map(tuple), st.dictionaries(KEYS, inner, max_size=9)
    ),
)


@settings(deadline=None)
@given(TERMS)
def test_terms_round_trip(term: Any) -> None:
    assert repr(etf.decode(etf.encode(term))) == repr(term)


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    readers = (etf.decode, nx.read_nx, nx_checkpoint.read_nx_checkpoint)
    prefixes = (b"\x83", serialized(map_of())[:12], b"\x01" + bytes(4))
    for reader, prefix in zip(readers, prefixes, strict=True):
        for attempt in (data, prefix + data):
            with contextlib.suppress(FormatError):
                reader(attempt)


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(list(SMALL_BYTES)),
    st.lists(st.tuples(st.integers(0, 900), st.integers(0, 20), st.binary(max_size=9)), min_size=1, max_size=4),
)
def test_mutated_bytes(name: str, edits: list[tuple[int, int, bytes]]) -> None:
    """What is still read can be written and is the same again."""
    data = SMALL_BYTES[name]
    for place, removed, added in edits:
        data = data[:place] + added + data[place + removed :]
    with contextlib.suppress(FormatError):
        tensors = read(name, data)
        assert bits(nx.read_nx(nx.write_nx(tensors))) == bits(tensors)


BIG = 2**62
HALF = (Atom("f"), 16)


@pytest.mark.parametrize(
    ("term", "size", "expected"),
    [
        (map_of((b"a", described(1))), 9, "a: its bytes begin at 1 .* should begin at 0"),
        (map_of((b"a", described()), (b"b", described(9))), 17, "b: its bytes begin at 9 .* should begin at 8"),
        (map_of((b"a", described()), (b"b", described(4))), 16, "b: its bytes begin at 4 .* should begin at 8"),
        (map_of((b"a", described()), (b"b", described(0))), 8, "b: its bytes begin at 0 .* should begin at 8"),
        (map_of((b"a", described(8)), (b"b", described(0))), 16, "a: its bytes begin at 8 .* should begin at 0"),
        (map_of((b"a", described(-8)), (b"b", described(0))), 8, "a: its bytes begin at -8"),
        (map_of((b"a", described())), 7, "take 8 bytes and the buffers have 7"),
        (map_of((b"a", described())), 9, "take 8 bytes and the buffers have 9"),
        (map_of(), 1, "take 0 bytes and the buffers have 1"),
        (map_of((b"a", described(shape=(3,)))), 8, "a: 8 bytes at 0 don't hold f32 of shape"),
        (map_of((b"a", described(type=HALF))), 8, "a: 8 bytes at 0 don't hold f16"),
        (map_of((b"a", described(0, 0, shape=(0, BIG, BIG), names=3 * [NIL]))), 0, "a: 0 bytes at 0 don't hold f32"),
        (map_of((b"a", described(0, 4 * 2**500, shape=(2**500,)))), 8, "a: .* bytes at 0 don't hold f32"),
        (map_of((b"a", described(shape=(-1, -2), names=2 * [NIL]))), 8, "a: a tuple of 2 is no shape"),
        (map_of((b"a", described(shape=(2, 1.0), names=2 * [NIL]))), 8, "a: a tuple of 2 is no shape"),
        (map_of((b"a", described(shape=(2, *33 * (1,)), names=34 * [NIL]))), 8, "a: a tuple of 34 is no shape"),
        (map_of((b"a", described(names=[]))), 8, "a: a list of 0 are no names of 1 axes"),
        (map_of((b"a", described(names=[1]))), 8, "a: a list of 1 are no names of 1 axes"),
        (map_of((b"a", described(vectorized=[(Atom("x"), 2)]))), 8, "a: vectorized axes"),
        *(
            (map_of((b"a", described(type=(Atom(kind), bits)))), 8, f"a: type {{:{kind}, {bits}}} is not one of")
            for kind, bits in (("c", 64), ("f", 8), ("u", 4), ("f3", 2), ("f", -32))
        ),
        *((map_of((b"a", described(0.0, size))), 8, "a: 8") for size in (8, 8.0)),
        (map_of((b"a", described()[:-1])), 8, "a: {:t, ...} of 6 is no description"),
        (map_of((b"a", [])), 0, "in place of a binary with a tensor or a map"),
        (map_of((Atom("a"), described())), 8, "in place of a binary with a tensor or a map"),
        (map_of((b"a", (MAP, [], NIL))), 0, "a: {:Elixir.Nx.Container.Map, ...} of 3 in place of a map"),
        (map_of((b"a", (Atom("Elixir.System"), [], OK))), 0, "a: {:Elixir.System, ...} of 3 in place of a map"),
        (map_of((b"a", described()), (b"a", described(8))), 16, "a: for the second time"),
        *((map_of((name, described())), 8, "a name must be") for name in (b"", b"a/b", b"a\0", "a\u202e".encode())),
        (map_of((b"\xff", described())), 8, "a name that is not UTF-8"),
        (map_of((300 * b"a", map_of((300 * b"a", described())))), 8, "a name of more than 512"),
        ((Atom("Elixir.Nx.Container.Tuple"), [([], described())], OK), 8, "holds {:Elixir.Nx.Container.Tuple"),
        *(
            ((Atom("Elixir.Nx.Container.Axon.ModelState"), pairs, []), 0, "holds {:Elixir.Nx.Container.Axon.ModelState")
            for pairs in ([], [(Atom("date"), map_of())], 2 * [(Atom("data"), map_of())])
        ),
        (described(), 8, "holds {:t, ...} of 7"),
        ({}, 0, "holds a map of 0"),
    ],
)
def test_refused_tensors(term: Any, size: int, expected: str) -> None:
    with pytest.raises(FormatError, match=expected):
        nx.read_nx(serialized(term, bytes(size)))


@pytest.mark.parametrize(
    ("place", "value", "expected"),
    [
        (0, 131, "begins with .* not with b'nx'"),
        (2, 2, "byte 2: version 2"),
        (3, 1, "byte 3: endianness 1: tensors from a big-endian machine"),
        (4, 255, "byte 4: 18374.* bytes should describe"),
        (12, 0, "byte 12: 0 in place of 131"),
        (13, 80, r"byte 13: a compressed term \(tag 80\)"),
    ],
)
def test_refused_headers(place: int, value: int, expected: str) -> None:
    data = bytearray(BYTES[DATA])
    data[place] = value
    for prefix, reader in ((b"", nx.read_nx), (bytes(5), nx_checkpoint.read_nx_checkpoint)):
        with pytest.raises(FormatError, match=expected):
            reader(prefix + data)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"\x02" + BYTES[PLAIN][1:], "byte 0: 2 says neither compressed"),
        (b"\0\xff\xff\xff\xff" + BYTES[PLAIN][5:], "byte 1: 4294967295 bytes of metadata should follow"),
        (b"\0\0\0\0\x02\x83P" + BYTES[PLAIN][5:], r"byte 6: a compressed term \(tag 80\)"),
        (b"\0" + BYTES[ZLIB][1:], r"in the tensors, from byte 304: begins with b'x\\x9c'"),
        (b"\1" + BYTES[PLAIN][1:], "from byte 5: damaged compressed tensors"),
        (b"\1" + bytes(4) + zlib.compress(part(PLAIN)[:-1]), "expanded from byte 5: .* buffers have 54351"),
        (BYTES[ZLIB][:-1] + b"\0", "incorrect data check"),
        (BYTES[ZLIB][:-1], "end too early"),
        (BYTES[ZLIB] + BYTES[ZLIB][304:], "51095 bytes behind the compressed tensors"),
    ],
)
def test_refused_checkpoints(data: bytes, expected: str) -> None:
    with pytest.raises(FormatError, match=expected):
        nx_checkpoint.read_nx_checkpoint(data)


def test_zlib_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused when it has grown to the limit: nothing of the rest is expanded."""
    monkeypatch.setattr(nx_checkpoint, "_MAX_EXPANDED", 2**20)
    header = serialized(map_of((b"a", described(0, 2**26, shape=(2**24,)))))
    bomb = b"\1" + bytes(4) + zlib.compress(header + bytes(2**26))
    limit = 2**20 + 32 * len(bomb)
    assert peak(lambda: nx_checkpoint.read_nx_checkpoint(bomb), f"grow beyond {limit} bytes") < 3 * limit < 2**24
    monkeypatch.setattr(nx_checkpoint, "_MAX_EXPANDED", 2**27)
    assert nx_checkpoint.read_nx_checkpoint(bomb)[0]["a"].shape == (2**24,)


def test_slow_and_large_files() -> None:
    """Files that would take a minute, or their size in memory many times over, if they were read naively."""
    # The names of the maps around a tensor are in its own.
    layers = [(str(number).encode(), described(0, 0, shape=(0,))) for number in range(3000)]
    long_name = serialized(map_of((100_000 * b"a", map_of(*layers))))
    # Integers with one hash.
    keys = b"".join(b"n\x0a\0" + (number * (2**61 - 1)).to_bytes(10, "little") + b"j" for number in range(1, 30000))
    collisions = b"\x83t" + (29999).to_bytes(4, "big") + keys
    huge = serialized(map_of((b"a", described(0, 2**40, shape=(2**38,)))), bytes(8))
    cases = ((nx.read_nx, long_name, "512"), (etf.decode, collisions, "as the key"), (nx.read_nx, huge, "have 8;"))
    for reader, data, expected in cases:
        start = time.process_time()
        assert peak(lambda reader=reader, data=data: reader(data), expected) < 100_000 + 40 * len(data)
        assert time.process_time() - start < 5

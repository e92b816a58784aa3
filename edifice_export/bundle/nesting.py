"""What stands in a model, however deep: messages of one kind, and the nodes that there are with functions inlined."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from itertools import islice
from typing import Any

import onnx

from ..errors import CheckError

__all__ = ["Call", "calls_of", "check_inlined", "find", "qualified"]

MAX_NODES = 200_000
"""With functions inlined, as ONNX Runtime does: twenty functions, each calling the next one twice, make a million."""

_MAX_BYTES = 2**28
_MAX_DEPTH = 64
"""Of functions that call functions; ours are three deep."""

Call = tuple[str, str, str]
"""Domain, name and overload: what a node calls a function by."""


def find(message: Any, kind: type) -> Iterator[Any]:
    """Every message of one kind inside another, at any depth; protobuf's parser bounds that depth."""
    for field, value in message.ListFields():
        if field.type == field.TYPE_STRING and isinstance(value, bytes):
            raise ValueError(f"{field.full_name} is not UTF-8")
        if field.message_type is not None:
            for item in [value] if hasattr(value, "ListFields") else value:
                yield from [item] if isinstance(item, kind) else []
                yield from find(item, kind)


def qualified(domain: str, name: str) -> str:
    return f"{domain}::{name}" if domain else name


def calls_of(body: onnx.GraphProto | onnx.FunctionProto) -> Counter[Call]:
    """How many nodes of each kind a body has, those of the graphs inside it among them.

    Raises:
        CheckError: more than MAX_NODES.
    """
    calls = Counter(_key(node, node.op_type) for node in islice(find(body, onnx.NodeProto), MAX_NODES + 1))
    _check_size(calls.total(), 0, 0)
    return calls


def check_inlined(model: onnx.ModelProto) -> Counter[Call]:
    """Refuses a model that its functions make larger than there is time and memory for, before anything inlines them.

    Returns:
        The nodes that call no function of the model, wherever they stand.

    Raises:
        CheckError: more than MAX_NODES nodes, or as absurd a size or depth, with functions inlined; a function that is
            there twice, or calls itself.
    """
    functions: dict[Call, onnx.FunctionProto] = {}
    for function in model.functions:
        key = _key(function, function.name)
        if key in functions:
            raise CheckError(f"it has two functions {_named(key)}; give a sound model")
        functions[key] = function
    calls = {key: calls_of(function) for key, function in functions.items()}
    sizes = dict.fromkeys(functions, (0, 0, 0))
    try:
        for key in TopologicalSorter(
            {key: functions.keys() & called.keys() for key, called in calls.items()}
        ).static_order():
            sizes[key] = _size(calls[key], sizes, functions[key].ByteSize())
    except CycleError as error:
        raise CheckError(f"its function {_named(error.args[1][0])} calls itself; give a sound model") from error
    main = calls_of(model.graph)
    _size(main, sizes, 0)
    others: Counter[Call] = sum((*calls.values(), main), Counter())
    return Counter({key: count for key, count in others.items() if key not in functions})


def _size(calls: Counter[Call], sizes: dict[Call, tuple[int, int, int]], own: int) -> tuple[int, int, int]:
    """Nodes, bytes of functions, and depth of a body with all that it calls inlined."""
    nodes, size, depth = 0, own, 0
    for key, count in calls.items():
        inner_nodes, inner_size, inner_depth = sizes.get(key, (1, 0, -1))
        nodes, size, depth = nodes + count * inner_nodes, size + count * inner_size, max(depth, inner_depth + 1)
    _check_size(nodes, size, depth)
    return nodes, size, depth


def _check_size(nodes: int, size: int, depth: int) -> None:
    for what, found, most in (("nodes", nodes, MAX_NODES), ("bytes", size, _MAX_BYTES), ("levels", depth, _MAX_DEPTH)):
        if found > most:
            raise CheckError(f"it has more than {most} {what} with functions inlined; give a smaller model")


def _key(message: onnx.NodeProto | onnx.FunctionProto, name: str) -> Call:
    # ONNX's own domain has two names.
    return "" if message.domain == "ai.onnx" else message.domain, name, message.overload


def _named(key: Call) -> str:
    domain, name, overload = key
    return qualified(domain, name) + (f" ({overload})" if overload else "")

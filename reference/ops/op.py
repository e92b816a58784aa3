"""What an op is: its mathematics, and all that whoever traces, rewrites, links, tests or describes it has to know.

An op is declared once, on its plain-torch definition, and registered with torch from there: a traced graph keeps it
whole, eager code runs the definition, and gradients are those of the definition.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, ParamSpec, TypedDict, TypeVar, Unpack, cast

import torch
from torch import Tensor

__all__ = ["NAMESPACE", "Case", "DeclaredOp", "Facts", "declare", "declared", "plain_definitions"]

NAMESPACE = "edifice"
"""Of the ops that are declared here."""

P = ParamSpec("P")
R = TypeVar("R")

Case = Callable[[Callable[..., Tensor], Mapping[str, int]], dict[str, Any]]
"""Makes arguments by name, in their order: from what draws a float64 tensor of a shape, and named sizes (batch,
sequence, channels and so on)."""


class Facts(TypedDict, total=False):
    """What is declared of an op besides its definition, whose arguments give inputs their names.

    An op's first output is y. All others are states, one after the last frame for each that there was before the first.
    """

    shapes: Callable[..., Sequence[Sequence[Any]]]
    """From the arguments, the shape of each output. If not given: of y that of the first input, of a state its own."""
    streamed: Sequence[str]
    """Inputs with a sequence axis, the second. y has as many frames as the first of them."""
    states: Sequence[str]
    """Inputs that stand for what came before, in the order of the outputs for what comes after. Those that may be None
    are then zeros. An op with states takes one frame in place of a sequence, too: its first input then has one axis
    less, and what is streamed and y are without the sequence axis."""
    axes: int
    """Of its first input, if that is a sequence: three, if not given."""
    read_out: str
    """A streamed input that may have fewer frames than the others: they are the last ones, and so are those of y."""
    reads_one_or_all: bool
    """Whether its bodies read out the last frame or all of them, and no other number."""
    sees: int | tuple[str, int]
    """How many frames of what is streamed decide a frame of y and the states after it: a number, or an input and its
    axis that is so long. All that there are, if not given."""
    ends_with_state: bool
    """Whether y of the last frame is the first state after it."""
    integers: Sequence[str]
    """Inputs of int64. One that isn't streamed counts the frames that each entry has seen before: int64 [batch]."""
    cases: Sequence[Case]
    """Arguments to test it with: a maker for each way in which it is called."""


@dataclasses.dataclass(eq=False)
class DeclaredOp(Generic[P, R]):
    """An op, called as its definition is.

    Attributes:
        namespace: torch's; of ONNX nodes the domain.
        name: within it.
        definition: its mathematics, of one frame too where it takes one.
        inputs: its tensors; those that may be None stand last.
        optional: those.
        attributes: its other arguments, with their types in torch's schema.
        place: the file that it was declared in, and the definition's name there.
        shapes: this and what follows as declared, see Facts.
    """

    namespace: str
    name: str
    definition: Callable[P, R]
    inputs: tuple[str, ...]
    optional: frozenset[str]
    attributes: dict[str, str]
    place: tuple[str, str]
    shapes: Callable[..., Sequence[Sequence[Any]]] | None
    streamed: tuple[str, ...]
    states: tuple[str, ...]
    axes: int
    read_out: str | None
    reads_one_or_all: bool
    sees: int | tuple[str, int] | None
    ends_with_state: bool
    integers: frozenset[str]
    cases: tuple[Case, ...]
    custom: torch._library.custom_ops.CustomOpDef | None = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The registered op; within plain_definitions the definition itself."""
        return self.definition(*args, **kwargs) if _plain else cast(R, self.registered(*args, **kwargs))

    @property
    def qualified(self) -> str:
        """Such as edifice::selective_scan."""
        return f"{self.namespace}::{self.name}"

    def register(self) -> None:
        """Makes it a custom op of torch."""
        self.custom = torch.library.custom_op(self.qualified, self.definition, mutates_args=())
        self.custom.register_fake(self._fake)
        self.custom.register_autograd(functools.partial(_backward, self.definition), setup_context=_setup_context)
        functools.update_wrapper(self, self.definition)

    def _fake(self, *inputs: Any) -> Any:
        """Outputs without values, from inputs of which the last may be left out."""
        given = inspect.signature(self.definition).bind(*inputs)
        given.apply_defaults()
        if self.shapes is not None:
            shapes = self.shapes(*given.args)
        else:
            shapes = [inputs[0].shape, *(given.arguments[state].shape for state in self.states)]
        outputs = [inputs[0].new_empty(shape) for shape in shapes]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    @property
    def registered(self) -> torch._ops.OpOverload:
        """What stands for it in torch's graphs: of the last one that was registered by this name."""
        return cast(torch._ops.OpOverload, getattr(getattr(torch.ops, self.namespace), self.name).default)

    def is_frame(self, axes: int) -> bool:
        """Whether a first input of so many axes is one frame in place of a sequence."""
        return bool(self.states) and axes == self.axes - 1

    @property
    def outputs(self) -> int:
        """How many it has."""
        return 1 + len(self.states)

    @property
    def fresh(self) -> int:
        """How many inputs must be given: without those states at the end that may be left out, to be zeros."""
        given = len(self.inputs)
        while given and self.inputs[given - 1] in self.optional and self.inputs[given - 1] in self.states:
            given -= 1
        return given


_plain = False


@contextlib.contextmanager
def plain_definitions() -> Iterator[None]:
    """Within the block every op is its definition, as if there were no custom ops."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


def declare(name: str | None = None, **facts: Unpack[Facts]) -> Callable[[Callable[P, R]], DeclaredOp[P, R]]:
    """Declares an op on its definition and registers it with torch.

    The definition takes tensors, among them those that may be None (`Tensor | None = None`) last, and numbers; it
    returns y, or a tuple of y and the states after the last frame. Everything has annotations, from which torch makes
    its schema. Outputs are of the first input's type, and share no memory with an input or another output.

    Args:
        name: `namespace::name`; `edifice::` and the definition's own name if None.
        facts: see Facts.

    Raises:
        ValueError: something that was declared doesn't fit the definition.
    """

    def decorate(definition: Callable[P, R]) -> DeclaredOp[P, R]:
        op = declared(name or f"{NAMESPACE}::{definition.__name__}", definition, facts)
        op.register()
        return op

    return decorate


_QUALIFIED = re.compile(r"([a-z][a-z0-9_]*)::([a-z][a-z0-9]*(?:_[a-z0-9]+)*)")


def declared(name: str, definition: Callable[P, R], facts: Facts) -> DeclaredOp[P, R]:
    """declare, without registering it yet."""

    def demand(is_so: bool, problem: str) -> None:
        if not is_so:
            raise ValueError(f"op {name}: {problem}")

    matched = _QUALIFIED.fullmatch(name)
    demand(matched is not None, "a name is namespace::name, in lower case, such as mine::leaky_scan")
    assert matched is not None
    schema = torch._C.parse_schema(matched[2] + torch.library.infer_schema(definition, mutates_args=()))
    tensors = [argument for argument in schema.arguments if str(argument.type) in ("Tensor", "Optional[Tensor]")]
    inputs = tuple(argument.name for argument in tensors)
    optional = frozenset(argument.name for argument in tensors if str(argument.type) == "Optional[Tensor]")
    states, streamed = tuple(facts.get("states", ())), tuple(facts.get("streamed", ()))
    integers, read_out, sees = frozenset(facts.get("integers", ())), facts.get("read_out"), facts.get("sees")
    axes = facts.get("axes", 3)

    unknown = facts.keys() - Facts.__annotations__.keys()
    demand(not unknown, f"{', '.join(sorted(unknown))}: no such thing is declared of an op")
    for key in ("streamed", "states", "integers"):
        demand(not isinstance(facts.get(key), str), f"{key} is a list of names")
    named = {*streamed, *states, *integers, *([read_out] if read_out else [])}
    named |= {sees[0]} if isinstance(sees, tuple) else set()
    demand(named <= {*inputs}, f"{', '.join(sorted(named - {*inputs}))}: no such input; there are {', '.join(inputs)}")
    demand(bool(inputs) and inputs[0] not in optional | integers, "the first argument is a tensor of floating point")
    demand({*inputs[len(inputs) - len(optional) :]} == optional, "inputs that may be None stand behind all others")
    demand(not any(argument.kwarg_only for argument in schema.arguments), "arguments go by position too")
    demand(read_out is None or read_out in streamed, f"{read_out} is read out and not among the streamed inputs")
    demand(not states or inputs[0] in streamed[:1], "with states, the first input is the first that is streamed")
    demand(
        len(schema.returns) == 1 + len(states) and all(str(each.type) == "Tensor" for each in schema.returns),
        f"with {len(states)} states there are {1 + len(states)} outputs, all tensors, got {len(schema.returns)}",
    )
    demand(
        "shapes" in facts or not optional & {*states},
        "a state that may be None has its shape from nowhere; declare shapes",
    )
    return DeclaredOp(
        namespace=matched[1],
        name=matched[2],
        definition=_completed(definition, streamed, axes - 1 if states else None),
        inputs=inputs,
        optional=optional,
        attributes={argument.name: str(argument.type) for argument in schema.arguments if argument not in tensors},
        place=(inspect.getfile(definition), definition.__qualname__),
        shapes=facts.get("shapes"),
        streamed=streamed,
        states=states,
        axes=axes,
        read_out=read_out,
        reads_one_or_all=facts.get("reads_one_or_all", False),
        sees=sees,
        ends_with_state=facts.get("ends_with_state", False),
        integers=integers,
        cases=tuple(facts.get("cases", ())),
    )


def _completed(definition: Callable[P, R], streamed: Sequence[str], of_frames: int | None) -> Callable[P, R]:
    """The definition, with outputs that lie in memory as torch is told, and for one frame, whose first input has so
    many axes, as a sequence of one.
    """
    signature = inspect.signature(definition)

    @functools.wraps(definition)
    def define(*args: P.args, **kwargs: P.kwargs) -> R:
        given = signature.bind(*args, **kwargs).arguments
        is_frame = next(iter(given.values())).ndim == of_frames
        if is_frame:
            given |= {name: given[name].unsqueeze(1) for name in streamed if given.get(name) is not None}
        found = cast(Any, definition)(**given)
        y, *states = found if isinstance(found, tuple) else (found,)
        outputs = [(y.squeeze(1) if is_frame else y).contiguous(), *(state.contiguous() for state in states)]
        return cast(R, tuple(outputs) if isinstance(found, tuple) else outputs[0])

    return define


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
    ctx.constants = [value for value in inputs if not isinstance(value, Tensor)]
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))


def _backward(define: Callable[..., Any], ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    # The definition is run again under autograd: one mathematics, no gradient formula to keep in step with it.
    tensors, constants = iter(ctx.saved_tensors), iter(ctx.constants)
    inputs = [next(tensors).detach() if tensor else next(constants) for tensor in ctx.is_tensor]
    wanted = [index for index, needed in enumerate(ctx.needs_input_grad) if needed]
    with torch.enable_grad():
        for index in wanted:
            inputs[index].requires_grad_()
        found = define(*inputs)
        outputs = found if isinstance(found, tuple) else (found,)
        used = [
            (output, gradient)
            for output, gradient in zip(outputs, gradients, strict=True)
            if gradient is not None and output.requires_grad
        ]
        found = torch.autograd.grad(
            [output for output, _ in used],
            [inputs[index] for index in wanted],
            [gradient for _, gradient in used],
            allow_unused=True,
        )
    result: list[Tensor | None] = [None] * len(inputs)
    for index, value in zip(wanted, found, strict=True):
        result[index] = value
    return tuple(result)

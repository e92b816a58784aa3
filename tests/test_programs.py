"""Somebody's module: what it takes is read from its example, and what is done to it is done to a copy."""

from __future__ import annotations

import copy
import inspect
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from module_cases import Recurs
from torch import Tensor, nn

import edifice_export as ee
from edifice_export.errors import RequestError
from edifice_export.graph.capture import export_program
from edifice_export.programs.module_inputs import input_specs, output_names, workable_sizes
from edifice_export.programs.private_copy import Float64, in_float64, private_copy
from edifice_export.programs.source import load_source
from edifice_export.specification import InputSpec, Size, Values, shape_of

STRANGERS = Path(__file__).parent / "strangers/models.py"


class Adds(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


def source(**changed: Any) -> ee.Source:
    given: dict[str, Any] = {"module": Adds(), "args": (torch.randn(2, 5, 4), torch.randn(2, 5, 4))} | changed
    return ee.Source(**given)


DIM = torch.export.Dim("time", min=3, max=40)


@pytest.mark.parametrize(
    ("said", "shapes"),
    [
        (None, [(2, 5, 4), (2, 5, 4)]),
        ({"x": {0: "batch", 1: "time"}, "y": {0: "batch", 1: "time"}}, [("batch", "time", 4)] * 2),
        (({0: "batch", 1: DIM}, {0: "batch", 1: DIM}), [("batch", "time", 4)] * 2),
        ([("batch", "time", None), {-3: "batch", -2: "time"}], [("batch", "time", 4)] * 2),
        ({"x": {1: torch.export.Dim.DYNAMIC}}, [(2, "x_1", 4), (2, 5, 4)]),
        (({1: torch.export.Dim.STATIC}, None), [(2, 5, 4), (2, 5, 4)]),
    ],
    ids=["all fixed", "by name", "by position", "sequences and axes from the end", "without a name", "static"],
)
def test_free_sizes_are_said_as_torch_takes_them(said: Any, shapes: list[tuple[int | str, ...]]) -> None:
    specs, free = input_specs(source(dynamic_shapes=said))
    assert specs == tuple(
        InputSpec(name, "float32", shape_of(*shape)) for name, shape in zip("xy", shapes, strict=True)
    )
    assert {name: each.example for name, each in free.items()} == {
        str(size): specs_size
        for spec, example in zip(specs, ((2, 5, 4), (2, 5, 4)), strict=True)
        for size, specs_size in zip(spec.shape, example, strict=True)
        if isinstance(size, Size)
    }
    if "time" in free:
        assert (free["time"].least, free["time"].most) in ((1, None), (3, 40))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"args": (torch.randn(2, 5, 4), 3.0)}, "y is a float; every argument must be a tensor"),
        ({"args": (torch.randn(2, 5, 4), torch.tensor(3.0))}, "y is a number"),
        ({"args": (torch.randn(2, 3), torch.randn(2, 3).double())}, "y is float64; a graph takes float32"),
        ({"args": (torch.randn(2),) * 3}, "got 3, and forward takes 2"),
        ({"dynamic_shapes": {"z": {0: "batch"}}}, "'z' is no argument; there are x, y"),
        ({"dynamic_shapes": ({0: "batch"},)}, "got 1 entries for 2 arguments"),
        ({"dynamic_shapes": {"x": {3: "batch"}}}, "x has 3 axes, and 3 is none of them"),
        ({"dynamic_shapes": {"x": {0: "n", 1: "n"}}}, "n is 2 in one example and 5 in axis 1 of x"),
        ({"dynamic_shapes": {"x": {0: "2*n"}}}, "axis 0 of x is '2.n'"),
        ({"dynamic_shapes": {"x": {0: 2 * torch.export.Dim("n")}}}, "name a free size by a word"),
        ({"input_names": ["a"]}, r"1 input names \(a\) for 2 args"),
        ({"values": {"z": Values("mask")}}, "values: z is no input"),
    ],
)
def test_what_can_not_be_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        input_specs(source(**changed))


@pytest.mark.parametrize(
    ("example", "values"),
    [
        (torch.randn(2, 3), Values("normal")),
        (torch.tensor([[1, 4, 2]]), Values("integers", 5)),
        (torch.ones(2, 3, dtype=torch.int64), Values("mask")),
        (torch.tensor([[True, True, False]]), Values("mask")),
        (torch.tensor([[1, 0, 1]]), Values("integers", 2)),
    ],
)
def test_an_example_tells_what_values_there_are(example: Tensor, values: Values) -> None:
    class Takes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    (spec,), _ = input_specs(ee.Source(Takes(), (example,)))
    assert spec.values == values


def test_names_of_outputs() -> None:
    assert output_names(source(), 1) == ("output",)
    assert output_names(source(), 3) == ("output_0", "output_1", "output_2")
    assert output_names(source(output_names=["a", "b"]), 2) == ("a", "b")
    with pytest.raises(RequestError, match="got 2 for 1 outputs"):
        output_names(source(output_names=["a", "b"]), 1)


class Patches(nn.Module):
    """Takes heights that are multiples of 4 alone."""

    def forward(self, image: Tensor) -> Tensor:
        return image.unflatten(2, (image.shape[2] // 4, 4)).sum(3)


def test_sizes_are_such_that_the_module_bears_them() -> None:
    given = ee.Source(Patches(), (torch.randn(1, 3, 8, 8),), ({0: "batch", 2: "height", 3: "width"},))
    specs, free = input_specs(given)
    traced, *others = workable_sizes(given.module, specs, free)
    assert len(others) == 2
    assert len(set(traced.values())) == 3
    assert all(sizes["height"] % 4 == 0 for sizes in (traced, *others))
    assert all(
        one[name] != other[name] for name in free for one, other in ((traced, others[0]), others, (traced, others[1]))
    )


def test_a_module_that_takes_no_other_size_is_refused() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(10) * 2

    given = ee.Source(Fixed(), (torch.randn(2, 5),), ({0: "batch"},))
    specs, free = input_specs(given)
    with pytest.raises(
        RequestError,
        match=r"no other sizes than batch 2, .* \(at batch 4 it fails: RuntimeError: shape '\[10\]' is invalid",
    ):
        workable_sizes(given.module, specs, free)


class Everything(nn.Module):
    """Parametrizations of both kinds, tied weights, a buffer, dropout, hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.new = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.old = nn.utils.weight_norm(nn.Linear(4, 4))
        self.tied = nn.Linear(4, 4, bias=False)
        self.again = nn.Linear(4, 4, bias=False)
        self.again.weight = self.tied.weight
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.5)
        self.tied.register_forward_hook(lambda _module, _given, found: found + 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.tied(self.dropout(self.norm(self.old(self.new(x))))))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_the_users_module_is_not_changed() -> None:
    module, x = Everything(), torch.randn(3, 4)
    with torch.no_grad():
        module.norm.running_mean.normal_()
        expected = module.eval()(x)
    module.train()
    before = copy.deepcopy(module.state_dict())
    kinds = [(name, type(each), len(each._forward_hooks), each.training) for name, each in module.named_modules()]
    mine = private_copy(module)
    export_program(mine, [InputSpec("x", "float32", shape_of("batch", 4))])
    with torch.no_grad():
        assert torch.equal(mine(x), expected)
    assert kinds == [
        (name, type(each), len(each._forward_hooks), each.training) for name, each in module.named_modules()
    ]
    assert before.keys() == module.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.requires_grad for parameter in module.parameters())
    module.train()(x).sum().backward()  # still learns

    assert mine.again.weight is mine.tied.weight
    assert not any("parametrizations" in name or name.endswith(("_g", "_v")) for name in mine.state_dict())
    # No second copy of what needs none.
    assert mine.tied.weight.data_ptr() == module.tied.weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_float32(dtype: torch.dtype) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(dtype)
    module[1].weight = module[0].weight
    mine = private_copy(module)
    assert {value.dtype for value in mine.parameters()} == {torch.float32}
    assert torch.equal(mine[0].weight, module[0].weight.float())
    assert mine[1].weight is mine[0].weight
    (spec,), _ = input_specs(ee.Source(module, (torch.randn(2, 4, dtype=dtype),)))
    assert spec.dtype == "float32"


def test_float64_holds_where_code_names_another_type() -> None:
    class Rounds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            made = torch.full((4,), 1 / 3, dtype=torch.float32) + torch.zeros(4)
            return self.dense(x.float()).to(torch.float32).half().type_as(x) + made

    exact, x = in_float64(Rounds()), torch.randn(2, 4, dtype=torch.float64)
    with Float64():
        found = exact(x)
    assert found.dtype == torch.float64
    assert torch.allclose(found, exact.dense(x) + 1 / 3, rtol=1e-14)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("name", ["token_model", "both_ways", "two_and_two"])
def test_code_that_the_user_names_gives_a_source(name: str) -> None:
    before = list(sys.path)
    made = load_source(f"{STRANGERS}:{name}")
    assert isinstance(made, ee.Source)
    assert sys.path == before


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("models.py", "", "name code as FILE.py:NAME"),
        ("none.py:make", None, "there is no such file"),
        ("models.py:make", "x = 1", "has no make; define it"),
        ("models.py:make", "def make(): return 3", "gave an int, and should give an edifice_export.Source"),
        ("models.py:make", "def make():\n    raise OSError('no weights')", "OSError: no weights at .*models.py:2"),
        ("models.py:make", "import nothing_like_this", "ModuleNotFoundError"),
        ("models.py:make", "def make(:", "SyntaxError"),
        ("no.such.module:make", "", "can't be imported"),
        ("a b:make", "", "neither a .py file nor the dotted name"),
    ],
)
def test_code_that_gives_none_is_refused(
    name: str, code: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if code is not None:
        Path("models.py").write_text(textwrap.dedent(code))
    with pytest.raises(RequestError, match=message):
        load_source(name)


@pytest.mark.parametrize("name", ["MODULE", "make"])
def test_a_module_may_hold_its_args(name: str, tmp_path: Path) -> None:
    (tmp_path / "held.py").write_text(
        "import torch\nMODULE = torch.nn.Linear(4, 2)\nMODULE.args = (torch.randn(3, 4),)\n"
        "MODULE.dynamic_shapes = ({0: 'n'},)\nMODULE.output_names = ['y']\nmake = lambda: MODULE\n"
    )
    made = load_source(f"{tmp_path / 'held.py'}:{name}")
    assert made.args[0].shape == (3, 4)
    assert (made.dynamic_shapes, made.output_names, made.input_names) == (({0: "n"},), ["y"], None)


def test_code_finds_what_stands_beside_it(tmp_path: Path) -> None:
    (tmp_path / "beside_the_source.py").write_text("WIDTH = 4")
    (tmp_path / "given.py").write_text(
        "import torch, edifice_export as ee\nfrom beside_the_source import WIDTH\n"
        "SOURCE = ee.Source(torch.nn.Linear(WIDTH, 2), (torch.randn(1, WIDTH),))\n"
    )
    assert load_source(f"{tmp_path / 'given.py'}:SOURCE").args[0].shape == (1, 4)


class Selects(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        h, ys = x.new_zeros(x.shape[0], 4, 4), []
        for t in range(x.size(1)):
            h = torch.exp(x[:, t, :, None]) * h + x[:, t, :, None] * x[:, t, None, :]
            ys.append(torch.einsum("bij,bj->bi", h, x[:, t]))
        return torch.stack(ys, 1)


class Unbinds(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([frame.sigmoid() for frame in x.unbind(1)], 1)


class Decides(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[1] > 5 else x


@pytest.mark.parametrize(
    ("module", "line", "advice"),
    [
        (Recurs, "for t in range(x.shape[1]):", "ops.linear_scan"),
        (Selects, "for t in range(x.size(1)):", "ops.selective_scan"),
        (Unbinds, "for frame in x.unbind(1)", "Compute with tensors"),
        (Decides, "if x.shape[1] > 5", "Compute with tensors"),
    ],
)
def test_a_frozen_size_is_told_by_file_and_line(module: type[nn.Module], line: str, advice: str) -> None:
    with pytest.raises(ee.CheckError) as error:
        export_program(module(), [InputSpec("x", "float32", shape_of("batch", "time", 4))])
    file = Path(str(inspect.getsourcefile(module)))
    number = next(n for n, text in enumerate(file.read_text().splitlines(), 1) if line in text)
    message = str(error.value)
    assert f"{file}:{number} reads a size" in message
    assert line in message
    assert advice in message

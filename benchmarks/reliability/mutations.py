"""Small faults put into a module's syntax tree, one at a time: what `make mutants` runs the tests against.

Not generated: changes of what only people read (docstrings, type hints, strings, messages of errors, ``extra_repr``)
and of assertions that are there for the type checker.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

COMPARISONS = {
    ast.Lt: [ast.LtE, ast.GtE], ast.LtE: [ast.Lt, ast.Gt], ast.Gt: [ast.GtE, ast.LtE], ast.GtE: [ast.Gt, ast.Lt],
    ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is], ast.In: [ast.NotIn],
    ast.NotIn: [ast.In],
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
NAMES = {
    "min": "max", "max": "min", "amin": "amax", "amax": "amin", "argmin": "argmax", "argmax": "argmin",
    "minimum": "maximum", "maximum": "minimum", "any": "all", "all": "any", "floor": "ceil", "ceil": "floor",
    "sum": "mean", "mean": "sum",
}  # fmt: skip
DROPPED_METHODS = ("detach", "clamp", "clamp_", "t", "contiguous", "double", "float", "long", "sorted")
EPSILONS = ("eps", "tiny")
TOLERANCES = ("tie_tolerance",)
TEXT_FUNCTIONS = ("extra_repr", "__repr__", "__str__", "describe", "said")


Change = Callable[[ast.AST], ast.AST]


@dataclass(frozen=True)
class Mutation:
    """Where and what a fault is; ``tree`` makes the module that holds it."""

    file: str
    line: int
    function: str
    kind: str
    change: str
    source: ast.Module
    index: int
    make: Change

    @property
    def key(self) -> tuple[str, str, str]:
        """The same after lines above have moved."""
        return self.file, self.function, self.change

    @property
    def tree(self) -> ast.Module:
        mutant = copy.deepcopy(self.source)
        node = next(x for i, (x, _) in enumerate(walk(mutant)) if i == self.index)
        replaced = self.make(node)
        if replaced is not node:
            replace(mutant, node, replaced)
        return ast.fix_missing_locations(mutant)


def mutations(path: Path, name: str) -> list[Mutation]:
    """Every fault that this module knows of, in the file's order."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found, seen = [], {}
    for index, (node, function) in enumerate(walk(tree)):
        for kind, change in changes(node):
            text = f"{shown(node)} -> {shown(change(copy.deepcopy(node)))}"
            seen[function, text] = seen.get((function, text), 0) + 1
            if seen[function, text] > 1:
                text += f" ({seen[function, text]})"
            found.append(Mutation(name, getattr(node, "lineno", 0), function, kind, text, tree, index, change))
    return found


def walk(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Every node that may be changed, with the dotted name of the function around it, in the file's order."""

    def visit(node: ast.AST, function: str) -> Iterator[tuple[ast.AST, str]]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if node.name in TEXT_FUNCTIONS or any(shown(x).endswith("overload") for x in node.decorator_list):
                return
            inside = f"{function}.{node.name}".lstrip(".")
            for default in [*node.args.defaults, *(x for x in node.args.kw_defaults if x)]:
                yield from visit(default, inside)
            for statement in node.body:
                yield from visit(statement, inside)
            return
        if isinstance(node, ast.ClassDef):
            for statement in node.body:
                yield from visit(statement, f"{function}.{node.name}".lstrip("."))
            return
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Assert | ast.JoinedStr | ast.Global | ast.Nonlocal):
            return
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return  # docstrings
        yield node, function
        if isinstance(node, ast.Raise):
            return  # the message
        if isinstance(node, ast.AnnAssign):
            if node.value is not None and "TypeAlias" not in shown(node.annotation):
                yield from visit(node.value, function)
            return
        if is_type(node):
            return
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function)

    yield from visit(tree, "")


def is_type(node: ast.AST) -> bool:
    """``Name = Callable[...]`` and the like."""
    return isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript) and (
        shown(node.value.value) in ("Callable", "Union", "Optional", "tuple", "dict", "list")
    )  # fmt: skip


def changes(node: ast.AST) -> Iterator[tuple[str, Change]]:
    """What may be done to a node; a change gets a copy of it and returns what takes its place."""
    if isinstance(node, ast.Compare):
        for i, operator in enumerate(node.ops):
            for other in COMPARISONS.get(type(operator), ()):
                yield "comparison", set_item("ops", i, other())
    elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        yield "arithmetic", set_field("op", ARITHMETIC[type(node.op)]())
    elif isinstance(node, ast.AugAssign) and type(node.op) in ARITHMETIC:
        yield "arithmetic", set_field("op", ARITHMETIC[type(node.op)]())
        yield "statement", nothing
    elif isinstance(node, ast.UnaryOp):
        yield "sign or not", lambda x: x.operand
    elif isinstance(node, ast.BoolOp):
        yield "and or", set_field("op", ast.And() if isinstance(node.op, ast.Or) else ast.Or())
    elif isinstance(node, ast.Constant):
        yield from constants(node.value)
    elif isinstance(node, ast.If | ast.IfExp | ast.While) and not isinstance(node.test, ast.UnaryOp | ast.Compare):
        yield "condition", lambda x: negated(x)
    elif isinstance(node, ast.Attribute) and node.attr in EPSILONS:
        yield "tolerance", times(1000)
    elif isinstance(node, ast.Call):
        yield from calls(node)
    elif removable(node):
        yield "statement", nothing


def removable(node: ast.AST) -> bool:
    if isinstance(node, ast.Assign):
        return isinstance(node.targets[0], ast.Attribute | ast.Subscript)
    return isinstance(node, ast.Raise) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call))


def constants(value: object) -> Iterator[tuple[str, Change]]:
    if isinstance(value, bool):
        yield "flag", set_field("value", not value)
    elif isinstance(value, int):
        yield "constant", set_field("value", value + 1)
        if value:
            yield "constant", set_field("value", value - 1)
            yield "constant", set_field("value", value * 10)
    elif isinstance(value, float):
        yield "constant", set_field("value", value * 10 if value else 1.0)
        if 0 < abs(value) < 1e-2:
            yield "tolerance", set_field("value", value * 1000)


def calls(node: ast.Call) -> Iterator[tuple[str, Change]]:
    method = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if method in NAMES:
        name = NAMES[method]
        yield "name", lambda x: renamed(x, name)
    if isinstance(node.func, ast.Attribute) and method in DROPPED_METHODS:
        yield "call", lambda x: x.func.value
    if method in TOLERANCES:
        yield "tolerance", times(1000)
        yield "tolerance", times(0)
    for i, keyword in enumerate(node.keywords):
        if keyword.arg is not None:
            yield "argument", without("keywords", i)
    if len(node.args) > 1 and not isinstance(node.args[-1], ast.Starred):
        yield "argument", without("args", len(node.args) - 1)


def set_field(field: str, value: object) -> Change:
    def change(node: ast.AST) -> ast.AST:
        setattr(node, field, value)
        return node

    return change


def set_item(field: str, index: int, value: object) -> Change:
    def change(node: ast.AST) -> ast.AST:
        getattr(node, field)[index] = value
        return node

    return change


def without(field: str, index: int) -> Change:
    def change(node: ast.AST) -> ast.AST:
        del getattr(node, field)[index]
        return node

    return change


def times(factor: int) -> Change:
    return lambda node: ast.copy_location(ast.BinOp(node, ast.Mult(), ast.Constant(factor)), node)


def nothing(node: ast.AST) -> ast.AST:
    return ast.copy_location(ast.Pass(), node)


def negated(node: ast.If | ast.IfExp | ast.While) -> ast.AST:
    node.test = ast.UnaryOp(ast.Not(), node.test)
    return node


def renamed(node: ast.Call, name: str) -> ast.AST:
    if isinstance(node.func, ast.Attribute):
        node.func.attr = name
    else:
        node.func.id = name
    return node


def replace(tree: ast.Module, old: ast.AST, new: ast.AST) -> None:
    class Replacer(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            return new if node is old else self.generic_visit(node)

    Replacer().visit(tree)


def shown(node: ast.AST) -> str:
    """The code in one line, of a statement with a body its head alone."""
    text = ast.unparse(node).split("\n", 1)[0]
    return text if len(text) <= 90 else text[:87] + "..."

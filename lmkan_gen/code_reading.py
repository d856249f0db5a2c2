"""What the code of modules does with the modules below them, other than to call them; nothing is run.

A method such as ``functional.linear(x, self.proj.weight * 2)`` needs an `nn.Linear` in ``proj``, and one such
as ``for layer in self.net[:2]`` needs each member of ``net`` to be what it was. This finds both in the source
of a model's classes: attributes of ``self``, local names for them, members of containers. Where there is no
source, the names in byte code decide, and a use that may be one counts as one.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import CodeType, FunctionType, MethodType

import torch
from torch import nn

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
#: classes whose own code does to members no more than their names say
_OF_TORCH = (nn.Module, object, torch.fx.GraphModule, *_CONTAINERS)
#: methods and attributes that stand for a module's members
_LISTINGS = {"_modules", "children", "items", "named_children", "values"}
_ITERATORS = {"enumerate", "filter", "iter", "list", "map", "reversed", "tuple", "zip"}
_TAKES_APART = ("BINARY_SUBSCR", "BINARY_SLICE", "GET_ITER", "BINARY_OP [")


@dataclass
class Uses:
    """What code does with modules, by their ``id``.

    Attributes:
        reads: names of attributes that are read, ``__class__`` if the type is asked for, each with the method
            that does.
        opened: modules whose members are looked at, and do not only run when the module is called.
    """

    reads: dict[int, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    opened: set[int] = field(default_factory=set)


def uses(model: nn.Module) -> Uses:
    """What the methods of a model's modules do with the modules below them.

    Methods that initialise (``init`` or ``reset`` in their names) are left out: they have run. So is torch's
    fast path of transformers while it is switched off (`torch.backends.mha.set_fastpath_enabled`).
    """
    found = Uses()
    trees: dict[FunctionType, ast.AST | None] = {}
    for module in model.modules():
        children = module._modules.keys()
        for function in _functions(module):
            names = _names(function.__code__)
            if names.isdisjoint(children | _LISTINGS | {"getattr"}):
                continue
            if function not in trees:
                trees[function] = _tree(function)
            tree = trees[function]
            if tree is None:
                _judge_by_names(module, function, names, found)
            elif arguments := function.__code__.co_varnames[: function.__code__.co_argcount]:
                _Method(module, arguments[0], tree, function.__qualname__, found).note()
    return found


def _functions(module: nn.Module) -> Iterator[FunctionType]:
    """The methods that a module's calls may reach: not those overridden, unless by way of `super`."""
    yield from _plain(vars(module).get("forward"))
    hidden: set[str] = set()
    for owner in type(module).__mro__:
        if owner in _OF_TORCH or _is_switched_off(owner):
            continue
        for name, value in vars(owner).items():
            if name in hidden or "init" in name or "reset" in name:
                continue
            methods = list(_plain(value))
            if methods and not any("super" in _names(method.__code__) for method in methods):
                hidden.add(name)
            yield from methods


def _is_switched_off(owner: type) -> bool:
    return (
        owner.__module__ == "torch.nn.modules.transformer" and not torch.backends.mha.get_fastpath_enabled()
    )


def _plain(value: object) -> Iterator[FunctionType]:
    """The functions behind an attribute of a class: below descriptors, and below decorators."""
    if isinstance(value, property):
        yield from _plain(value.fget)
    elif isinstance(value, (staticmethod, classmethod, MethodType)):
        yield from _plain(value.__func__)
    elif isinstance(value, (functools.partial, functools.cached_property)):
        yield from _plain(value.func)
    elif isinstance(value, FunctionType):
        inner = inspect.unwrap(value)
        if inner is not value:
            yield from _plain(inner)
            return
        yield value
        for cell in value.__closure__ or ():  # a decorator that does not say what it wraps
            try:
                content = cell.cell_contents
            except ValueError:  # not assigned yet
                continue
            if isinstance(content, FunctionType) and content is not value:
                yield content


def _names(code: CodeType) -> set[str]:
    """Every attribute, global and string that code mentions, in functions within it too."""
    names = {*code.co_names, *code.co_freevars}
    for constant in code.co_consts:
        if isinstance(constant, str):
            names.add(constant)
        elif isinstance(constant, CodeType):
            names |= _names(constant)
    return names


def _tree(function: FunctionType) -> ast.AST | None:
    try:
        source = inspect.getsource(function)
        return ast.parse(f"if True:\n{source}" if source[0].isspace() else source)
    except (OSError, TypeError, SyntaxError):
        return None


def _judge_by_names(module: nn.Module, function: FunctionType, names: set[str], found: Uses) -> None:
    operations = {f"{i.opname} {i.argrepr}" for i in dis.get_instructions(function.__code__)}
    takes_apart = any(operation.startswith(_TAKES_APART) for operation in operations)

    def visit(parent: nn.Module) -> None:
        for name, child in parent._modules.items():
            if child is None or not (name in names or isinstance(parent, _CONTAINERS)):
                continue
            found.reads[id(child)].update(dict.fromkeys(names, function.__qualname__))
            if {"isinstance", "Linear"} <= names:
                found.reads[id(child)]["__class__"] = function.__qualname__
            if takes_apart:
                found.opened.add(id(child))
            visit(child)

    visit(module)


class _Method:
    """One method of one module. Assignments count wherever they stand: no order of statements is followed."""

    def __init__(self, module: nn.Module, name: str, tree: ast.AST, where: str, found: Uses) -> None:
        self.module = module
        self.where = where
        self.found = found
        self.nodes = list(ast.walk(tree))
        self.local: dict[str, list[nn.Module]] = {name: [module]}
        for _ in range(3):  # names for names for names
            for node in self.nodes:
                self._bind(node)

    def note(self) -> None:
        """Add to what was found."""
        for node in self.nodes:
            match node:
                case ast.Attribute(value, name):
                    self._read(value, name)
                case ast.Subscript(value) | ast.Starred(value) | ast.For(iter=value):
                    self._open(value)
                case ast.comprehension(iter=value):
                    self._open(value)
                case ast.Call(ast.Name("getattr" | "hasattr"), [value, ast.Constant(str(name)), *_]):
                    self._read(value, name)
                case ast.Call(ast.Name("getattr"), [value, *_]):
                    self._open(value)
                case ast.Call(ast.Name("isinstance"), [value, kinds]) if "Linear" in ast.unparse(kinds):
                    self._read(value, "__class__")
                case ast.Call(ast.Name("type"), [value]):
                    self._read(value, "__class__")
                case ast.Call(ast.Name(name), values) if name in _ITERATORS:
                    for value in values:
                        self._open(value)

    def _read(self, value: ast.expr, name: str) -> None:
        for module in self._modules(value):
            if module is self.module:
                continue
            if name in module._modules or name in _LISTINGS:
                self.found.opened.add(id(module))
            else:
                self.found.reads[id(module)].setdefault(name, self.where)

    def _open(self, value: ast.expr) -> None:
        self.found.opened.update(id(module) for module in self._modules(value))

    def _bind(self, node: ast.AST) -> None:
        match node:
            case ast.Assign(targets, value):
                for target in targets:
                    self._name(target, self._modules(value))
            case ast.AnnAssign(target, value=ast.expr() as value) | ast.NamedExpr(target, value):
                self._name(target, self._modules(value))
            case ast.For(target, value) | ast.comprehension(target, value):
                self._name(target, _members(self._modules(value)))

    def _name(self, target: ast.expr, modules: list[nn.Module]) -> None:
        for node in ast.walk(target):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                known = self.local.setdefault(node.id, [])
                known += [m for m in modules if not any(m is k for k in known)]

    def _modules(self, value: ast.expr) -> list[nn.Module]:
        """The modules that an expression may be, or, if it is a listing, whose members it lists."""
        match value:
            case ast.Name(name):
                return self.local.get(name, [])
            case ast.Attribute(inner, name) if name in _LISTINGS:
                return self._modules(inner)
            case ast.Attribute(inner, name):
                return self._named(inner, name)
            case ast.Subscript(inner):
                modules = self._modules(inner)
                # a slice is a container of the same members
                return (modules if isinstance(value.slice, ast.Slice) else []) + _members(modules)
            case ast.Call(ast.Name("getattr"), [inner, ast.Constant(str(name)), *_]):
                return self._named(inner, name)
            case ast.Call(ast.Name("getattr"), [inner, *_]):
                return _members(self._modules(inner))
            case ast.Call(ast.Name(name), values) if name in _ITERATORS:
                return self._all(values)
            case ast.Call(ast.Attribute(_, name) as function) if name in _LISTINGS:
                return self._modules(function)
            case ast.IfExp(_, one, other):
                return self._all([one, other])
            case ast.BoolOp(_, values) | ast.Tuple(values) | ast.List(values):
                return self._all(values)
            case ast.NamedExpr(_, inner) | ast.Starred(inner):
                return self._modules(inner)
        return []

    def _all(self, values: Iterable[ast.expr]) -> list[nn.Module]:
        return [module for value in values for module in self._modules(value)]

    def _named(self, value: ast.expr, name: str) -> list[nn.Module]:
        children = (module._modules.get(name) for module in self._modules(value))
        return [child for child in children if child is not None]


def _members(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return [child for module in modules for child in module.children()]

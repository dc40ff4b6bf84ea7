"""Check the shapes and types of arrays at every annotated function of a package while its tests run.

`jaxtyping.install_import_hook` would check every argument of every function, with a wrapper around each: protocols that are not
checkable at run time stop it, and a function that is made anew at every call is wrapped anew. Here only annotations of arrays are
checked (mypy holds the others), of functions and methods of modules and classes, and of the fields of dataclasses.

A check costs more than many of the functions that it is put around, so a process checks the first FIRST calls of every function and
then every EVERY-th one. With BITPRESS_TESTS=release, which `make test-release` sets, it checks every call.
"""

import ast
import dataclasses
import functools
import importlib.machinery
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from types import CodeType, ModuleType
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray, jaxtyped

__all__ = ["EVERY", "FIRST", "check_arrays", "install"]

FIRST = 32
EVERY = 101  # a prime, so that calls which come in turns of some number are all met

_MARK = "_check_arrays"


def _mentions_array(annotation: Any) -> bool:
    if inspect.isclass(annotation) and issubclass(annotation, AbstractArray):
        return True
    return any(_mentions_array(part) for part in get_args(annotation))


def _check_function(function: Callable[..., Any], every: int) -> Callable[..., Any]:
    """Return the function with the arrays of some calls checked, the same function where it takes and returns none."""
    arrays = {name: annotation for name, annotation in function.__annotations__.items() if _mentions_array(annotation)}
    if not arrays:
        return function
    calls = 0
    checked: Callable[..., Any] | None = None

    @functools.wraps(function)
    def sampled(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls, checked
        calls += 1
        if calls > FIRST and calls % every:
            return function(*args, **kwargs)
        if checked is None:  # made at the first call: most functions of the package are not called by one process
            everything = function.__annotations__
            function.__annotations__ = arrays  # of these alone the check is made
            checked = jaxtyped(function, typechecker=beartype)
            function.__annotations__ = everything
        return checked(*args, **kwargs)

    return sampled


def check_arrays(item: Any, every: int | None = None) -> Any:
    """Return a function whose arrays are checked when it is called, or a dataclass whose arrays are checked when it is made."""
    if every is None:
        every = 1 if os.environ.get("BITPRESS_TESTS") == "release" else EVERY
    if not inspect.isclass(item):
        return _check_function(item, every)
    if dataclasses.is_dataclass(item) and "__init__" in vars(item):
        item.__init__ = _check_function(item.__init__, every)
    return item


class _Marker(ast.NodeTransformer):
    """Decorate classes, and functions outside of functions."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.decorator_list.append(_at(node))  # innermost: a property or a cache is put around what is checked
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        node.decorator_list.insert(0, _at(node))  # outermost: a dataclass has its __init__ by then
        self.generic_visit(node)
        return node


def _at(node: ast.stmt) -> ast.Name:
    return ast.copy_location(ast.Name(_MARK, ast.Load()), node)


class _Loader(importlib.machinery.SourceFileLoader):
    def path_stats(self, path: str) -> Any:
        raise OSError  # no bytecode is read or kept: that of unchecked modules lies at the same place

    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> CodeType:
        return compile(_Marker().visit(ast.parse(data, path)), path, "exec", dont_inherit=True, optimize=_optimize)

    def exec_module(self, module: ModuleType) -> None:
        vars(module)[_MARK] = check_arrays
        super().exec_module(module)


class _Finder(MetaPathFinder):
    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if name != self.package and not name.startswith(f"{self.package}."):
            return None
        for finder in sys.meta_path:
            if finder is self or (spec := finder.find_spec(name, path, target)) is None:
                continue
            # The finder of an editable install wraps its loaders: what counts is that there is a source file.
            if spec.origin is not None and spec.origin.endswith(".py"):
                spec.loader = _Loader(name, spec.origin)
            return spec
        return None


def install(package: str) -> None:
    """Check the arrays of every module of the package that is imported from now on."""
    assert package not in sys.modules, f"{package} was imported before its checks were installed"
    sys.meta_path.insert(0, _Finder(package))

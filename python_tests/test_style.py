"""What no tool checks: short functions, short test files, a stub that is true to the extension."""

import ast
from pathlib import Path

from msn_ext import _C

ROOT = Path(__file__).resolve().parent.parent
LONGEST_FUNCTION, LONGEST_TEST = 60, 600  # lines; a docstring is none of a function's


def long_functions(source: str) -> list[str]:
    """Return the functions of more lines than :data:`LONGEST_FUNCTION`, and how many, but for those
    with a comment right before them, which is to say why.
    """
    lines, found = source.splitlines(), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            count = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                count -= node.body[0].end_lineno - node.body[0].lineno + 1
            first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
            reason = first > 1 and lines[first - 2].lstrip().startswith("#")
            if count > LONGEST_FUNCTION and not reason:
                found.append(f"{node.name} has {count} lines")
    return found


def test_functions_are_short_or_say_why():
    found = {
        str(file.relative_to(ROOT)): functions
        for file in (ROOT / "msn_ext").rglob("*.py")
        if (functions := long_functions(file.read_text(encoding="utf-8")))
    }
    assert found == {}


def test_a_long_function_is_found():
    def function(lines: int, head: str = "") -> str:
        return f"x = 1\n{head}def f():\n    '''a\n    b'''\n" + "    x = 1\n" * (lines - 1)

    assert long_functions(function(60)) == []
    assert long_functions(function(61)) == ["f has 61 lines"]
    assert long_functions(function(61, "@cache\n")) == ["f has 61 lines"]
    assert long_functions(function(61, "# one table\n@cache\n")) == []


def test_test_files_are_short():
    lines = {
        str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines())
        for file in (ROOT / "python_tests").rglob("*.py")
    }
    assert len(lines) > 20
    assert {name: count for name, count in lines.items() if count > LONGEST_TEST} == {}


def arguments_of(body: list[ast.stmt]) -> dict[str, int]:
    """Return the functions of a stub's body, and how many positional arguments each has."""
    return {
        node.name: len(node.args.posonlyargs) for node in body if isinstance(node, ast.FunctionDef)
    }


def expect_arguments(stub: dict[str, int], compiled: dict[str, object]) -> None:
    for name, count in stub.items():
        # pybind11 writes "name(arg0: T, ...) -> T", and "self: C" before a method's.
        signature = compiled[name].__doc__.splitlines()[0]
        assert signature.count("arg") + signature.count("(self") == count, signature


def test_the_stub_has_what_the_extension_has():
    """Every function and method with as many arguments, every constant with its type."""
    stub = ast.parse((ROOT / "msn_ext" / "_C.pyi").read_text(encoding="utf-8"))
    arguments = arguments_of(stub.body)
    classes = {node.name: node for node in stub.body if isinstance(node, ast.ClassDef)}
    constants = {
        node.target.id: ast.unparse(node.annotation)
        for node in stub.body
        if isinstance(node, ast.AnnAssign)
    }
    public = {name: value for name, value in vars(_C).items() if not name.startswith("_")}
    assert {*arguments, *constants, *classes} == {*public}
    expect_arguments(arguments, public)
    for name, node in classes.items():
        methods = vars(public[name])
        named = {name for name in methods if name == "__init__" or not name.startswith("_")}
        assert {*arguments_of(node.body)} == named
        expect_arguments(arguments_of(node.body), methods)
    for name, annotation in constants.items():
        value = public[name]
        kind = type(value).__name__
        if kind == "tuple":
            kind = f"tuple[{type(value[0]).__name__}, ...]"
        assert annotation == f"Final[{kind}]", name

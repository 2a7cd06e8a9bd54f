"What an editor and a type checker see: every public method with its signature, and no error."

import ast
import subprocess
import sys
from pathlib import Path

import jedi
import pytest
from test_repository import FILES, ROOT

CLASSES = {
    "ibllm.model.ImageBindLLM": (
        "answer card chat embed enhance forward from_pretrained gated_values generate "
        "gradient_checkpointing_enable prepare "
        "push_to_hub request save_pretrained stream tokenize train"
    ),
    "ibllm.cache.VisualCache": "build check_encoder enhance load retrieve save search to",
    "ibllm.inputs.processor.Processor": "from_pretrained save_pretrained",
    "ibllm.encoders.ImageBind": "each_clip encode forward prenorm released tower",
    "ibllm.explorer.widgets.Explorer": "ask request start stop",
}


@pytest.mark.parametrize("path", CLASSES, ids=lambda path: path.split(".")[-1])
def test_a_completer_lists_every_public_method_with_its_signature(path):
    module, name = path.rsplit(".", 1)
    code = f"from {module} import {name}\n{name}."
    found = {one.name: one for one in jedi.Script(code).complete(2, len(name) + 1)}
    for method in CLASSES[path].split():
        [signature] = found[method].get_signatures()
        assert signature.params or method == "stop", method


def public_methods(path):
    "The public methods that the class at `path` defines itself, read from the file."
    module, name = path.rsplit(".", 1)
    file = FILES[module.removeprefix("ibllm.")]
    [found] = [
        node
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == name
    ]
    methods = [node for node in found.body if isinstance(node, ast.FunctionDef)]
    properties = [
        node.name
        for node in methods
        if any(
            "property" in ast.unparse(one) or "setter" in ast.unparse(one)
            for one in node.decorator_list
        )
    ]
    return {node.name for node in methods if node.name[0] != "_"} - set(properties)


@pytest.mark.parametrize("path", CLASSES, ids=lambda path: path.split(".")[-1])
def test_no_public_method_is_left_out_of_that_list(path):
    assert public_methods(path) == set(CLASSES[path].split())


def test_no_method_is_patched_in():
    assert not [room for room, file in FILES.items() if "@patch" in file.read_text()]


def unannotated(path):
    "Functions of a file with a parameter or a return value that is not annotated."
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.FunctionDef):
            continue
        given = node.args
        every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
        named = [one for one in every if one is not None and one.arg not in ("self", "cls")]
        returns = node.returns is not None or node.name == "__init__"
        if not returns or any(one.annotation is None for one in named):
            yield node.name


@pytest.mark.parametrize("room", [room for room in FILES if room])
def test_every_function_is_annotated(room):
    assert not list(unannotated(FILES[room]))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_type_checker_finds_nothing():
    checker = Path(sys.executable).with_name("basedpyright")
    done = subprocess.run([checker, "--level", "error"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "ibllm" / "py.typed").exists()

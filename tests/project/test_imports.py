"""The package's modules import one another in one direction: each can be read with those below it alone."""

import ast
import graphlib
from pathlib import Path

import zclip_optim

PACKAGE = Path(zclip_optim.__file__).parent


def imports_of(file):
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf8")))
    return {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


def test_the_graph_of_imports_has_no_circle():
    names = {f: ".".join(f.relative_to(PACKAGE.parent).with_suffix("").parts) for f in PACKAGE.rglob("*.py")}
    names = {file: name.removesuffix(".__init__") for file, name in names.items()}
    graph = {name: imports_of(file) & set(names.values()) for file, name in names.items()}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index("zclip_optim.algorithm") < order.index("zclip_optim.clipper") < order.index("zclip_optim")

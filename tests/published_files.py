"""What the Python files of a saved model may import."""

import ast
import sys


def check_imports(files):
    """Only the standard library, torch, transformers and each other: what everyone has who loads the model."""
    allowed = set(sys.stdlib_module_names) | {"torch", "transformers"}
    names = {file.name for file in files}
    assert names
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, file.name
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] in allowed, file.name
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1 and f"{node.module}.py" in names, file.name

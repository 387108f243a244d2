"""What the tests promise, as sentences: python -m tests.promises"""

import ast
from pathlib import Path


def main() -> None:
    folder = Path(__file__).parent
    for file in sorted(folder.rglob("test_*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        print(f"\n{file.relative_to(folder)}: {(ast.get_docstring(tree) or '').splitlines()[0]}")
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                print(f"  - {node.name.removeprefix('test_').replace('_', ' ')}")


if __name__ == "__main__":
    main()

"""The oldest Python that setup.py promises can read the code, whichever Python runs the tests."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What the standard library and its modules have only since 3.11 or 3.12, as far as its name is unmistakable.
NEWER = {"tomllib", "StrEnum", "UTC", "ExceptionGroup", "BaseExceptionGroup", "TaskGroup", "file_digest", "add_note", "batched"}
NEWER |= {"assert_never", "LiteralString", "Self", "TypeVarTuple", "Unpack", "NotRequired", "sumprod"}


def newer(source: str, name: str, oldest: tuple[int, int]) -> list[str]:
    """What `source` uses that Python `oldest` lacks: its first error of syntax, or lines with newer names."""
    try:
        tree = ast.parse(source, name, feature_version=oldest)
    except SyntaxError as error:
        return [f"{name}:{error.lineno}: {error.msg}"]
    found = []
    for node in ast.walk(tree):
        names = {getattr(node, "id", None), getattr(node, "attr", None), getattr(node, "module", None)}
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.name for alias in node.names}
        found += [f"{name}:{node.lineno}: {used}" for used in names & NEWER]
    return found


def test_nothing_is_newer_than_the_oldest_python():
    oldest = tuple(map(int, re.search(r'python_requires=">=(\d+)\.(\d+)"', (ROOT / "setup.py").read_text()).groups()))
    files = [ROOT / "setup.py", *(f for folder in ("protomem", "tests", "benchmarks") for f in (ROOT / folder).rglob("*.py"))]
    assert len(files) > 100
    assert [line for f in files for line in newer(f.read_text(), str(f), oldest)] == []
    assert newer("try:\n    pass\nexcept* OSError:\n    pass\n", "a", (3, 10)) != []
    assert newer("from datetime import UTC\n", "a", (3, 10)) == ["a:1: UTC"]

"""The embedded corpus: English documentation, docstrings and source code that come with Python itself.

It needs no network and a few seconds: about 10 MB of real text on Python 3.11. Three kinds of documents:

- every topic of pydoc (the language reference behind `help("if")`),
- for every module of the standard library, its docstrings (read with `ast`, nothing is imported),
- for every module, its source code with the docstrings cut out, so that no text appears twice.

docs/data.md lists what is left out. Documents are ordered by a hash of their name, so that any first part of the corpus
(--max-bytes) is a fair sample of the whole.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import hashlib
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlra_scale.data import DataError
from mlra_scale.data.files import BEYOND, NotRead, file_counts
from mlra_scale.data.manifest import sha256_of_lines
from mlra_scale.data.readers import Texts
from mlra_scale.data.tally import Place, Tally

PYTHON_DOCS = "python-docs"
"""The name of this source."""

_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"}
Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class PythonCorpus:
    """The embedded corpus, a Source. A unit is a document: it is made when first read, and kept for the next pass.

    All of it takes 10 MB of memory.
    """

    name = PYTHON_DOCS
    kind = "embedded"

    def __init__(self) -> None:
        self.modules = _modules()
        self._texts = {f"topic {name}": text for name, text in _topics().items()}
        sizes = {name: path.stat().st_size for name, path in self.modules.items()}
        self.total_bytes: int | None = sum(sizes.values()) + sum(map(len, self._texts.values()))
        self._broken = set[str]()
        names = [*self._texts, *(f"{kind} {name}" for name in self.modules for kind in ("docstrings", "source"))]
        self._names = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
        self.state = sha256_of_lines([*self._names, *(f"{name} {size}" for name, size in sizes.items())])

    def portions(self, after: Place | None = None) -> Iterator[tuple[Place, Texts]]:
        """Yields the documents in their fixed order."""
        for unit in range(0 if after is None else after.unit + 1, len(self._names)):
            name = self._names[unit]
            text = self._text(name)
            kind, item = name.split(" ", 1)
            size = len(text)
            if kind == "source":
                size = self.modules[item].stat().st_size - len(self._texts[f"docstrings {item}"])
            yield Place(unit, 0), Texts([text], size) if text.strip() else Texts((), 0)

    def _text(self, name: str) -> str:
        item = name.split(" ", 1)[1]
        if name not in self._texts:
            # Both at once: parsing is what costs.
            parsed = module_texts(item, self.modules[item])
            if parsed is None:
                self._broken.add(item)
            english, code = parsed or ("", "")
            self._texts |= {f"docstrings {item}": english, f"source {item}": code}
        return self._texts[name]

    def files(self, tally: Tally) -> dict[str, Any]:
        """Returns what became of the modules in a pass."""
        visited = {name.split(" ", 1)[1] for name in self._names[: tally.units] if not name.startswith("topic ")}
        for name in self._names[: tally.units]:  # an earlier process may have read the first ones
            self._text(name)
        beyond = [NotRead(name, BEYOND) for name in self.modules if name not in visited]
        broken = [NotRead(name, "not Python source of this version") for name in sorted(self._broken & visited)]
        return file_counts(len(self.modules) - len(beyond) - len(broken), (), [*broken, *beyond])


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some systems ship it in a package of its own
        return {}
    return topics


def _modules() -> dict[str, Path]:
    """Returns the file, by dotted name, of every module of the standard library that belongs to the corpus."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _LEFT_OUT.intersection(parts) or parts[0].startswith(("config-", "_sysconfigdata")):
            continue
        if parts[0] == "encodings" and re.search("decoding_(table|map)", path.read_text(encoding="utf-8")):
            continue
        found[".".join(parts)] = path
    if not found:
        raise DataError(f"this Python has no standard library sources in {root}; name another --source")
    return found


def module_texts(name: str, path: Path) -> tuple[str, str] | None:
    """Splits the module with dotted name `name` into English and code.

    Returns:
        (docstrings under their dotted names, source without docstrings); None for a file that does not parse.
    """
    try:
        with tokenize.open(path) as stream:  # honours the file's encoding declaration
            source = stream.read()
        with _no_garbage_collection():
            tree = ast.parse(source)
            documented = [(qualified, node) for qualified, node in _definitions(tree, name) if _has_docstring(node)]
            english = "\n".join(f"{qualified}\n\n{ast.get_docstring(node)}\n" for qualified, node in documented)
            return english, _without_docstrings(source, [node for _, node in documented])
    except (SyntaxError, ValueError):  # ValueError: null bytes, or bytes that are not of the declared encoding
        return None


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Stops the cyclic garbage collector for the time of one module.

    The many nodes of a syntax tree start full collections, which take several times as long as the parsing in a process
    that has imported torch.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _definitions(node: ast.AST, qualified: str) -> Iterator[tuple[str, Definition]]:
    """Yields the node and all classes and functions below it with their dotted names, in the order of the source."""
    if isinstance(node, Definition):
        yield qualified, node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _definitions(child, f"{qualified}.{child.name}")
        elif isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):  # expressions define nothing
            yield from _definitions(child, qualified)


def _has_docstring(node: Definition) -> bool:
    return ast.get_docstring(node, clean=False) is not None


def _without_docstrings(source: str, documented: list[Definition]) -> str:
    lines = [line + "\n" for line in source.split("\n")]  # not splitlines: form feeds are no line ends to ast
    for node in documented:
        text = node.body[0]
        first, last = text.lineno - 1, (text.end_lineno or text.lineno) - 1
        before = lines[first].encode()[: text.col_offset]
        after = lines[last].encode()[text.end_col_offset :]
        if before.strip() or after.strip():
            continue  # it shares its line with code: rare, and left as it is
        # A body of nothing but a docstring keeps a placeholder, so that the result is still Python.
        lines[first] = before.decode() + "...\n" if len(node.body) == 1 and not isinstance(node, ast.Module) else ""
        for line in range(first + 1, last + 1):
            lines[line] = ""
    return "".join(lines).strip("\n") + "\n"

"""The embedded corpus: large enough, English and code, nothing twice, nothing foreign, the same every time."""

from __future__ import annotations

import ast
import gc
from pathlib import Path

import pytest

from mlra_scale.data.corpus_python import PythonCorpus, module_texts
from mlra_scale.data.files import NotRead, file_counts
from mlra_scale.data.sources import texts_of
from mlra_scale.data.tally import Tally


@pytest.fixture(scope="module")
def corpus() -> PythonCorpus:
    return PythonCorpus()


def test_it_is_megabytes_of_text_in_a_fixed_order(corpus: PythonCorpus) -> None:
    documents = list(texts_of(corpus))
    size = sum(map(len, documents))
    assert 5e6 < size < 40e6 and len(documents) > 500
    assert all(text.strip() for text in documents)
    assert corpus.total_bytes is not None
    assert 0.9 < sum(portion.consumed for _, portion in corpus.portions()) / corpus.total_bytes < 1.01
    for text, other in zip(documents[:50], texts_of(PythonCorpus()), strict=False):
        assert text == other
    places, portions = zip(*corpus.portions(), strict=True)
    for index in (0, len(places) // 2, len(places) - 1):
        assert [portion for _, portion in corpus.portions(places[index])] == [*portions[index + 1 :]]
    # A prefix is a fair sample: the first tenth has all three kinds.
    head = "\n".join(documents[: len(documents) // 10])
    assert "def " in head and "import " in head


def test_what_is_in_and_what_is_left_out(corpus: PythonCorpus) -> None:
    names = set(corpus.modules)
    assert {"argparse", "json.decoder", "collections.__init__", "encodings.aliases"} <= names
    left_out = ("site-packages", "test.", "unittest.test.", "pydoc_data", "_sysconfigdata", "idlelib.idle_test")
    assert not [name for name in names if name.startswith(left_out) or ".tests." in name]
    assert "encodings.cp1252" not in names  # a generated table
    assert any(name.startswith("topic ") for name in corpus._texts)


def test_docstrings_and_source_share_nothing(tmp_path: Path) -> None:
    path = tmp_path / "example.py"
    path.write_text(
        "\"\"\"Module text.\n\nMore.\"\"\"\nimport os\n\n\nclass Thing:\n    '''Class text.'''\n\n    def only(self):\n"
        '        """Only\n        text."""\n\n    def shared(self): "kept"; return 1\n\n'
        'def plain(x):\n    """Caf\u00e9 text."""\n    # a comment\n    return x  # \x0c form feed\n'
    )
    texts = module_texts("example", path)
    assert texts is not None
    english, code = texts
    assert english.split("\n\n")[0] == "example"
    for heading in (
        "example\n\nModule text.\n\nMore.\n",
        "example.Thing\n\nClass text.",
        "example.Thing.only\n\nOnly\ntext.",
    ):
        assert heading in english
    assert "example.plain\n\nCaf\u00e9 text." in english
    assert "text" not in code and "# a comment" in code and "form feed" in code and '"kept"' in code
    tree = ast.parse(code)
    assert [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, ast.ClassDef)] == [None]
    assert [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)] == ["plain", "only", "shared"]


def test_real_modules_stay_python_without_their_docstrings(corpus: PythonCorpus) -> None:
    for name in ("argparse", "typing", "turtle", "_pydecimal", "email.message"):
        texts = module_texts(name, corpus.modules[name])
        assert texts is not None
        english, code = texts
        ast.parse(code)
        assert len(english) > 5000 and english[200:400] not in code


def test_a_module_that_does_not_parse_is_left_out_and_counted(tmp_path: Path) -> None:
    source, path = PythonCorpus(), tmp_path / "bad.py"
    modules = source.modules
    for name in set(modules) - {"argparse", "this"}:
        del modules[name]
    source._names = [f"{kind} {name}" for name in modules for kind in ("docstrings", "source")]
    modules["argparse"] = path
    path.write_text("def (:\n")
    assert len(list(texts_of(source))) == 1
    assert source.files(Tally(units=len(source._names))) == file_counts(
        1, (), [NotRead("argparse", "not Python source of this version")]
    )
    path.write_bytes(b'# coding: ascii\n"""caf\xe9"""\n')
    assert module_texts("bad", path) is None
    assert gc.isenabled()

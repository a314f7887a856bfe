"""The licences of the packages that an installation brings: the table of docs/licences.md.

    python -m tests.licences        reads the metadata of what is installed here and writes the table anew

The packages are those of locks/cpu-py311.txt; NVIDIA's, which torch's CUDA build adds, are named in the text.
"""

import importlib.metadata
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "licences.md"
LOCK = ROOT / "locks" / "cpu-py311.txt"
BEGIN, END = "<!-- written by python -m tests.licences -->\n", "<!-- end -->\n"
STRONG_COPYLEFT = re.compile(r"\b(?:A?GPL|GNU (?:Affero )?General Public)", re.IGNORECASE)
"""Licences under which this project could not be passed on together with a package; LGPL and MPL are none."""
_LONGEST = 80


def locked() -> list[str]:
    """The packages of the lock file."""
    return re.findall(r"^([a-z0-9-]+)(?:==| @)", LOCK.read_text(), re.MULTILINE)


def licence_of(package: str) -> str | None:
    """The licence in a package's metadata; None where it is not installed.

    Raises:
        ValueError: The metadata have none.
    """
    try:
        metadata = importlib.metadata.metadata(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    classifiers = [
        line.rpartition(" :: ")[2].removesuffix(" License")
        for line in metadata.get_all("Classifier", [])
        if line.startswith("License :: ") and line != "License :: OSI Approved"
    ]
    text = "".join(metadata.get_all("License", [])).strip()
    short = text if len(text) <= _LONGEST and "\n" not in text else ""
    expression = "".join(metadata.get_all("License-Expression", []))
    found = expression or ", ".join(sorted(classifiers)) or short
    if not found:
        raise ValueError(f"{package}: no licence in its metadata")
    return found


def written() -> dict[str, str]:
    """The table as it stands in the document: package to licence."""
    text = DOCUMENT.read_text(encoding="utf-8")
    lines = text[text.index(BEGIN) + len(BEGIN) : text.index(END)].splitlines()[2:]
    return dict((cell.strip().strip("`") for cell in line.strip("|").split("|")) for line in lines)  # type: ignore[misc]


def main() -> int:
    """Writes the table."""
    found = {package: licence_of(package) for package in locked()}
    missing = [package for package, licence in found.items() if licence is None]
    if missing:
        print(f"not installed here: {', '.join(missing)}", file=sys.stderr)
        return 1
    rows = "".join(f"| `{package}` | {licence} |\n" for package, licence in found.items())
    text = DOCUMENT.read_text(encoding="utf-8")
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    DOCUMENT.write_text(f"{text[:begin]}| package | licence |\n| --- | --- |\n{rows}{text[end:]}", encoding="utf-8")
    print(f"{DOCUMENT.relative_to(ROOT)}: {len(found)} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())

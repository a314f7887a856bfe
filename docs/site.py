"""What mkdocs needs to make a site of documents that are written for the repository; mkdocs.yml names this file.

The project's README.md is the first page, and the other documents of its root are pages too. A link to a file that is
no page (source code, a test, a study's YAML) leads to a page that shows that file. A link to what does not exist stays
as it is, and mkdocs, which is strict, ends with an error.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md"} | {name: name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")}
"""Documents of the project's root, and what they are called in the site."""
LANGUAGES = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".json": "json", ".toml": "toml"}
_LINK = re.compile(r"(?<=\]\()([^)#\s:]+)(?=[)#])")
_SHOWN = "source"
_COPIED = (".png", ".svg", ".json")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the documents of the root, and a page for every file that a document links to."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    shown = {
        target
        for file in files.documentation_pages()
        for link in _LINK.findall(file.content_string)
        if (target := target_of(repository_path(file.src_uri), link)) is not None and is_shown(target)
    }
    for target in sorted(shown):
        content = (
            f"# {target}\n\n~~~~{LANGUAGES.get(Path(target).suffix, 'text')}\n{(ROOT / target).read_text()}\n~~~~\n"
        )
        file = File.generated(config, shown_page(target), content=content)
        file.inclusion = type(file.inclusion).NOT_IN_NAV
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links between files of the repository into links between pages of the site."""
    here = page.file.src_uri
    if here.startswith(f"{_SHOWN}/"):
        return markdown
    return _LINK.sub(lambda match: site_link(here, match[1]), markdown)


def site_link(here: str, link: str) -> str:
    """The link on the page `here` of the site for what is a link on that page in the repository."""
    target = target_of(repository_path(here), link)
    if target is None:
        return link
    page = shown_page(target) if is_shown(target) else PAGES.get(target, target.removeprefix("docs/"))
    return posixpath.relpath(page, posixpath.dirname(here) or ".")


def repository_path(page: str) -> str:
    """The file in the repository that is a page of the site."""
    return {site: name for name, site in PAGES.items()}.get(page, f"docs/{page}")


def target_of(document: str, link: str) -> str | None:
    """The file of the repository that a document links to; None if there is none."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(document), link))
    return target if (ROOT / target).is_file() and not target.startswith("..") else None


def is_shown(target: str) -> bool:
    """True for a file that is no page and is not copied as it is, and so gets a page that shows it."""
    return not (target in PAGES or (target.startswith("docs/") and target.endswith((".md", *_COPIED))))


def shown_page(target: str) -> str:
    """The page that shows a file; a dot in front, or an index, would be a page of another kind."""
    return f"{_SHOWN}/{target.lstrip('.')}.md"

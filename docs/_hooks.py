"""What mkdocs does for aneuron's site besides: files of the repository become pages, and links go to these.

Pages link to files as they lie in the repository, where the links work too: from README.md to docs/tutorial.md, from a
guide to ../../examples/docsearch.py. In the site README.md is the first page, and what is linked has a page of its own.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "SECURITY.md": "project/security.md",
    "benchmarks/README.md": "benchmarks/method.md",
}
LANGUAGES = {".py": "python", ".json": "json", ".sh": "bash", ".toml": "toml", ".yaml": "yaml", ".yml": "yaml"}
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")
LOADS = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=.?https?://[^>]*>")
FENCED = re.compile(r"^(```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_files(files, config):
    """Add a page for each file of the repository that a page links to, and for those that these link to."""
    sources = {page: path for path, page in PAGES.items()}
    todo = [*PAGES, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    seen = set(todo)
    while todo:
        path = todo.pop()
        if not path.startswith("docs/"):
            sources[_page(path)] = path
        if path.endswith(".md"):
            found = {target for target in _links(path) if target not in seen}
            seen |= found
            todo += found
    for page, path in sources.items():
        files.append(File.generated(config, page, content=_content(path)))
    config.extra["sources"] = sources
    return files


def on_page_markdown(markdown, page, config, files):
    """Let links to files of the repository go to their pages."""
    uri = page.file.src_uri
    path = config.extra["sources"].get(uri, f"docs/{uri}")
    here = posixpath.dirname(uri)

    def link(match):
        target = _target(path, match[2])
        if target is None:
            return match[0]
        return f"{match[1]}{posixpath.relpath(_page(target), here or '.')}{match[3] or ''}{match[4]}"

    parts = FENCED.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(link, part) for part in parts)


def on_post_page(output, page, config):
    """Refuse a page that would load something from the network."""
    if found := LOADS.search(output):
        raise PluginError(f"{page.file.src_uri} loads from elsewhere: {found[0]}; put it into docs/assets/")


def _links(path):
    """The files of the repository that a page links to."""
    text = FENCED.sub("", (ROOT / path).read_text())
    return {target for match in LINK.finditer(text) if (target := _target(path, match[2]))}


def _target(path, link):
    """The file of the repository that a link means; None if there is none, which mkdocs then reports."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
    if (ROOT / target).is_dir():
        target = "README.md" if target == "docs" else f"{target}/README.md"
    return target if (ROOT / target).is_file() else None


def _page(path):
    """Where the site has a file of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return PAGES.get(path) or f"files/{path.removesuffix('.md')}.md"


def _content(path):
    text = (ROOT / path).read_text()
    if path.endswith(".md"):
        return text
    return f"# {path}\n\n```{LANGUAGES.get(Path(path).suffix, 'text')}\n{text}```\n"

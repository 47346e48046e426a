"""Lays out the pages of the documentation site in build/docs, where mkdocs.yml expects them.

    python docs/build.py && mkdocs build --strict      # or: zensical build

`make docs` does both. The pages are those of docs/ and the reference. What they link to outside of docs/ (a recipe, a
source file, the README) becomes a page below files/, so that the same link works in the repository and on the site.
"""

import json
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".sh": "bash"}
CODE = re.compile(r"(^ *```.*?^ *```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)  # blocks and spans, which have no links
LINK = re.compile(r"(\]\()([^)\s]+)(\))")


def build(target: Path) -> None:
    """Writes all pages to `target`, which is emptied before.

    Raises:
        ValueError: a link leads nowhere, or out of the repository.
    """
    from reference import reference  # beside this file; the whole package is imported with it

    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    wanted: list[Path] = []  # paths outside of docs/ that a page links to
    for page in sorted((ROOT / "docs").glob("*.md")):
        (target / page.name).write_text(with_links(page.read_text("utf-8"), page, page.name, wanted), "utf-8")
    for picture in (ROOT / "docs").glob("*.png"):
        shutil.copy(picture, target)
    (target / "reference.md").write_text(reference(), "utf-8")
    done: set[Path] = set()
    while wanted:
        path = wanted.pop()
        if path not in done:
            done.add(path)
            place = target / page_of(path)
            place.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".png":
                shutil.copy(path, place)
            else:
                place.write_text(with_links(as_page(path), path, page_of(path), wanted), "utf-8")


def page_of(path: Path) -> str:
    """Where the page of a file or folder of the repository is on the site."""
    inside = path.relative_to(ROOT)
    if inside.parts[0] == "docs" and inside.suffix in (".md", ".png"):
        return inside.name
    if inside.suffix == ".md":  # in lower case, because README.md would be the index of its folder
        return Path("files", inside.with_name(inside.name.lower())).as_posix()
    if inside.suffix == ".png":
        return f"files/{inside}"
    return f"files/{inside}.md" if path.is_file() else f"files/{inside}/files.md"


def as_page(path: Path) -> str:
    """A file as Markdown: itself, a notebook's cells, the list of a folder's files, or its text as a block of code."""
    name = path.relative_to(ROOT)
    if path.is_dir():
        files = [one for one in sorted(path.iterdir()) if one.suffix in (".md", *LANGUAGES)]
        return f"# {name}\n\n" + "\n".join(f"- [{one.name}]({one.name})" for one in files) + "\n"
    text = path.read_text("utf-8")
    if path.suffix == ".md":
        return text
    if path.suffix == ".ipynb":
        return "\n\n".join(cell_as_markdown(cell) for cell in json.loads(text)["cells"])
    return f"# {name}\n\n```{LANGUAGES.get(path.suffix, 'text')}\n{text.rstrip()}\n```\n"


def cell_as_markdown(cell: dict) -> str:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return source
    parts = [f"```python\n{source}\n```"]
    for output in cell["outputs"]:
        data = output.get("data", {})
        if "image/png" in data:
            parts.append(
                f'<img alt="the output of this cell" src="data:image/png;base64,{data["image/png"].strip()}">'
            )
        elif text := "".join(output.get("text", data.get("text/plain", ""))).strip():
            parts.append(f"```text\n{text}\n```")
    return "\n\n".join(parts)


def with_links(text: str, source: Path, page: str, wanted: list[Path]) -> str:
    """The text of a page with the relative links of `source` as links of `page`."""
    folder = source if source.is_dir() else source.parent
    up = "../" * page.count("/")

    def on_site(found: re.Match[str]) -> str:
        address, _, anchor = found[2].partition("#")
        if not address or re.match(r"[a-z]+:", address):
            return found[0]
        path = (folder / address).resolve()
        if not path.is_relative_to(ROOT) or not path.exists():
            raise SystemExit(f"error: {source.relative_to(ROOT)} links to {address}, which is not in the repository.")
        if page_of(path).startswith("files/"):
            wanted.append(path)
        return f"{found[1]}{up}{page_of(path)}{'#' if anchor else ''}{anchor}{found[3]}"

    parts = CODE.split(text)
    parts[::2] = [LINK.sub(on_site, part) for part in parts[::2]]
    return "".join(parts)


if __name__ == "__main__":
    build(ROOT / "build" / "docs")

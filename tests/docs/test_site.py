"""The site has every page and every public name; links lead to what is there. `make docs` builds it."""

import importlib.util
import re

import pytest
import yaml

import transformers_radio
from helpers.documents import PAGES
from helpers.paths import ROOT


def script(name):
    """A module of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build, reference = script("build"), script("reference")


def pages_in(nav):
    for entry in nav:
        for target in entry.values():
            yield from pages_in(target) if isinstance(target, list) else [target]


def test_the_navigation_has_every_page_once():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(pages_in(nav)) == sorted([*(page.name for page in (ROOT / "docs").glob("*.md")), "reference.md"])


def test_every_public_name_has_an_entry():
    page = reference.reference()
    entries = re.findall(r"^### (\w+)$", page, re.MULTILINE)
    assert len(entries) == len(set(entries))
    assert set(transformers_radio.__all__) <= set(entries)
    assert {"build_teacher", "train", "knn_accuracy", "swap_sam_encoder", "export_student", "run_task"} <= set(entries)
    # a docstring with shapes and sections, a signature, an inherited member, a command, a field of a recipe
    assert "- `pixel_values` (`torch.Tensor` of shape" in page and "**Raises**" in page
    assert "build_teacher(type, checkpoint, image_size=None, dtype='float32', **options)" in page
    assert "#### RadioModel.get_nearest_supported_resolution()" in page
    assert "| `--dry-run`" in page and "stages.NAME.micro_batch_size: int in [1, 1000000] | null" in page


def test_markdown_of_a_docstring():
    text = """One line with `a * b` and 2 * 3 * 4, see [`RadioModel`].

    Args:
        images (`torch.Tensor` of shape `(B, 3)`): In [0, 1],
            on any device.
        size, step: Pixels.

    Returns:
        A <b> of sorts.

    Last.
    """
    assert "\n".join(reference.markdown(text)).split("\n") == [
        r"One line with `a * b` and 2 \* 3 \* 4, see `RadioModel`.",
        "",
        "**Args**",
        "",
        "- `images` (`torch.Tensor` of shape `(B, 3)`): In [0, 1],",
        "    on any device.",
        "- `size, step`: Pixels.",
        "",
        "**Returns**",
        "",
        "A &lt;b> of sorts.",
        "",
        "Last.",
        "",
    ]


def test_links_of_the_repository_become_links_of_the_site():
    source, wanted = ROOT / "docs" / "training.md", []
    text = "[a](data.md#x) [b](../recipes/radio_vit_b16.yaml) [c](../README.md#use) [d](#e) [f](https://g) `[h](i)`"
    assert build.with_links(text, source, "training.md", wanted) == (
        "[a](data.md#x) [b](files/recipes/radio_vit_b16.yaml.md) [c](files/readme.md#use) [d](#e) [f](https://g) "
        "`[h](i)`"
    )
    assert wanted == [ROOT / "recipes/radio_vit_b16.yaml", ROOT / "README.md"]
    page = "files/readme.md"
    assert build.with_links("![a](docs/quickstart.png) [b](docs/data.md)", ROOT / "README.md", page, []) == (
        "![a](../quickstart.png) [b](../data.md)"
    )


@pytest.mark.parametrize("link", ["nothing.md", "../recipes/nothing.yaml", "../../elsewhere.md"])
def test_a_link_that_leads_nowhere_is_an_error(link):
    with pytest.raises(SystemExit, match="is not in the repository"):
        build.with_links(f"[a]({link})", ROOT / "docs" / "data.md", "data.md", [])


def anchors_on_github(page):
    """What GitHub makes of the headings: lower case, without punctuation, with hyphens for spaces."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_anchors_are_there_on_github_too(page):
    """The builders check them by their own rule."""
    for address, anchor in re.findall(r"\]\(([^)\s:#]*)#([^)\s]+)\)", page.read_text(encoding="utf-8")):
        target = page.parent / address if address else page
        assert anchor in anchors_on_github(target), f"{address}#{anchor}"

"""What a release consists of: one version everywhere, a wheel that holds the whole package, a light import."""

import re
import shutil
import subprocess
import sys

import pytest
import yaml

import transformers_radio
from helpers.paths import ROOT
from release import check_dist
from release.check_dist import check_archive, check_wheel

HEAVY = ("torch", "transformers", "timm", "open_clip", "datasets", "accelerate", "matplotlib", "omegaconf", "PIL")


def setup_value(name):
    return re.search(rf'{name}="([^"]+)"', (ROOT / "setup.py").read_text())[1]


def test_one_version_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert setup_value("version") == transformers_radio.__version__ == citation["version"]
    assert re.search(rf"^## {re.escape(transformers_radio.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert (ROOT / "tests" / "saved" / transformers_radio.__version__).is_dir()


def test_the_import_loads_nothing_that_takes_long():
    """`import transformers_radio` is far below the 0.3 s beside `import transformers` that it may take."""
    script = f"import sys, transformers_radio; print([name for name in {HEAVY} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Both archives, built from a copy: building writes into the checkout, and would find what an old build left."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("checkout")
    left_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")
    shutil.copytree(ROOT, folder / "copy", ignore=left_out)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(folder / "copy")]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    return folder / "dist"


def test_the_wheel_holds_the_whole_package_and_stays_small(dist):
    (wheel,) = dist.glob("*.whl")
    check_wheel(wheel)


def test_the_source_archive_holds_recipes_and_documents(dist):
    (archive,) = dist.glob("*.tar.gz")
    check_archive(archive)


def test_what_is_lost_or_too_large_is_named(dist, tmp_path, monkeypatch):
    (wheel,) = dist.glob("*.whl")
    monkeypatch.setattr(check_dist, "LARGEST", 1000)
    with pytest.raises(ValueError, match="bytes, more than 1,000"):
        check_wheel(wheel)
    monkeypatch.setattr(check_dist, "LARGEST", 10**9)
    monkeypatch.setattr(check_dist, "package_files", lambda: {"transformers_radio/lost.yaml"})
    with pytest.raises(ValueError, match="lacks .*lost.yaml.* and has"):
        check_wheel(wheel)


def test_every_extra_that_a_message_names_exists():
    extras = set(re.findall(r'^        "([a-z]+)": [A-Z]+,$', (ROOT / "setup.py").read_text(), re.M))
    assert {"eval", "export", "demo", "teachers", "quickstart", "lora", "fastervit", "lmms", "docs", "dev"} == extras
    texts = [path for place in ("src", "docs", "recipes") for path in (ROOT / place).rglob("*") if path.is_file()]
    named = {
        name
        for path in texts
        if path.suffix in (".py", ".md", ".yaml")
        for name in re.findall(r"transformers_radio\[([a-z]+)\]", path.read_text(encoding="utf-8"))
    }
    assert named and named <= extras

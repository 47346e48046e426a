"""Checks a wheel and a source archive: `python tests/release/check_dist.py DIST`; `make wheel` does."""

import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "transformers_radio"
LARGEST = 20_000_000  # bytes of the wheel
# What a user of the archive needs beside the package
IN_ARCHIVE = ("LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "recipes/radio_vit_b16.yaml", "Makefile")


def package_files() -> set[str]:
    """What the wheel must hold: all files of the package in the checkout."""
    paths = (path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(PACKAGE.parent).as_posix() for path in paths}


def check_wheel(wheel: Path) -> None:
    """Raises ValueError for a wheel that is too large, or holds other files than the package and its metadata."""
    if wheel.stat().st_size > LARGEST:
        raise ValueError(f"{wheel} has {wheel.stat().st_size:,} bytes, more than {LARGEST:,}")
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    lost, strange = package_files() - found, found - package_files()
    if lost or strange:
        raise ValueError(f"{wheel} lacks {sorted(lost)[:5]} and has {sorted(strange)[:5]} in addition; see setup.py")


def check_archive(archive: Path) -> None:
    """Raises ValueError for a source archive without a file that is needed."""
    with tarfile.open(archive) as tar:
        found = {name.partition("/")[2] for name in tar.getnames()}
    lost = {f"src/{name}" for name in package_files()} | set(IN_ARCHIVE)
    if lost := lost - found:
        raise ValueError(f"{archive} lacks {sorted(lost)[:5]}; see MANIFEST.in")


def main(folder: Path) -> None:
    (wheel,), (archive,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    check_wheel(wheel)
    check_archive(archive)
    print(f"{wheel}: {wheel.stat().st_size / 1e6:.1f} MB\n{archive}: {archive.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Whether a folder that one version of transformers has saved opens in all others, with the same outputs.

    make matrix    (python tests/saved/matrix.py [VERSION ...] [--folder .matrix])

Makes an environment for each version of transformers, saves a student of every type with each, and opens what each has
saved in each: as strangers do, with `trust_remote_code` and without this package. The students of earlier releases of
this package (tests/saved/VERSION), which are saved without code, are opened with this package. Prints the largest
difference to what the writer computed, relative to the largest value, and exits with 1 where it is above `TOLERANCE`.

An environment holds transformers and those of its dependencies that differ; all else, torch first of all, is that of
the Python that runs this script.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

TESTS = Path(__file__).parents[1]
VERSIONS = ("5.20.0", "5.22.2", "newest")  # the first is the oldest in setup.py
TOLERANCE = 1e-4  # in float32; processors differ by less
CHILD = Path(__file__).with_name("matrix_child.py")


def oldest() -> str:
    """The lower bound in setup.py."""
    found = re.search(r'"transformers>=([\d.]+)', (TESTS.parent / "setup.py").read_text(encoding="utf-8"))
    assert found is not None
    return found[1]


def make_environment(folder: Path, version: str) -> Path:
    """An environment with this transformers in front of the packages of this Python. Returns its Python."""
    python = folder / "bin" / "python"
    wanted = "transformers<6" if version == "newest" else f"transformers=={version}"
    if not (folder / "complete").exists():
        venv.create(folder, clear=True, with_pip=False)
        packages = next((folder / "lib").glob("python*/site-packages"))
        # A plain line: .pth files in that folder, such as the one of an editable install, have no effect
        (packages / "below.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        upgrade = ["--upgrade", "--upgrade-strategy", "only-if-needed"]
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", *upgrade, wanted]
        subprocess.run(pip, check=True)
        (folder / "complete").touch()
    return python


def run_child(python: Path, job: str, *arguments: str, with_package: bool) -> dict:
    """The last line that matrix_child.py prints, as JSON."""
    paths = [str(TESTS), str(TESTS.parent / "src")] if with_package else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [str(python), str(CHILD), job, *arguments]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{process.stderr}")
    return json.loads(process.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", default=VERSIONS, metavar="VERSION", help=f"Default: {VERSIONS}.")
    parser.add_argument("--folder", type=Path, default=Path(".matrix"), help="Of the environments and what they save.")
    options = parser.parse_args()
    folder, started = options.folder.resolve(), time.monotonic()
    pythons = {version: make_environment(folder / f"transformers-{version}", version) for version in options.versions}
    built = time.monotonic() - started
    found = {}
    for version, python in pythons.items():
        (folder / f"saved-{version}").mkdir(exist_ok=True)
        found[version] = run_child(python, "save", str(folder / f"saved-{version}"), with_package=True)["transformers"]
    releases = sorted(path for path in Path(__file__).parent.iterdir() if path.is_dir() and path.name[0].isdecimal())
    rows: dict[str, dict[str, float | str]] = {}
    for loader, python in pythons.items():
        saved = [str(folder / f"saved-{writer}") for writer in pythons]
        differences = run_child(python, "open", *saved, with_package=False)
        differences |= run_child(python, "open-release", *map(str, releases), with_package=True)
        for name, difference in differences.items():
            rows.setdefault(name, {})[found[loader]] = difference
    print(f"{'opened by transformers':36}" + "".join(f"{version:>12}" for version in found.values()))
    for name, row in rows.items():
        folder_name, _, model_type = name.rpartition("/")
        writer = folder_name.removeprefix("saved-")
        title = f"{model_type} saved by {'transformers ' + found[writer] if writer in found else 'release ' + writer}"
        print(
            f"{title:36}" + "".join(f"{v:>12.1e}" if isinstance(v, float) else f"{'FAILS':>12}" for v in row.values())
        )
    wrong = {(name, version): value for name, row in rows.items() for version, value in row.items()
             if not isinstance(value, float) or not value <= TOLERANCE}  # fmt: skip
    for (name, version), value in wrong.items():
        print(f"{name} in transformers {version}: {value}")
    print(f"{built:.0f} s for the environments, {time.monotonic() - started - built:.0f} s for the matrix")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())

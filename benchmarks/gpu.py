"""What only a GPU can tell, in eight minutes: `python benchmarks/gpu.py [--out DIR] [--only NAME ...] [--seconds N]`.

Six parts, each in a process of its own, so that one that fails, hangs or breaks its device ends neither the script nor
the other parts: it is a row that says why, and the next case begins in a new process. Each row is printed at once; DIR
gets gpu.json (again after every case), gpu.png and what each part wrote. `--dry` runs everything with tiny shapes on
the CPU, in about a minute. The exit code is 1 when a case failed; rows for which there was no time, no memory or no
library do not count as failures.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from queue import Empty, Queue
from typing import Any

FOLDER = Path(__file__).resolve().parent / "gpu_parts"
SECONDS, DRY_SECONDS = 480, 1800  # a dry run takes as long as other programs leave it
FAILED = ("error", "FAIL", "killed", "hung")
PACKAGES = (
    *("torch", "transformers", "timm", "open_clip_torch", "segment-anything", "accelerate", "triton", "flash-attn"),
)
LOG_TAIL = 200  # characters of the last line of a log in a row


@dataclass(frozen=True)
class Part:
    """`module`: a file with `cases(setup)`. `share`: of the seconds; what it leaves over goes to the later parts."""

    name: str
    module: str
    share: float


PARTS = (
    Part("ceilings", "ceilings", 15),
    Part("parity", "parity", 45),
    Part("encoders", "encoders", 115),
    Part("efficient", "efficient", 60),
    Part("training", "training", 135),
    Part("quickstart", "quickstart", 110),
)


@dataclass
class Report:
    """All rows so far, on the screen and in gpu.json."""

    folder: Path
    about: dict[str, Any]
    order: list[str]
    scratch: Path  # of the parts, also of those that are killed
    rows: list[dict[str, Any]] = field(default_factory=list)
    running: "set[Child]" = field(default_factory=set)
    stopped: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, part: str, rows: list[dict[str, Any]]) -> None:
        with self.lock:
            for row in rows:
                row = {"part": part, **row}
                self.rows.append(row)
                print(" | ".join(f"{key} {show(value)}" if key not in ("part", "name", "status") else show(value)
                                 for key, value in row.items()), flush=True)  # fmt: skip
            self.rows.sort(key=lambda row: self.order.index(row["part"]))  # stable: parts may run side by side
            temporary = self.folder / ".gpu.json.transformers_radio.tmp"
            temporary.write_text(json.dumps({**self.about, "rows": self.rows}, indent=1), encoding="utf-8")
            os.replace(temporary, self.folder / "gpu.json")

    def tables(self) -> str:
        """Markdown, a table a part."""
        lines = []
        for part in dict.fromkeys(row["part"] for row in self.rows):
            rows = [row for row in self.rows if row["part"] == part]
            columns = [
                key for key in dict.fromkeys(key for row in rows for key in row) if key not in ("part", "reason")
            ]
            columns += ["reason"] if any("reason" in row for row in rows) else []
            lines += ["", f"## {part}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
            lines += [f"| {' | '.join(show(row.get(key, '')) for key in columns)} |" for row in rows]
        return "\n".join(lines)


def show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Child:
    """A process that runs the cases of a part from number `first` on, and the lines that it tells."""

    def __init__(self, part: Part, first: int, until: float, dry: bool, folder: Path, scratch: Path):
        self.log = folder / f"gpu-{part.name}.log"
        reader, writer = os.pipe()
        command = [sys.executable, str(FOLDER / "child.py"), part.module, f"--first={first}", f"--until={until}"]
        command += [f"--descriptor={writer}", *(["--dry"] if dry else [])]
        paths = [str(FOLDER.parent.parent / "src"), str(FOLDER), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "TMPDIR": str(scratch)}
        environment |= {
            "TQDM_DISABLE": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "TOKENIZERS_PARALLELISM": "false",
            **({"CUDA_VISIBLE_DEVICES": ""} if dry else {}),
        }
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, pass_fds=(writer,), env=environment, start_new_session=True
            )
        os.close(writer)
        self.lines: Queue[str] = Queue()
        threading.Thread(target=self._read, args=(reader,), daemon=True).start()

    def _read(self, reader: int) -> None:
        with os.fdopen(reader) as pipe:
            for line in pipe:
                self.lines.put(line)
        self.lines.put("")  # the end

    def message(self, until: float) -> dict[str, Any] | None:
        """The next message; None when the process has ended.

        Raises:
            TimeoutError: there was none until then.
        """
        try:
            line = self.lines.get(timeout=max(until - time.time(), 0.01))
        except Empty:
            raise TimeoutError from None
        return json.loads(line) if line else None

    def end(self) -> None:
        """Ends it with all that it started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)  # what it has started included
        except ProcessLookupError:
            pass
        self.process.wait()

    def last_line(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip()[-LOG_TAIL:] if lines else ""


def watch(child: Child, first: int, until: float, add: Callable[[list[dict[str, Any]]], None]) -> "Ending":
    """Hands on the rows of a process until it ends, or is to be ended."""
    names: list[str] = []
    limits: list[float] = []
    number, running, limit = first, False, until
    try:
        while (message := child.message(limit)) is not None:
            if "cases" in message:
                names, limits = ([case[i] for case in message["cases"]] for i in (0, 1))
            elif "begin" in message:
                number, running = message["begin"], True
                limit = min(until, time.time() + limits[number])
            else:
                number, running, limit = message["end"] + 1, False, until
                add(message["rows"])
    except TimeoutError:
        if time.time() >= until:
            return Ending(names, number, "no time")
        return Ending(names, number, "hung", f"no answer within {limits[number]:g} seconds")
    code = child.process.wait()
    if running or not names:
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return Ending(names, number, "killed", f"{how}: {child.last_line()}")
    return Ending(names, number, "ok" if code == 0 else "again")


@dataclass(frozen=True)
class Ending:
    """How a process ended. `number`: the case in which it did; with "ok" and "again", the one that would be next."""

    names: list[str]
    number: int
    status: str
    reason: str = ""


def run_part(part: Part, until: float, dry: bool, report: Report) -> None:
    """A row for every case of the part, until it is over or its time is."""
    names: list[str] = []
    first, status = 0, "again"
    while status != "ok" and time.time() < until:
        with report.lock:
            if report.stopped:
                return
            child = Child(part, first, until, dry, report.folder, report.scratch)
            report.running.add(child)
        try:
            ending = watch(child, first, until, lambda rows: report.add(part.name, rows))
        finally:
            report.running.discard(child)
            child.end()
        names, first, status = ending.names or names, ending.number, ending.status
        if status not in ("ok", "again"):
            name = names[first] if names else part.name
            report.add(part.name, [{"name": name, "status": status, "reason": ending.reason}])
            first += 1
        if first >= len(names):
            return
    left = names[first:] if names else [part.name]
    report.add(part.name, [{"name": name, "status": "no time"} for name in left])


def run_parts(parts: list[Part], seconds: float, dry: bool, report: Report) -> None:
    """One after the other; in a dry run, whose times mean nothing, two at once."""
    end = time.time() + seconds

    def run(number: int) -> None:
        shares = sum(part.share for part in parts[number:])
        now = time.time()
        until = end if dry else now + (end - now) * parts[number].share / shares
        try:
            run_part(parts[number], until, dry, report)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            report.add(parts[number].name, [{"name": parts[number].name, "status": "error", "reason": reason}])

    with ThreadPoolExecutor(max_workers=2 if dry else 1) as pool:
        try:
            list(pool.map(run, range(len(parts))))
        except KeyboardInterrupt:
            with report.lock:
                report.stopped = True
                children = list(report.running)
            for child in children:
                child.end()
            shutil.rmtree(report.scratch, ignore_errors=True)
            os._exit(130)  # the threads would go on with the next cases


def about(dry: bool) -> dict[str, Any]:
    """What the numbers hold for."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader"]
    card, driver = "cpu", None
    if not dry:
        try:
            answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
            card, driver, power = (value.strip() for value in answer.splitlines()[0].split(","))
            card += f" ({power})"
        except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
            card = f"unknown ({error})"
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "card": card,
        "driver": driver,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "command": " ".join(["python", *sys.argv]),
        "python": sys.version.split()[0],
        "versions": versions,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of gpu.json and gpu.png")
    names = [part.name for part in PARTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument(
        "--seconds", type=float, help=f"for all parts together ({SECONDS}; of a dry run {DRY_SECONDS})"
    )
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options.out.mkdir(parents=True, exist_ok=True)
    for log in options.out.glob("gpu-*.log"):
        log.unlink()
    started = time.time()
    with tempfile.TemporaryDirectory(prefix="gpu-", ignore_cleanup_errors=True) as scratch:
        report = Report(options.out.resolve(), about(options.dry), names, Path(scratch))
        card, versions = report.about["card"], report.about["versions"]
        print(f"{card}, driver {report.about['driver']}, torch {versions['torch']}", flush=True)
        parts = [part for part in PARTS if part.name in options.only]
        seconds = options.seconds or (DRY_SECONDS if options.dry else SECONDS)
        run_parts(parts, seconds, options.dry, report)
    print(report.tables())
    figure = [sys.executable, str(FOLDER / "figure.py"), str(report.folder / "gpu.json")]
    paths = [str(FOLDER.parent.parent / "src"), os.environ.get("PYTHONPATH", "")]
    drawn = subprocess.run(figure, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}).returncode
    failed = [row for row in report.rows if row["status"] in FAILED]
    took = time.time() - started
    print(f"\n{len(report.rows)} rows, {len(failed)} failed, {took:.0f} seconds; {report.folder}/gpu.json")
    return 1 if failed or drawn else 0


if __name__ == "__main__":
    sys.exit(main())

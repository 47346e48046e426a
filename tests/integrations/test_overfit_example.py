"""examples/overfit_detection.py finds the objects that it trains on."""

import runpy

from helpers.paths import ROOT


def test_the_example_overfits_four_images(capsys):
    example = runpy.run_path(str(ROOT / "examples" / "overfit_detection.py"))
    assert example["main"]([]) == 1
    lines = capsys.readouterr().out.splitlines()
    first, last = (float(line.split()[-1]) for line in (lines[0], lines[-2]))
    assert last < 0.2 * first and lines[-1].startswith("found")

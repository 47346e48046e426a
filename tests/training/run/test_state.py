"""state.json: what earlier versions wrote is read, and written again as they wrote it."""

import json

from transformers_radio.training.run.state import TrainingState

LANE = {"skipped": {"too small": 2, "corrupt": 1}, "next": 3}
RECORDED = {
    "step": 6,
    "stage": "main",
    "streams": {"low": {"lanes": {"0": LANE, "1": LANE}}, "high": {"lanes": {"0": {"skipped": {}, "next": 1}}}},
    "statistics": {"clip": [1368, 3735928559]},
    "schedule": {"last_epoch": 6, "_last_lr": [0.000853553390593274], "lr_lambdas": [None]},
    "processes": 2,
}


def test_a_recorded_state_is_written_again_as_it_was(tmp_path):
    (tmp_path / "training_state").mkdir()
    path = tmp_path / "training_state" / "state.json"
    path.write_text(json.dumps(RECORDED))
    before = path.read_bytes()
    state = TrainingState.read(tmp_path)
    assert (state.step, state.stage, state.processes) == (6, "main", 2)
    assert state.skipped_images() == {"too small": 4, "corrupt": 2}
    state.write(tmp_path)
    assert path.read_bytes() == before


def test_states_of_older_versions_name_no_statistics(tmp_path):
    (tmp_path / "training_state").mkdir()
    older = {key: value for key, value in RECORDED.items() if key != "statistics"}
    (tmp_path / "training_state" / "state.json").write_text(json.dumps(older))
    assert TrainingState.read(tmp_path).statistics is None
    assert TrainingState().statistics == {}  # a run that begins

# Two commands on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
LMMS_VENV ?= .venv-lmms
TEST_PROCESSES ?= 2
STUDENT := $(if $(student),student=$(student))
LONG := stages.main.steps=3600 stages.main.warmup_steps=200
BIN := $(VENV)/bin
export TOKENIZERS_PARALLELISM := false
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help quickstart long seeds ablations backbones teachers test test-slow test-lmms fuzz quality quality-deps docs bench matrix \
	wheel clean
.DEFAULT_GOAL := help

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/installed: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --progress-bar off -e ".[dev]"
	touch $@

quickstart: $(VENV)/installed  ## Train a student (student=eradio, vit or convnext), evaluate it, show the table
	$(BIN)/transformers-radio quickstart $(STUDENT)

long: $(VENV)/installed  ## The quickstart's student after more steps (half an hour), in runs/quickstart/long
	$(BIN)/transformers-radio quickstart output_dir=runs/quickstart/long$(if $(student),-$(student)) $(STUDENT) $(LONG)

seeds: $(VENV)/installed  ## The quickstart over three seeds (about 25 minutes); long=yes: each as long as `make long`
	$(BIN)/python benchmarks/quickstart_seeds.py runs/quickstart-$(if $(filter yes,$(long)),long,seeds)$(if $(student),-$(student)) \
		$(STUDENT) $(if $(filter yes,$(long)),$(LONG))

ablations: $(VENV)/installed  ## The paper's Tables 3 to 5 in miniature, over three seeds (an hour)
	$(BIN)/python benchmarks/ablations.py

backbones: $(VENV)/installed  ## The paper's backbone study in miniature, over three seeds (an hour and a half)
	$(BIN)/python benchmarks/backbone_study.py

teachers: $(VENV)/installed  ## Train the quickstart's three teachers again, into runs/teachers
	$(BIN)/python -m transformers_radio.quickstart.train_teachers --output runs/teachers

test: $(VENV)/installed  ## Run the tests in TEST_PROCESSES at once (under 20 minutes on 2 cores)
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile

test-slow: $(VENV)/installed  ## Run the long tests too
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile -m "not lmms"

$(LMMS_VENV)/installed: setup.py pyproject.toml
	$(PYTHON) -m venv $(LMMS_VENV)
	$(LMMS_VENV)/bin/python -m pip install --quiet --progress-bar off -e ".[dev,lmms]"
	touch $@

test-lmms: $(LMMS_VENV)/installed  ## Test against lmms-eval, in an environment of its own
	$(LMMS_VENV)/bin/python -m pytest -m lmms tests/evaluation/test_lmms_eval.py

fuzz: $(VENV)/installed  ## Damage input of every kind for ten minutes, and say what came of it
	$(BIN)/python tests/fuzz/run.py

quality: $(VENV)/installed  ## Lint, types, import floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/installed  ## Build the documentation site, build/site/index.html (warnings are errors)
	$(BIN)/python docs/build.py
	$(BIN)/mkdocs build --strict --site-dir build/mkdocs
	$(BIN)/zensical build --strict

quality-deps: $(VENV)/installed  ## Look for known vulnerabilities in what is installed (asks a database on the network)
	$(BIN)/python -m pip install --quiet "pip-audit>=2.7"
	mkdir -p build && $(BIN)/python -m pip list --format=freeze --exclude-editable > build/audited.txt
	$(BIN)/pip-audit --strict --disable-pip --no-deps -r build/audited.txt || \
		{ echo "error: pip-audit has found something, or could not look everything up"; exit 1; }

matrix: $(VENV)/installed  ## Students saved by the oldest, a middle and the newest transformers, opened in each
	$(BIN)/python tests/saved/matrix.py

wheel: $(VENV)/installed  ## Wheel and source archive in dist/, and a check of what they hold
	rm -rf build dist
	$(BIN)/python -m build
	$(BIN)/python tests/release/check_dist.py dist

bench: $(VENV)/installed  ## Measure the framework's overhead, processes, the input pipeline, and the cost model
	$(BIN)/python benchmarks/step_overhead.py
	$(BIN)/python benchmarks/processes.py
	$(BIN)/python benchmarks/input_pipeline.py
	$(BIN)/python benchmarks/scaling.py

clean:  ## Remove the environments and caches (never runs/)
	rm -rf $(VENV) $(LMMS_VENV) .venv-node .mypy_cache .ruff_cache .pytest_cache

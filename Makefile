# make quickstart   set up, make the built-in data, train on 2 ranks, evaluate, write the report
# make test         set up, then all tests
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
RANKS ?= 2

.PHONY: quickstart test setup clean

setup: $(VENV)/.done

# torch goes first and alone: what comes after finds it and pulls no other build.
$(VENV)/.done: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch numpy
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[cuda13,dev]'
	touch $@

quickstart: setup
	$(BIN)/protomem data synth data/quickstart/train --identities 300 --images 16
	$(BIN)/protomem data pairs data/quickstart/pairs --synth --kinds clean,cross_pose,low_quality --count 2000 --identities 150
	$(BIN)/protomem data pairs data/quickstart/pairs --synth --kinds look_alike --count 600 --identities 150
	PYTHON=$(BIN)/python launch/local.sh $(RANKS) configs/quickstart.yaml

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs -n 2 --dist loadfile --durations=12 tests

clean:
	rm -rf runs/quickstart data/quickstart

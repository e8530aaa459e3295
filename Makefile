# Everything a newcomer runs. The first target that needs it makes .venv with exactly the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := $(VENV)/.packages
READY := $(VENV)/.ready
PARALLEL := -n 2 --dist loadfile
KERNELS := setup.py $(shell find kernels/csrc -type f)

.PHONY: install quickstart test test-fast test-long chaos lint gpu-smoke prove prove-quality docs bench bench-kernels bench-plan bench-speed clean

install: $(READY)

$(PACKAGES): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))" || \
	  { echo "titan needs Python 3.11 to 3.13, $(PYTHON) is $$($(PYTHON) -V 2>&1); use make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt setuptools wheel
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt "torch==2.13.0"
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation -e ".[test,export,mpi]"
	touch $@

# An editable install has built the kernels once; this builds them anew when their sources change.
$(READY): $(PACKAGES) $(KERNELS)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

quickstart: $(READY)
	$(BIN)/titan run configs/quickstart.toml --overwrite

test: $(READY)
	$(BIN)/pytest tests -m "not long" $(PARALLEL)

test-fast: $(READY)
	$(BIN)/pytest tests -m "not slow" $(PARALLEL)

# Real Slurm, mpirun, hosts as network namespaces, lost hosts, chaos. Needs root, and slurm-wlm, munge and iproute2 of
# Debian; what is not there is skipped and says so.
test-long: $(READY)
	$(BIN)/pytest tests -m long

# Kills and hangs of students and label service in one run, against the same run undisturbed; then of the teacher too;
# then over three hosts (as root), of hosts, links, disk, Ray and driver as well.
chaos: $(READY)
	$(BIN)/python -m tests.chaos --faults 50 --json benchmarks/results/chaos.json
	$(BIN)/python -m tests.chaos --faults 30 --roles all --json benchmarks/results/chaos_all.json
	$(BIN)/python -m tests.chaos --hosts 3 --faults 30 --steps 700 --json benchmarks/results/chaos_hosts.json

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

gpu-smoke: $(READY)
	$(BIN)/python -m benchmarks.gpu_smoke

docs: $(READY)
	$(BIN)/python -m titan.config.document > docs/config.md
	$(BIN)/python -m titan.config.schema

bench-kernels: $(READY)
	$(BIN)/python -W ignore -m benchmarks.kernels

# Predicted against measured steps and memory, what planning gives on unlike devices, and how fast the planner is.
bench-plan: $(READY)
	$(BIN)/python -W ignore -m benchmarks.planner
	$(BIN)/python -W ignore -m benchmarks.prediction
	$(BIN)/python -W ignore -m benchmarks.mixed_gain

# Students and teacher against TRL, which gets an environment of its own.
.venv-peers/.ready: benchmarks/peers/requirements.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet --disable-pip-version-check --requirement $<
	touch $@

bench-speed: $(READY) .venv-peers/.ready
	$(BIN)/python -W ignore -m benchmarks.speed

bench: bench-kernels bench-plan bench-speed
	$(BIN)/python -W ignore -m benchmarks.single_process --shape small
	$(BIN)/python -W ignore -m benchmarks.single_process --shape medium
	$(BIN)/python -W ignore -m benchmarks.ray_overhead
	$(BIN)/python -W ignore -m benchmarks.label_service
	$(BIN)/python -W ignore -m benchmarks.recovery

# What takes longer than `make test`: every test, every benchmark, and what distillation gives over three seeds.
prove: test test-long chaos bench
	$(BIN)/python -W ignore -m benchmarks.distillation_gain

# One teacher, its labels in every codec, 18 students: hours. Killed, it goes on when started again.
prove-quality: $(READY)
	$(BIN)/python -W ignore -m benchmarks.quality

clean:
	rm -rf $(VENV) .venv-peers build dist *.egg-info kernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis

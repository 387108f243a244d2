# make study   the whole project in a few minutes: models, training, comparison
# make test    everything that the tests need, then the tests
# make lint    style

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
MAMBA_SSM = mamba-ssm==2.3.2.post1
LM_EVAL = lm-eval==0.4.13

.PHONY: study test lint clean

study: $(VENV)/.requirements
	$(BIN)/python init.py
	$(BIN)/python train.py
	$(BIN)/python eval.py

test: $(VENV)/.requirements-test
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile $(TESTFLAGS)

lint: $(VENV)/.requirements-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) runs

$(VENV)/.requirements: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

# mamba-ssm is what the tests compare with. It is installed without its CUDA extension: its Triton kernels run in
# Triton's interpreter. lm-evaluation-harness comes without what its models and metrics need, as the tests use neither.
$(VENV)/.requirements-test: requirements-test.txt $(VENV)/.requirements
	$(BIN)/python -m pip install --quiet --requirement requirements-test.txt
	MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE \
	  $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps $(MAMBA_SSM)
	$(BIN)/python -m pip install --quiet --no-deps $(LM_EVAL)
	touch $@

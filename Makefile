# make study   the whole project in a few minutes: models, training, comparison
# make test    everything that the tests need, then the tests
# make test-peers  the same models in programs that are built for it (llama.cpp), which takes half an hour
# make test-oldest  the quick tests with every package of requirements.txt at the oldest version that it allows
# make lint    style
# make gpu     everything that can be learned of a GPU in eight minutes: correct? fast? into runs/gpu
# make wheels  what that compares with, as wheels, for a machine with a GPU and no network

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
MAMBA_SSM = mamba-ssm==2.3.2.post1
LM_EVAL = lm-eval==0.4.13
FLA = flash-linear-attention==0.6.0 fla-core==0.6.0

.PHONY: study test test-peers test-oldest lint gpu wheels clean

study: $(VENV)/.requirements
	$(BIN)/python init.py
	$(BIN)/python train.py
	$(BIN)/python eval.py

test: $(VENV)/.requirements-test
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile $(TESTFLAGS)

test-peers: $(VENV)/.requirements-peers
	$(BIN)/python -m pytest tests/peers $(TESTFLAGS)

# Not of Triton, of which torch with CUDA names one version, nor of safetensors, of which transformers wants a newer one.
test-oldest:
	sed -nE '/^(triton|safetensors)/!s/>=([^,]+).*/==\1/p' requirements.txt > $(VENV)-oldest.txt
	PIP_CONSTRAINT=$(abspath $(VENV)-oldest.txt) $(MAKE) test VENV=$(VENV)-oldest TESTFLAGS='-m "not slow"'

lint: $(VENV)/.requirements-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# On a machine without a network, with torch of its own: python3 -m pip install --no-index --no-deps wheels/*.whl,
# then python3 -m benchmarks.gpu.
gpu: $(VENV)/.requirements-test
	$(BIN)/python -m pip install --quiet --no-deps $(FLA)
	$(BIN)/python -m benchmarks.gpu

wheels: $(VENV)/.requirements-test
	MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE \
	  $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir wheels $(MAMBA_SSM)
	$(BIN)/python -m pip download --quiet --no-deps --dest wheels $(FLA) tomli-w

clean:
	rm -rf $(VENV) $(VENV)-oldest* runs wheels

$(VENV)/.requirements: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

# mamba-ssm is what the tests compare with. It is installed without its CUDA extension: its Triton kernels run in
# Triton's interpreter. lm-evaluation-harness comes without most of what its tasks need, as the tests bring their own.
$(VENV)/.requirements-test: requirements-test.txt $(VENV)/.requirements
	$(BIN)/python -m pip install --quiet --requirement requirements-test.txt
	MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE \
	  $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps $(MAMBA_SSM)
	$(BIN)/python -m pip install --quiet --no-deps $(LM_EVAL)
	touch $@

$(VENV)/.requirements-peers: requirements-peers.txt $(VENV)/.requirements-test
	CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF -DLLAMA_OPENSSL=OFF" \
	  $(BIN)/python -m pip install --quiet --requirement requirements-peers.txt
	touch $@

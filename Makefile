# make demo   fine-tune a real model with lorafast and with PEFT, side by side
# make demo-kinds   fine-tune it with nineteen kinds of adapters: what each scores and takes
# make demo-fsdp2   fine-tune it on two processes with FSDP2; goes on when it was stopped
# make test   run the tests that a change needs first
# make bench  measure a LoRA layer against the frozen one and PEFT
# make gpu    on a machine with an NVIDIA GPU: test, tune, benchmark, record
# Each sets up .venv first if need be. ARGS passes options on: make demo ARGS="--rank 8".

PYTHON ?= python3
PY := .venv/bin/python
READY := .venv/.ready
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup demo demo-cnn demo-dpo demo-fsdp2 demo-kinds demo-qlora demo-weak demo-robust test test-all test-executed test-peft test-oldest-peft test-peft-own test-adapterhub count-peft-own test-oldest-triton bench gpu docs lint types check clean

help:
	@echo "make setup   .venv with everything that development needs; the others do it first"
	@echo "make demo    fine-tune a real model with lorafast and with PEFT, side by side (3 minutes)"
	@echo "make demo-cnn   fine-tune the convolutions of a small CNN likewise, and the whole of it (1 minute)"
	@echo "make demo-dpo   a reward model and DPO on that model, policy and reference in one forward (2 minutes)"
	@echo "make demo-kinds   fine-tune the model of make demo with nineteen kinds of adapters: table and picture (3 minutes)"
	@echo "make demo-qlora   the fine-tuning of make demo over a base in 4 bits, beside PEFT + bitsandbytes and bfloat16 (3 minutes)"
	@echo "make demo-weak   fine-tune that model on noisy rules, without a labelled example (3 minutes)"
	@echo "make demo-robust   walk from a small CNN to its fine-tuned copy, full and LoRA (3 minutes)"
	@echo "make demo-fsdp2   fine-tune the model of make demo on two processes with FSDP2 (2 minutes)"
	@echo "make test    run the tests that a change needs first (6 minutes)"
	@echo "make test-all   run every test (20 minutes on two cores)"
	@echo "make test-executed   run the GPU kernels' PTX on a CPU, every configuration"
	@echo "make test-peft PEFT=0.21.0   run the tests of accelerate with a release of PEFT"
	@echo "make test-peft-own   run PEFT's own tests of quantized layers and of LoRA's relatives, with accelerate and without"
	@echo "make test-adapterhub   run the tests of AdapterHub's files beside its package, adapters"
	@echo "make count-peft-own   count the calls in PEFT's own LoRA tests, fast and by reason (10 minutes)"
	@echo "make bench   what a LoRA layer costs over the frozen one: table, picture, record (2 minutes)"
	@echo "make gpu     on a machine with an NVIDIA GPU: test, tune, benchmark, record (9 minutes)"
	@echo "make docs    README, docs/ and every public name as HTML in build/docs, to be browsed offline"
	@echo "make check   lint, types and every test, as CI does"
	@echo "make clean   remove .venv and everything that was built"

setup: $(READY)

$(READY): pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*)
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --upgrade pip
	$(PY) -m pip install -e '.[dev]'
	$(PY) -m pip install --no-deps -e .   # once more: now that PyTorch is there, with the native kernels
	@touch $@

demo: $(READY)
	$(PY) examples/finetune_minilm.py $(ARGS)

demo-cnn: $(READY)
	$(PY) examples/finetune_cnn.py $(ARGS)

demo-dpo: $(READY)
	$(PY) examples/dpo.py $(ARGS)

demo-kinds: $(READY)
	$(PY) examples/finetune_kinds.py $(ARGS)

demo-qlora: $(READY)
	$(PY) examples/finetune_minilm.py --base nf4 --dtype bfloat16 $(ARGS)

demo-weak: $(READY)
	$(PY) examples/weak_supervision.py $(ARGS)

demo-robust: $(READY)
	$(PY) examples/robust_interpolation.py $(ARGS)

demo-fsdp2: $(READY)
	$(PY) -m torch.distributed.run --standalone --nproc-per-node 2 examples/train_fsdp2.py $(ARGS)

# One worker a core, so one thread a worker. WORKERS=0, no worker but this process, where several runs are
# side by side.
WORKERS ?= auto
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(PY) -m pytest -n $(WORKERS) --dist worksteal

# The PTX of the Triton kernels is executed in a process of its own, which doesn't interpret them. Tests
# that are chosen with ARGS are those of the first process: make test-executed ARGS=… chooses others.
EXECUTED := TRITON_INTERPRET=0 $(PYTEST) tests/ptx $(wildcard tests/kernels/test_compiled_*.py)

test: $(READY)
	HYPOTHESIS_PROFILE=$${HYPOTHESIS_PROFILE:-quick} $(PYTEST) -m "not slow" $(ARGS)
	$(if $(ARGS),,$(EXECUTED) -m "executed and not slow")

test-all: $(READY)
	$(PYTEST) $(ARGS)
	$(if $(ARGS),,$(EXECUTED) -m executed)

test-executed: $(READY)
	EXECUTE=all $(EXECUTED) -m executed $(ARGS)

# What accelerates PEFT's layers, with any release of PEFT: make test-peft PEFT=0.21.0. It lies in a folder
# of its own, before the one in .venv.
PEFT ?= 0.20.0

test-peft: $(READY) build/peft-$(PEFT)
	PYTHONPATH=build/peft-$(PEFT) $(PY) -c 'import peft; assert peft.__version__ == "$(PEFT)", peft'
	PYTHONPATH=build/peft-$(PEFT) $(PYTEST) tests/integrations/peft $(ARGS)

# The oldest release that lorafast[peft] takes, without the slow tests: the newest release has those.
test-oldest-peft:
	$(MAKE) test-peft PEFT=0.20.0 ARGS='-m "not slow" $(ARGS)'

# AdapterHub's files beside its package, with the Transformers 4 that it needs: in a folder of their own.
ADAPTERS ?= 1.3.0
ADAPTERS_NEED := transformers==4.57.6 huggingface-hub==0.36.2 tokenizers==0.22.2 \
	requests urllib3 certifi idna charset-normalizer

test-adapterhub: $(READY) build/adapters-$(ADAPTERS)
	PYTHONPATH=build/adapters-$(ADAPTERS) $(PY) -c 'import adapters; assert adapters.__version__ == "$(ADAPTERS)", adapters'
	PYTHONPATH=build/adapters-$(ADAPTERS) $(PYTEST) tests/convert/test_adapterhub_itself.py $(ARGS)

build/adapters-%:
	rm -rf $@.part
	$(PY) -m pip install -q --no-deps --target $@.part adapters==$* $(ADAPTERS_NEED)
	mv $@.part $@

# PEFT's own tests of quantized layers and of LoRA's relatives, which its source distribution alone has.
PEFT_OWN ?= 0.21.2

test-peft-own: $(READY) build/peft-tests-$(PEFT_OWN)
	PEFT_TESTS=build/peft-tests-$(PEFT_OWN) HF_HUB_OFFLINE=1 $(PYTEST) tests/integrations/peft/test_own_tests.py $(ARGS)

count-peft-own: $(READY) build/peft-tests-$(PEFT_OWN)
	$(PY) tests/integrations/peft/own_calls.py build/peft-tests-$(PEFT_OWN) $(ARGS)

build/peft-tests-%:
	rm -rf $@.part && mkdir -p $@.part
	$(PY) -m pip download -q --no-deps --no-binary peft --no-build-isolation -d $@.part peft==$*
	tar xzf $@.part/peft-$*.tar.gz -C $@.part --strip-components=1 peft-$*/tests
	mv $@.part $@

# The oldest Triton that a GPU machine has: with it too ptxas leaves every wgmma in flight. After a kernel
# has changed make test-oldest-triton ARGS=--write, else its variants are compiled again each time.
TRITON ?= 3.6.0

test-oldest-triton: $(READY) build/triton-$(TRITON)
	env -u TRITON_INTERPRET PYTHONPATH=build/triton-$(TRITON):$(CURDIR):tests/kernels \
		$(PY) tests/kernels/compile_configs.py 90 --serialized $(ARGS)

build/triton-%:
	$(PY) -m pip install -q --no-deps --target $@ triton==$*

build/peft-%:
	$(PY) -m pip install -q --no-deps --target $@ peft==$*

bench: $(READY)
	$(PY) -m lorafast bench --layers --call-overhead --models qwen-0.6b \
		--json build/bench/bench.json --plot build/bench/overhead.png $(ARGS)

# On the machine's own Python, PyTorch and Triton, so that a bare GPU machine needs no network.
gpu:
	@python=$(PYTHON); $$python -c 'import torch' 2>/dev/null || python=$(PY); \
	$$python -c 'import torch' 2>/dev/null || \
		{ echo "make gpu needs an NVIDIA GPU and PyTorch, and $(PYTHON) has no PyTorch" >&2; exit 2; }; \
	PYTHONPATH=$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH} $$python -m lorafast.bench.gpu $(ARGS)

docs: $(READY)
	$(PY) docs/build.py build/docs

CPP_IN := csrc csrc/* tests/native/throwaway tests/native/throwaway/* tests/ptx/machine tests/ptx/cuda tests/cuda tests/cuda/throwaway
CPP := $(foreach in,$(CPP_IN),$(wildcard $(in:=/*.h) $(in:=/*.cpp) $(in:=/*.cu) $(in:=/*.cuh)))

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	.venv/bin/clang-format --dry-run -Werror $(CPP)

types: $(READY)
	$(PY) tests/check_types.py

check: lint types test-all

clean:
	rm -rf .venv build lorafast/_C*.so dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

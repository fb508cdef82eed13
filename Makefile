# What a person types. Each rule is one call of `python -m pipeline`; the first one that needs it sets up .venv.

# Every path below is the checkout's: run from elsewhere, `make -f` would remove that folder's .venv and build.
ifneq ($(realpath $(dir $(lastword $(MAKEFILE_LIST)))),$(realpath $(CURDIR)))
$(error run make in the checkout: make -C $(dir $(lastword $(MAKEFILE_LIST))))
endif

MODEL   ?= mobilevit_xs
TARGET  ?= cpu
RECIPE  ?= int8_qat
DATA    ?= digits
WEIGHTS ?=
SIZE    ?=
BATCH   ?= 1
DEVICE  ?= local
SEED    ?= 0
FORM    ?= tokens
INTERFACE  ?= tensor
DEPLOYMENT ?=
MODELS  ?=
SIZES   ?=
RECIPES ?=
CALIBRATOR ?= auto
PLACEMENT  ?=
MAX_DROP   ?=
FORCE      ?=
VERDICT    ?= yes
EPOCHS     ?=
RATE       ?=
PYTHON  ?= python3.11

# Values reach the commands as they were typed, through the environment: neither make nor a shell expands a `$` in them.
VALUES := MODEL TARGET RECIPE DATA WEIGHTS SIZE BATCH DEVICE SEED FORM INTERFACE DEPLOYMENT MODELS SIZES RECIPES \
          CALIBRATOR PLACEMENT MAX_DROP FORCE VERDICT EPOCHS RATE
$(foreach name,$(VALUES),$(eval override $(name) := $$(value $(name))))
export $(VALUES)
RUN = --model="$$MODEL" --target="$$TARGET" --recipe="$$RECIPE" --data="$$DATA" --weights="$$WEIGHTS" \
      --size="$$SIZE" --batch="$$BATCH" --device="$$DEVICE" --seed="$$SEED" --form="$$FORM" \
      --interface="$$INTERFACE" --deployment="$$DEPLOYMENT" \
      --calibrator="$$CALIBRATOR" --placement="$$PLACEMENT" --max_drop="$$MAX_DROP" --force="$$FORCE" --verdict="$$VERDICT" \
      --epochs="$$EPOCHS" --rate="$$RATE"

# Caches of libraries stay in the checkout, too.
export XDG_CACHE_HOME := $(CURDIR)/.cache
export TORCHINDUCTOR_CACHE_DIR := $(CURDIR)/.cache/torchinductor

VENV     := .venv
PIPELINE := $(VENV)/bin/python -m pipeline
# The name of the stamp holds a checksum of the lock file: another lock, another environment.
READY    := $(VENV)/.ready-$(shell cksum < requirements.lock | cut -d' ' -f1)

.DEFAULT_GOAL := help
.PHONY: help engine multifunction calibrate qat sensitivity tune prove verify profile dashboard explain lint-model \
        placement models targets zoo bench bench-coreml bench-speed bench-quantizers \
        bench-calibration bench-families bench-outliers bench-seeds bench-prove bench-qat bench-qat-gain test lint setup lock \
        system-packages clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "Variables, with their defaults: MODEL=mobilevit_xs TARGET=cpu RECIPE=int8_qat (fp32 fp16 int8_ptq int8_qat int8_lsq)"
	@echo "  MODEL= (one of make models; or <file>.py:<function>; or timm:<name>)"
	@echo "  DATA=digits (or a folder of class folders) SIZE= BATCH=1 SEED=0"
	@echo "  FORM=tokens (or channels: as the Neural Engine computes a MobileViT, CoAtNet or Swin best)"
	@echo "  Core ML only: RECIPE= (w8a16 w4a16 palette6 palette4) INTERFACE=tensor (image classifier) DEPLOYMENT= (iOS16 and later)"
	@echo "  INT8: CALIBRATOR=auto (minmax moving_average percentile entropy mse) FORCE= (1: calibrate on fewer than 128 images)"
	@echo "    PLACEMENT= (what computes in integers, such as conv+linear-stages.0; or layers, or all; or the family's own)"
	@echo "    MAX_DROP= (points such as 0.5, or 99% of float: sensitive modules stay float until it holds) VERDICT=yes (or no)"
	@echo "  Training: EPOCHS= RATE= (of float training and QAT; a pair such as 20,5: of float training, then of QAT)"
	@echo "  WEIGHTS= (trains on DATA; or a checkpoint, timm's or the authors'; or timm: from the Hugging Face Hub)"

engine: $(READY) ## train or load, quantize, export, compile and verify MODEL for TARGET
	@$(PIPELINE) engine $(RUN)

multifunction: $(READY) ## one Core ML package with a function for each of SIZES="64 128" and RECIPES="fp16 int8_qat"
	@$(PIPELINE) multifunction $(RUN) --sizes="$$SIZES" --recipes="$$RECIPES"

calibrate: $(READY) ## stop after INT8 calibration (PTQ) and say what it costs in accuracy
	@$(PIPELINE) calibrate $(RUN)

qat: $(READY) ## stop after quantization-aware training and say what it costs in accuracy
	@$(PIPELINE) qat $(RUN)

sensitivity: $(READY) ## what each module loses by computing in integers alone, the most sensitive first
	@$(PIPELINE) sensitivity $(RUN)

tune: $(READY) ## search the placement of INT8 that is fastest on TARGET within the accuracy budget, timed here
	@$(PIPELINE) tune $(RUN)

prove: $(READY) ## read scales and integers back from every artifact of one INT8 checkpoint, and compare
	@$(PIPELINE) prove $(RUN)

verify: $(READY) ## run the engine on every test image again, and compare each step with the one before
	@$(PIPELINE) verify $(RUN)

profile: $(READY) ## time the engine, one query at a time, and append the measurement
	@$(PIPELINE) profile $(RUN)

dashboard: $(READY) ## draw all measurements on one page: build/dashboard.html
	@$(PIPELINE) dashboard

explain: $(READY) ## which stages would be reused, and what changed for the others
	@$(PIPELINE) explain $(RUN)

lint-model: $(READY) ## what accelerators refuse in MODEL, or run slowly: module, line, reason, remedy
	@$(PIPELINE) lint-model $(RUN)

placement: $(READY) ## what speaks against the Neural Engine in the Core ML package of MODEL and RECIPE, operator by operator
	@$(PIPELINE) placement $(RUN)

models: $(READY) ## the models, with parameters, MACs and published accuracy
	@$(PIPELINE) models

targets: $(READY) ## the targets, and what this machine lacks for each
	@$(PIPELINE) targets

zoo: $(READY) ## build every published model up to 60 M parameters at full size (hours), or MODELS="swin_tiny swin_base"
	@$(PIPELINE) zoo --models="$$MODELS"

bench: $(READY) ## the table of the README: a small model of every family, four recipes, four targets (an hour)
	@$(VENV)/bin/python -m tests.bench

bench-coreml: $(READY) ## the README's Core ML tables: what packages answer without a Mac, and what speaks against the Neural Engine
	@$(VENV)/bin/python -m tests.bench_coreml $$MODELS
	@$(VENV)/bin/python -m tests.bench_placement

bench-speed: $(READY) ## INT8 against float32 and half precision on this machine's CPU, at published sizes, timed in turns
	@$(VENV)/bin/python -m tests.bench_speed $$MODELS

bench-quantizers: $(READY) ## our INT8 against that of onnxruntime.quantization, and of NNCF where NNCF_PYTHON= has it
	@$(VENV)/bin/python -m tests.bench_quantizers $$MODELS

bench-calibration: $(READY) ## what calibrating costs: throughput against plain forward passes, and memory
	@$(VENV)/bin/python -m tests.bench_calibration throughput --images 128
	@$(VENV)/bin/python -m tests.bench_calibration memory --images 10000

bench-families: $(READY) ## what the placements of the families rest on: each kind of operator alone in integers
	@$(VENV)/bin/python -m tests.bench_families $$MODELS

bench-outliers: $(READY) ## INT8 of trained networks whose channels differ by factors of up to 2^6, plain and repaired
	@$(VENV)/bin/python -m tests.bench_outliers $$MODELS

bench-seeds: $(READY) ## what INT8 costs in accuracy over three seeds, for the small model of every family (an hour)
	@$(VENV)/bin/python -m tests.bench_seeds $$MODELS

bench-prove: $(READY) ## the proofs of MODELS="mobilevit_xs swin_mini": one line for each artifact
	@$(VENV)/bin/python -m tests.bench_prove $${MODELS:-mobilevit_xs}

bench-qat: $(READY) ## what a step of quantization-aware training costs, in float steps; needs no data
	@$(VENV)/bin/python -m tests.bench_qat "$$MODEL"

bench-qat-gain: $(READY) ## the worth of training where PTQ is not enough: weights of 3 bits on the digits, three seeds
	@$(VENV)/bin/python -m tests.bench_qat_gain $$MODELS
	@$(VENV)/bin/python -m tests.bench_qat "$$MODEL" 256 10

test: $(READY) ## the tests (a quarter of an hour on two cores)
	@$(VENV)/bin/python -m pytest -q -n 2 --dist worksteal

lint: $(READY) ## ruff and mypy --strict
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

setup: $(READY) ## create .venv from requirements.lock (the other rules do this when it is missing or stale)

$(READY):
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not on PATH; on Debian and Ubuntu: apt install python3.11 python3.11-venv" >&2; exit 3; }
	@echo "setting up .venv from requirements.lock; this takes a few minutes, once" >&2
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) >&2 || { rm -rf $(VENV); echo "$(PYTHON) cannot create environments; on Debian and Ubuntu: apt install python3.11-venv" >&2; exit 3; }
	@$(VENV)/bin/python -m pip install --disable-pip-version-check --no-cache-dir --requirement requirements.lock >&2
	@touch $@

lock: ## resolve requirements.in into requirements.lock, in an environment of its own
	@rm -rf .cache/lock && $(PYTHON) -m venv .cache/lock
	@.cache/lock/bin/python -m pip install --disable-pip-version-check --no-cache-dir --requirement requirements.in >&2
	@.cache/lock/bin/python -m pip freeze --exclude pip | sed -E 's/\+cpu$$//; s/^(tensorrt.*)$$/\1 ; sys_platform == "linux" and platform_machine == "x86_64"/' > requirements.lock
	@rm -rf .cache/lock

system-packages: ## Debian packages that some tests need (without them those tests skip)
	@if [ "$$(id -u)" = 0 ]; then as=; else as=sudo; fi; \
	 $$as apt-get update -qq && $$as env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium

clean: ## remove .venv, caches and everything that was built (measurements, too)
	rm -rf $(VENV) .cache build .mypy_cache .ruff_cache .pytest_cache

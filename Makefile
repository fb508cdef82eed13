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
HALF       ?= auto
MODELS  ?=
SIZES   ?=
RECIPES ?=
CALIBRATOR ?= auto
ROUNDING   ?= auto
PLACEMENT  ?=
MAX_DROP   ?=
FORCE      ?=
VERDICT    ?= yes
LABELS  ?=
MEAN    ?=
STD     ?=
CROP    ?=
INTERPOLATION ?=
BACKGROUND    ?=
EPOCHS  ?=
RATE    ?=
DAYS    ?=
APPLY   ?= no
CASES   ?=
COUNT   ?= 10000
START   ?= 0
PYTHON  ?= python3.11
LOCK    ?=

# Values reach the commands as they were typed, through the environment: neither make nor a shell expands a `$` in them.
VALUES := MODEL TARGET RECIPE DATA WEIGHTS SIZE BATCH DEVICE SEED FORM INTERFACE DEPLOYMENT MODELS SIZES RECIPES \
          CALIBRATOR ROUNDING PLACEMENT MAX_DROP FORCE VERDICT DAYS APPLY \
          LABELS MEAN STD CROP INTERPOLATION BACKGROUND HALF EPOCHS RATE
$(foreach name,$(VALUES),$(eval override $(name) := $$(value $(name))))
export $(VALUES) CASES COUNT START
RUN = --model="$$MODEL" --target="$$TARGET" --recipe="$$RECIPE" --data="$$DATA" --weights="$$WEIGHTS" \
      --size="$$SIZE" --batch="$$BATCH" --device="$$DEVICE" --seed="$$SEED" --form="$$FORM" \
      --interface="$$INTERFACE" --deployment="$$DEPLOYMENT" --half="$$HALF" \
      --calibrator="$$CALIBRATOR" --rounding="$$ROUNDING" --placement="$$PLACEMENT" --max_drop="$$MAX_DROP" \
      --force="$$FORCE" --verdict="$$VERDICT" \
      --labels="$$LABELS" --mean="$$MEAN" --std="$$STD" --crop="$$CROP" --interpolation="$$INTERPOLATION" \
      --background="$$BACKGROUND" --epochs="$$EPOCHS" --rate="$$RATE"

# Resolves for systems that this one is not; nothing of it is installed in .venv.
UV := uv==0.13.9

# Caches of libraries stay in the checkout, too.
export XDG_CACHE_HOME := $(CURDIR)/.cache
export TORCHINDUCTOR_CACHE_DIR := $(CURDIR)/.cache/torchinductor

VENV     := .venv
PIPELINE := $(VENV)/bin/python -m pipeline
# Resolved for this system, or for NVIDIA GPUs: `make setup LOCK=requirements-cuda.lock`, once.
override LOCK := $(value LOCK)
LOCKS := $(filter-out requirements-docs.lock,$(sort $(wildcard requirements*.lock)))
ifneq ($(filter-out $(LOCKS),$(LOCK)),)
$(error LOCK=$(LOCK): no such lock file; there are $(LOCKS))
endif
WANTED := $(or $(LOCK),$(if $(filter Darwin,$(shell uname -s)),requirements-macos.lock,requirements.lock))
# The name of the stamp holds a checksum of the lock file: another lock, another environment. One that was set up from
# another of the lock files is as good, until somebody asks for this one.
stamp = $(VENV)/.ready-$(shell cksum < $(1) | cut -d' ' -f1)
READY := $(firstword $(wildcard $(foreach lock,$(or $(LOCK),$(LOCKS)),$(call stamp,$(lock)))) $(call stamp,$(WANTED)))

# The documentation has an environment of its own, since the pipeline needs none of its packages.
DOCS := .cache/docs-$(shell cksum < requirements-docs.lock | cut -d' ' -f1)

.DEFAULT_GOAL := help
.PHONY: help engine multifunction calibrate qat sensitivity tune prove verify profile dashboard explain gc lint-model \
        placement models targets zoo bench bench-coreml bench-speed bench-quantizers \
        bench-calibration bench-families bench-outliers bench-seeds bench-real bench-prove bench-qat bench-qat-gain \
        bench-store bench-half bench-dashboard bench-faults fuzz test lint docs setup lock licenses system-packages clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "Variables, with their defaults: MODEL=mobilevit_xs TARGET=cpu RECIPE=int8_qat (fp32 fp16 int8_ptq int8_qat int8_lsq)"
	@echo "  MODEL= (one of make models; or <file>.py:<function>; or timm:<name>)"
	@echo "  DATA=digits (or a folder of class folders) SIZE= BATCH=1 SEED=0"
	@echo "  LABELS= (of a folder's classes: text or natural, the order of the folders; or a file with a class a line, see README)"
	@echo "  MEAN= STD= (three numbers each, of pixels from 0 to 1) CROP= INTERPOLATION= (bilinear bicubic) BACKGROUND= (a colour, under alpha)"
	@echo "  FORM=tokens (or channels: as the Neural Engine computes a MobileViT, CoAtNet or Swin best)"
	@echo "  Core ML only: RECIPE= (w8a16 w4a16 palette6 palette4) INTERFACE=tensor (image classifier) DEPLOYMENT= (iOS16 and later)"
	@echo "  INT8: CALIBRATOR=auto (minmax moving_average percentile entropy mse) FORCE= (1: calibrate on fewer than 128 images)"
	@echo "    ROUNDING=auto (nearest adaptive: weights fitted to rounded inputs; auto: where the network is below 32 dB)"
	@echo "    PLACEMENT= (what computes in integers, such as conv+linear-stages.0; or layers, or all; or the family's own)"
	@echo "    MAX_DROP= (points such as 0.5, or 99% of float: sensitive modules stay float until it holds) VERDICT=yes (or no)"
	@echo "  DAYS= (gc: artifacts not used for so long, too) APPLY=no (yes: gc deletes) LOCK= (setup: requirements-cuda.lock)"
	@echo "  HALF=auto (operators that FP16 cannot hold stay in float32; or strict: they are refused)"
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

gc: $(READY) ## list what build/ can lose: scratch, replaced and damaged artifacts; APPLY=yes deletes it, measurements stay
	@$(PIPELINE) gc --days="$$DAYS" --apply="$$APPLY"

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

bench: $(READY) ## top-1 and agreement of a small model of every family: four recipes, four targets (an hour)
	@$(VENV)/bin/python -m tests.bench

bench-coreml: $(READY) ## Core ML packages without a Mac: operators compared, decibels, and eligibility for the Neural Engine
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

bench-real: $(READY) ## INT8 of a really trained MobileNetV2 (fetched, MIT licence) on crops of photographs, for SEEDS="100 200 300"
	@$(VENV)/bin/python -m tests.bench_real --seeds $${SEEDS:-100 200 300}

bench-prove: $(READY) ## the proofs of MODELS="mobilevit_xs swin_mini": one line for each artifact
	@$(VENV)/bin/python -m tests.bench_prove $${MODELS:-mobilevit_xs}

bench-qat: $(READY) ## what a step of quantization-aware training costs, in float steps; needs no data
	@$(VENV)/bin/python -m tests.bench_qat "$$MODEL"
	@$(VENV)/bin/python -m tests.bench_qat "$$MODEL" 256 10

bench-qat-gain: $(READY) ## the worth of training where PTQ is not enough: weights of 3 bits on the digits, three seeds
	@$(VENV)/bin/python -m tests.bench_qat_gain $$MODELS

bench-store: $(READY) ## what it costs to check the digests of artifacts, in percent of a cached make engine
	@$(VENV)/bin/python -m tests.bench_store

bench-half: $(READY) ## FP16 of the small model of every family, each operator rounded, against float32; no training
	@$(VENV)/bin/python -m tests.bench_half $$MODELS

bench-faults: $(READY) ## verification put to the test: planted wrong conversions, and false alarms over seeds (hours)
	@$(VENV)/bin/python -m tests.bench_faults plants $$MODELS
	@$(VENV)/bin/python -m tests.bench_faults alarms $$MODELS

bench-dashboard: $(READY) ## the cost of the dashboard of 100,000 measurements: seconds, memory, size of the page
	@$(VENV)/bin/python -m tests.bench_dashboard

fuzz: $(READY) ## hostile values and damaged files for every reader, 10,000 cases each (CASES="values onnx" COUNT=10000 START=0)
	@$(VENV)/bin/python -m tests.fuzz --kinds="$$CASES" --count="$$COUNT" --start="$$START"

test: $(READY) ## the tests (a quarter of an hour on two cores)
	@$(VENV)/bin/python -m pytest -q -n 2 --dist worksteal

lint: $(READY) ## ruff and mypy --strict
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

docs: $(READY) $(DOCS)/.ready ## the documentation as a web site: build/docs/index.html
	@NO_MKDOCS_2_WARNING=1 PIPELINE_PYTHON=$(VENV)/bin/python $(DOCS)/bin/python -m mkdocs build --strict --site-dir build/docs
	@echo build/docs/index.html

$(DOCS)/.ready: requirements-docs.lock
	@rm -rf .cache/docs-* && mkdir -p .cache && $(PYTHON) -m venv $(DOCS) && \
	 $(DOCS)/bin/python -m pip install --disable-pip-version-check --no-cache-dir --quiet --require-hashes --no-deps \
	     --requirement requirements-docs.lock >&2 && touch $@

setup: $(READY) ## create .venv from requirements.lock (the other rules do this when it is missing or stale)

$(READY):
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not on PATH; on Debian and Ubuntu: apt install python3.11 python3.11-venv" >&2; exit 3; }
	@$(PYTHON) -P pipeline/environment.py $@ $(WANTED)

lock: ## resolve requirements.in into the lock files of all systems, with hashes, by uv in an environment of its own
	@mkdir -p .cache && folder=$$(mktemp -d .cache/lock.XXXXXX) && trap 'rm -rf "$$folder"' EXIT && \
	 $(PYTHON) -m venv "$$folder" && \
	 "$$folder/bin/python" -m pip install --disable-pip-version-check --no-cache-dir --quiet $(UV) >&2 && \
	 "$$folder/bin/python" -P pipeline/locks.py "$$folder/bin/uv"

licenses: $(READY) ## what is installed in .venv, with the licence of each package
	@$(VENV)/bin/python -m pipeline.licenses

system-packages: ## Debian packages that some tests need (without them those tests skip)
	@if [ "$$(id -u)" = 0 ]; then as=; else as=sudo; fi; \
	 $$as apt-get update -qq && $$as env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium

clean: ## remove .venv, caches and everything that was built (measurements, too)
	rm -rf $(VENV) .cache build .mypy_cache .ruff_cache .pytest_cache

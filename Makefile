# The commands. A verb is one call of `python -m pipeline`; the first rule that needs .venv creates it.

# Every path below is the checkout's: run from elsewhere, `make -f` would remove that folder's .venv and build.
ifneq ($(realpath $(dir $(lastword $(MAKEFILE_LIST)))),$(realpath $(CURDIR)))
$(error run make in the checkout: make -C $(dir $(lastword $(MAKEFILE_LIST))))
endif

# Variables that are typed reach the commands unchanged, through the environment: neither make nor a shell expands a `$`
# in them. EDGELINE_TYPED lists their names, so that a misspelt one is an error. Their defaults and help stand in
# pipeline/cli/options.py alone.
TYPED := $(sort $(foreach name,$(.VARIABLES),$(if $(findstring command line,$(origin $(name))),$(name))))
$(foreach name,$(TYPED),$(eval override $(name) := $$(value $(name))))
EDGELINE_TYPED := $(filter-out PIPELINE READY SHELL .SHELLFLAGS MAKEFLAGS,$(TYPED))
export EDGELINE_TYPED $(TYPED)

PYTHON ?= python3.11
LOCK   ?=

# Rules that need no environment cannot ask it for the names of variables.
ifeq ($(filter-out setup lock system-packages clean,$(or $(MAKECMDGOALS),help)),)
ifneq ($(filter-out LOCK PYTHON,$(EDGELINE_TYPED)),)
$(error make $(MAKECMDGOALS) reads the variables LOCK and PYTHON only, not $(filter-out LOCK PYTHON,$(EDGELINE_TYPED)))
endif
endif

# Resolves for systems that this one is not; nothing of it is installed in .venv.
UV := uv==0.13.9

# Caches of libraries stay in the checkout, too.
export XDG_CACHE_HOME := $(CURDIR)/.cache
export TORCHINDUCTOR_CACHE_DIR := $(CURDIR)/.cache/torchinductor

VENV     := .venv
PIPELINE := $(VENV)/bin/python -m pipeline
# Resolved for this system, or for NVIDIA GPUs: `make setup LOCK=requirements-cuda.lock`, once.
# End of an error message about a variable whose value comes from the environment.
inherited = $(if $(findstring environment,$(origin $(1))),; $(1) is set in the environment: unset it or give $(1) on the command line)
LOCK_ORIGIN := $(call inherited,LOCK)
override LOCK := $(value LOCK)
LOCKS := $(filter-out requirements-docs.lock,$(sort $(wildcard requirements*.lock)))
ifneq ($(filter-out $(LOCKS),$(LOCK)),)
$(error LOCK=$(LOCK): no such lock file; there are $(LOCKS)$(LOCK_ORIGIN))
endif
WANTED := $(or $(LOCK),$(if $(filter Darwin,$(shell uname -s)),requirements-macos.lock,requirements.lock))
# The name of the stamp holds a checksum of the lock file: another lock, another environment. One that was set up from
# another of the lock files is as good, until somebody asks for this one.
stamp = $(VENV)/.ready-$(shell cksum < $(1) | cut -d' ' -f1)
READY := $(firstword $(wildcard $(foreach lock,$(or $(LOCK),$(LOCKS)),$(call stamp,$(lock)))) $(call stamp,$(WANTED)))

# The documentation has an environment of its own, since the pipeline needs none of its packages.
DOCS := .cache/docs-$(shell cksum < requirements-docs.lock | cut -d' ' -f1)

VERBS := engine multifunction zoo calibrate qat tune sensitivity profile iphone-bundle import verify prove dashboard \
         explain lint-model placement models targets devices doctor gc
BENCHES := bench bench-coreml bench-speed bench-quantizers bench-calibration bench-families bench-outliers bench-seeds \
           bench-real bench-prove bench-qat bench-qat-gain bench-store bench-half bench-dashboard bench-faults \
           bench-devices
OTHERS := fuzz gpu-check check test lint docs licenses

.DEFAULT_GOAL := help
.PHONY: help help-bench $(VERBS) $(BENCHES) $(OTHERS) setup lock system-packages clean .variables

help: $(if $(filter VERB,$(TYPED)),$(READY)) ## this list; variables of a rule, with defaults: make help VERB=engine
ifneq ($(filter VERB,$(TYPED)),)
	@awk -F ':.*## ' -v verbs=' $(VERBS) ' 'NF > 1 && $$1 == ENVIRON["VERB"] && !index(verbs, " " $$1 " ") \
	 { printf "make %s: %s\n", $$1, $$2; found = 1 } END { exit !found }' Makefile || $(PIPELINE) "$$VERB" --help
else
	@awk -F ':.*## ' '/^##@ / { print substr($$0, 5) } \
	 /^[a-z-]+:.*## / && !/^(bench|gpu-check)/ { printf "  make %-18s %s\n", $$1, $$2 }' Makefile
endif

help-bench: ## benchmarks (minutes to hours each)
	@awk -F ':.*## ' '/^(bench[a-z-]*|gpu-check):.*## / { printf "  make %-18s %s\n", $$1, $$2 }' Makefile

$(VERBS): $(READY)
	@$(PIPELINE) $@

# Judges the variables that were typed for rules that are no verbs.
.variables: $(READY)
	@$(PIPELINE) check-variables $(filter $(BENCHES) $(OTHERS),$(MAKECMDGOALS))

$(BENCHES) $(OTHERS): $(READY) .variables

##@ Build
engine: ## train or load, quantize, export, compile and verify MODEL for TARGET
multifunction: ## one Core ML package with a function for each of SIZES and RECIPES
zoo: ## build every published model, or MODELS, at full size (hours)

##@ Quantize
calibrate: ## stop after INT8 calibration (PTQ) and report its accuracy
qat: ## stop after quantization-aware training and report its accuracy
tune: ## search the INT8 placement that is fastest on TARGET within the budget
sensitivity: ## INT8 sensitivity per layer, worst first

##@ Measure
profile: ## time the engine, one query at a time, and store the measurement
iphone-bundle: ## Xcode project of an app that times the Core ML package on an iPhone
import: ## append FILE, the result of an iPhone or of a bundle, to the measurements
verify: ## run the engine on every test image again; compare stage by stage
prove: ## compare scales and integers in all artifacts of one INT8 checkpoint
dashboard: ## draw all measurements on one page: build/dashboard.html

##@ Inspect
explain: ## stages that would be reused, and changes that rebuild the others
lint-model: ## operators of MODEL that accelerators refuse or run slowly
placement: ## operators that cannot run, or run slowly, on the Neural Engine

##@ List
models: ## models with parameters, MACs and published accuracy
targets: ## targets, and what this machine lacks for each
devices: ## devices of devices.toml with their state
doctor: ## check what engines need on DEVICE, with remedies

##@ Maintain
gc: ## list unfinished, replaced and damaged artifacts; APPLY=yes deletes them
setup: $(READY) ## create .venv from the lock file; the other rules do it when needed
lock: ## resolve requirements.in into the lock files, with hashes
licenses: ## installed packages with their licences
system-packages: ## install the Debian packages that some tests need
clean: ## remove .venv, caches and everything that was built

##@ Develop
check: ## lint, types and unit tests (four minutes on two cores)
lint: ## ruff and mypy --strict
docs: ## the documentation as a web site: build/docs/index.html
test: ## all tests (twenty minutes on two cores)
fuzz: ## hostile values and damaged files for every reader: CASES COUNT START
gpu-check: ## figures of an NVIDIA GPU (under six minutes): build/gpu-check.json

bench: ## small model of every family x four recipes x four targets (an hour)
	@$(VENV)/bin/python -m tests.bench.table $$MODELS

bench-coreml: ## Core ML packages evaluated without a Mac; Neural Engine findings
	@$(VENV)/bin/python -m tests.bench.coreml $$MODELS
	@$(VENV)/bin/python -m tests.bench.placement

bench-speed: ## INT8 against float32 and half precision on this CPU, interleaved
	@$(VENV)/bin/python -m tests.bench.speed $$MODELS

bench-quantizers: ## INT8 against onnxruntime.quantization, and NNCF from NNCF_PYTHON
	@$(VENV)/bin/python -m tests.bench.quantization.quantizers $$MODELS

bench-calibration: ## cost of calibration: throughput against plain forward passes, and memory
	@$(VENV)/bin/python -m tests.bench.quantization.calibration throughput --images 128
	@$(VENV)/bin/python -m tests.bench.quantization.calibration memory --images 10000

bench-families: ## each kind of operator alone in INT8, for the placements of the families
	@$(VENV)/bin/python -m tests.bench.quantization.families $$MODELS

bench-outliers: ## INT8 of trained networks whose channel ranges differ by up to 2^6
	@$(VENV)/bin/python -m tests.bench.quantization.outliers $$MODELS

bench-seeds: ## INT8 accuracy over three seeds, small model of every family (an hour)
	@$(VENV)/bin/python -m tests.bench.quantization.seeds $$MODELS

bench-real: ## INT8 of a trained MobileNetV2 (fetched, MIT) on photographs, for SEEDS
	@$(VENV)/bin/python -m tests.bench.quantization.real --seeds $${SEEDS:-100 200 300}

bench-prove: ## one line per artifact of the proofs of MODELS
	@$(VENV)/bin/python -m tests.bench.prove $${MODELS:-mobilevit_xs}

bench-qat: ## cost of a step of quantization-aware training, in float steps
	@$(VENV)/bin/python -m tests.bench.quantization.qat $${MODEL:+"$$MODEL"}
	@$(VENV)/bin/python -m tests.bench.quantization.qat "$${MODEL:-mobilevit_xs}" 256 10

bench-qat-gain: ## gain of training where PTQ is not enough: 3-bit weights, three seeds
	@$(VENV)/bin/python -m tests.bench.quantization.qat_gain $$MODELS

bench-store: ## cost of checking artifact digests, in percent of a cached make engine
	@$(VENV)/bin/python -m tests.bench.store

bench-half: ## FP16 of the small model of every family against float32; no training
	@$(VENV)/bin/python -m tests.bench.half $$MODELS

bench-faults: ## planted wrong conversions, and false alarms over seeds (hours)
	@$(VENV)/bin/python -m tests.bench.faults plants $$MODELS
	@$(VENV)/bin/python -m tests.bench.faults alarms $$MODELS

bench-dashboard: ## the dashboard of 100,000 measurements: seconds, memory, size of the page
	@$(VENV)/bin/python -m tests.bench.dashboard

bench-devices: ## an engine timed over SSH on loopback against here; seconds and bytes
	@$(VENV)/bin/python -m tests.bench.devices $${MODEL:+"$$MODEL"}

gpu-check:
	@$(VENV)/bin/python -m tests.bench.gpu_check

fuzz:
	@$(VENV)/bin/python -m tests.fuzz --kinds="$$CASES" --count="$$COUNT" --start="$$START"

check: lint
	@$(VENV)/bin/python -m pytest -q -n 2 --dist worksteal -m "not slow"

test:
	@$(VENV)/bin/python -m pytest -q -n 2 --dist worksteal

lint:
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

docs: $(DOCS)/.ready
	@NO_MKDOCS_2_WARNING=1 PIPELINE_PYTHON=$(VENV)/bin/python $(DOCS)/bin/python -m mkdocs build --strict --site-dir build/docs
	@echo build/docs/index.html

$(DOCS)/.ready: requirements-docs.lock
	@rm -rf .cache/docs-* && mkdir -p .cache && $(PYTHON) -m venv $(DOCS) && \
	 $(DOCS)/bin/python -m pip install --disable-pip-version-check --no-cache-dir --quiet --require-hashes --no-deps \
	     --requirement requirements-docs.lock >&2 && touch $@

$(READY):
	@command -v $(PYTHON) >/dev/null || { echo "PYTHON=$(PYTHON) is not on PATH; on Debian and Ubuntu: apt install python3.11 python3.11-venv$(call inherited,PYTHON)" >&2; exit 3; }
	@$(PYTHON) -P pipeline/installation/environment.py $@ $(WANTED)

lock:
	@mkdir -p .cache && folder=$$(mktemp -d .cache/lock.XXXXXX) && trap 'rm -rf "$$folder"' EXIT && \
	 $(PYTHON) -m venv "$$folder" && \
	 "$$folder/bin/python" -m pip install --disable-pip-version-check --no-cache-dir --quiet $(UV) >&2 && \
	 "$$folder/bin/python" -P pipeline/installation/locks.py "$$folder/bin/uv"

licenses:
	@$(VENV)/bin/python -m pipeline.installation.licenses

system-packages:
	@if [ "$$(id -u)" = 0 ]; then as=; else as=sudo; fi; \
	 $$as apt-get update -qq && $$as env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium openssh-server

clean:
	rm -rf $(VENV) .cache build .mypy_cache .ruff_cache .pytest_cache

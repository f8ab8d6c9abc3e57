# synthmill: the whole pipeline. `make` prints help. Works on GNU Make 3.81 (macOS) and 4.x.
#
# Every target that matters is a file: data/<run>/<track>/NN_stage.jsonl. $(*D) is the run, $(*F) the track. A rule's
# prerequisites are what its output hangs on: the input, that run's settings, the prompts, the stage's own code.
# Whether a stage runs again is decided here; whether an answer is paid again is decided by the reply store.
.DELETE_ON_ERROR:
.SUFFIXES:
.SECONDEXPANSION:
.DEFAULT_GOAL := help

RUN       ?= trial
APIS      ?=
BUDGET_USD ?=
LIMIT     ?= 0
PYTHON    ?= python3
ID        ?=

export APIS BUDGET_USD
export PYTHONPATH := $(CURDIR)

PY     := .venv/bin/python
GROUPS := core llm data embed mlx tinker dev
RUNS   := trial full
LOCKS  := $(GROUPS:%=docker/requirements/%.txt)

# out: the paths of one stage's output, for every run, for these tracks
out = $(foreach run,$(RUNS),$(foreach track,$(2),data/$(run)/$(track)/$(1).jsonl))
# stage: run one stage script on the target at hand
stage = $(PY) stages/$(1)/main.py $(if $(2),--in $(2)) --out $@ --config stages/$(1)/$(*D).toml --track $(*F) --limit $(LIMIT)
# again: `make stageN` runs that one stage although its output is up to date
again = $(if $(filter stage$(1),$(MAKECMDGOALS)),FORCE)
prompts = $(foreach name,$(2),stages/$(1)/prompts/$(name).txt)

# ------------------------------------------------------------------------------------------------ stages

$(call out,01_acquire,compression): data/%/01_acquire.jsonl: \
    stages/01_acquire/$$(*D).toml stages/01_acquire/main.py stages/01_acquire/extract.py \
    $$(call again,1) | $$(@D)/. .venv/.setup $$(if $$(filter full/%,$$*),preflight)
	$(call stage,01_acquire,)

$(call out,02_merge,compression): data/%/02_merge.jsonl: \
    data/%/01_acquire.jsonl stages/02_merge/$$(*D).toml stages/02_merge/main.py $$(call again,2)
	$(call stage,02_merge,$<)

$(call out,03_compress,compression): data/%/03_compress.jsonl: \
    data/%/02_merge.jsonl stages/03_compress/$$(*D).toml stages/03_compress/main.py \
    $(call prompts,03_compress,system user) $$(call again,3)
	$(call stage,03_compress,$<)

$(call out,04_validate,compression): data/%/04_validate.jsonl: \
    data/%/03_compress.jsonl stages/04_validate/$$(*D).toml stages/04_validate/main.py \
    $(call prompts,04_validate,system key_points implications explain write judge) $$(call again,4)
	$(call stage,04_validate,$<)

$(call out,10_embed,compression): data/%/10_embed.jsonl: \
    data/%/04_validate.jsonl stages/10_embed/$$(*D).toml stages/10_embed/main.py $$(call again,10)
	$(call stage,10_embed,$<)

$(call out,11_deduplicate,compression): data/%/11_deduplicate.jsonl: \
    data/%/10_embed.jsonl stages/11_deduplicate/$$(*D).toml stages/11_deduplicate/main.py $$(call again,11)
	$(call stage,11_deduplicate,$<)

$(call out,12_choose,compression): data/%/12_choose.jsonl: \
    data/%/11_deduplicate.jsonl stages/12_choose/$$(*D).toml stages/12_choose/main.py $$(call again,12)
	$(call stage,12_choose,$<)

$(call out,13_format,compression): data/%/13_format.jsonl: \
    data/%/12_choose.jsonl stages/13_format/$$(*D).toml stages/13_format/main.py stages/13_format/exports.py \
    $(call prompts,03_compress,system user) $$(call again,13)
	$(call stage,13_format,$<)

%/.:
	mkdir -p $@
.PRECIOUS: %/.

# ------------------------------------------------------------------------------------------------ what people type

.PHONY: FORCE help trial full compression setup lock test lint preflight estimate stats trace mock clean
.PHONY: stage1 stage2 stage3 stage4 stage10 stage11 stage12 stage13

trial: data/trial/compression/13_format.jsonl ## every track at small scale; no keys, no money (APIS=mock)
full: RUN = full
full: data/full/compression/13_format.jsonl ## every track at production scale; starts with preflight
compression: data/$(RUN)/compression/13_format.jsonl ## the compression track of RUN

stage1: data/$(RUN)/compression/01_acquire.jsonl ## acquire: sources to RawText, pinned, with licences
stage2: data/$(RUN)/compression/02_merge.jsonl ## merge: normalised, filtered, scrubbed, deduplicated
stage3: data/$(RUN)/compression/03_compress.jsonl ## compress: RawText to Pair, by a local model, an endpoint or a teacher
stage4: data/$(RUN)/compression/04_validate.jsonl ## validate: a model panel keeps task-equivalent pairs
stage10: data/$(RUN)/compression/10_embed.jsonl ## embed: vectors beside the records
stage11: data/$(RUN)/compression/11_deduplicate.jsonl ## deduplicate: near-duplicates out, cluster ids kept
stage12: data/$(RUN)/compression/12_choose.jsonl ## choose: the best, balanced by domain and source
stage13: data/$(RUN)/compression/13_format.jsonl ## format: training examples, splits, export directories

setup: .venv/.setup uv.lock ## the environment in .venv, from the hash-pinned exports, and uv.lock
lock: .venv/.setup ## after editing pyproject.toml: write uv.lock and docker/requirements/ anew
	$(PY) docker/lock.py

test: .venv/.setup uv.lock ## every test; touches no network but loopback
	$(PY) -m pytest
lint: .venv/.setup ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy shared docker/lock.py tests
	set -e; for stage in stages/*/; do MYPYPATH=$$stage:. $(PY) -m mypy $$stage/main.py; done

preflight: .venv/.setup ## everything RUN needs before anything is spent: keys, models, inputs, disk, budget
	$(PY) -m shared.preflight --run $(RUN)
estimate: .venv/.setup ## calls, tokens and dollars of RUN per stage, low / expected / high; spends nothing
	$(PY) -m shared.estimate --run $(RUN)
stats: .venv/.setup ## what RUN kept, rejected and spent, by stage, provider, model and day
	$(PY) -m shared.stats --run $(RUN)
trace: .venv/.setup ## the life of one record: make trace ID=<id>
	$(PY) -m shared.trace --run $(RUN) $(ID)
mock: .venv/.setup ## the stand-in cloud by hand, until Ctrl-C
	$(PY) -m shared.standin
clean: ## remove the outputs of RUN; paid answers in data/cache stay
	rm -rf data/$(RUN) models/$(RUN)

help: ## this text
	@awk 'BEGIN {print "synthmill: make TARGET [VARIABLE=value ...]\n\ntargets"} \
	  /^[a-z][a-z0-9]*:.*## / {name = $$1; sub(/:.*/, "", name); text = $$0; sub(/.*## /, "", text); printf "  %-13s %s\n", name, text}' \
	  $(firstword $(MAKEFILE_LIST))
	@printf '\nvariables\n'
	@printf '  %-13s %s\n' RUN 'trial or full: the scale (now: $(RUN))' \
	  APIS 'mock or live; default: live once there is a .env, else mock (now: $(APIS))' \
	  BUDGET_USD 'dollars that may ever be spent for RUN; default: no cap (now: $(BUDGET_USD))' \
	  LIMIT 'records each stage reads at most; 0 = all (now: $(LIMIT))' \
	  ID 'the record that make trace follows (now: $(ID))' \
	  PYTHON 'the Python (3.11 to 3.13) that set-up starts from (now: $(PYTHON))'

# ------------------------------------------------------------------------------------------------ set-up

.venv/.setup: $(LOCKS) docker/requirements/uv.txt docker/setup.py
	$(PYTHON) docker/setup.py $(GROUPS)
	touch $@
uv.lock: pyproject.toml .venv/.setup
	.venv/bin/uv lock --quiet --python $(PY)
	touch $@
FORCE:

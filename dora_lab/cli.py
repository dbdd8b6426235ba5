"""`dora-lab`: the grid of runs, the record of results, the real data, and the mini-world's pretraining."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from dora_lab.assignment_cli import app as assignment_app
from dora_lab.exits import told

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

app.add_typer(assignment_app, name="assignment")

ProfileOption = Annotated[str, typer.Option(help="Name of a profile, or path of a .yaml file.")]
RunsOption = Annotated[Path, typer.Option(help="Where runs are kept.")]


@app.command()
def profiles() -> None:
    """List the profiles."""
    from dora_lab.profiles import known_profiles, load_profile

    for name in known_profiles():
        typer.echo(f"{name:21} {load_profile(name).summary}")


@app.command()
def reproduce(
    profile: ProfileOption = "mini",
    seeds: Annotated[int | None, typer.Option(min=1, help="How many seeds: 0, 1, …")] = None,
    method: Annotated[list[str] | None, typer.Option(help="These methods; the profile's if left out.")] = None,
    rank: Annotated[list[int] | None, typer.Option(min=1, help="These ranks; the profile's if left out.")] = None,
    variant: Annotated[list[str] | None, typer.Option(help="These variants alone; all, and the plain runs.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at a time.")] = None,
    engine: Annotated[Literal["local", "snakemake"], typer.Option(help="What starts the runs.")] = "local",
    snakemake_profile: Annotated[
        str, typer.Option(help="Where Snakemake runs them: local, slurm, or the folder of another of its profiles.")
    ] = "local",
    runs_dir: RunsOption = Path("runs"),
) -> None:
    """Do the grid of runs and write the results table and figure to RUNS_DIR/PROFILE/figures. Resumes."""
    from dora_lab import cluster, pipeline
    from dora_lab.profiles import load_profile

    runs = runs_dir.resolve()
    with told(RuntimeError, kept="finished runs are kept"):
        loaded = load_profile(profile)
        specs = pipeline.grid(loaded, None if seeds is None else list(range(seeds)), method, rank, variant)
        pipeline.preflight(runs, specs, here=engine == "local")
        if engine == "local":
            summary = pipeline.run_grid(profile, specs, runs, jobs, typer.echo)
            pipeline.draw_results(profile, loaded, runs)
        else:
            summary = cluster.run_grid(profile, specs, runs, jobs, typer.echo, snakemake_profile)
            cluster.draw_results(profile, loaded, specs, runs)
    figures = runs / loaded.name / "figures"
    typer.echo((figures / "results.md").read_text())
    for line in pipeline.against_recorded(loaded, specs, runs_dir):
        typer.echo(line)
    typer.echo(f"table and figure: {figures}")
    if summary.failed:
        typer.echo(f"{len(summary.failed)} of {summary.total} runs failed:", err=True)
        for run_id, error in summary.failed.items():
            typer.echo(f"  {run_id}: {error}", err=True)
        raise typer.Exit(1)


@app.command()
def sweep(
    profile: ProfileOption = "mini",
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at a time.")] = None,
    runs_dir: RunsOption = Path("runs"),
) -> None:
    """Try every method at every rate of the profile's grid on validation data; print the best rates. Resumes.

    A run that is in the recorded sweep with the same settings is not done again.
    """
    from dora_lab.pipeline import RECORDED, preflight
    from dora_lab.profiles import load_profile
    from dora_lab.sweep import SWEEP, best_rates, read_sweep, run_sweep, sweep_specs

    with told(RuntimeError, kept="finished runs are kept"):
        loaded = load_profile(profile)
        specs = sweep_specs(loaded)
        preflight(runs_dir, specs)
        earlier = RECORDED / loaded.name / SWEEP
        recorded = read_sweep(earlier) if earlier.exists() else []
        rows = run_sweep(specs, runs_dir, jobs or loaded.jobs, typer.echo, recorded)
        chosen = best_rates(rows)
    typer.echo(f"all scores: {runs_dir / loaded.name / SWEEP}; the best mean of each, for the profile:")
    typer.echo("learning_rate:")
    for method in sorted(loaded.learning_rate):
        rates = ", ".join(f"{task}: {chosen[method, task]:.1e}" for task in loaded.tasks)
        typer.echo(f"  {method}: {{{rates}}}")


@app.command()
def record(profile: ProfileOption = "mini", runs_dir: RunsOption = Path("runs")) -> None:
    """Copy finished runs, without adapters, to data/results/PROFILE; those of a profile it extends are left out."""
    from dora_lab import pipeline
    from dora_lab.profiles import extended_profiles, load_profile
    from dora_lab.records import is_done, remove_repeats, run_folder

    with told():
        loaded, extended = load_profile(profile), [one.name for one in extended_profiles(profile)]
        count, target = pipeline.record_results(loaded, runs_dir), pipeline.RECORDED / loaded.name
        repeated = remove_repeats(target, [pipeline.RECORDED / name for name in extended])
    left_out = sum(is_done(run_folder(runs_dir, spec)) for spec in repeated)  # others were recorded earlier
    but = f"; {left_out} left out that are recorded already, as runs of {' or '.join(extended)}" if left_out else ""
    typer.echo(f"{count - left_out} runs recorded in {target}{but}")


@app.command()
def fetch(
    task: Annotated[list[str] | None, typer.Argument(help="These; all eight and commonsense_170k if left out.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="Fetch nothing; print every address, hash and place.")] = False,
) -> None:
    """Fetch LLM-Adapters' task files once, verify them, check every record. Kept in DORA_LAB_CACHE."""
    from dora_lab.data import count_fetched
    from dora_lab.fetch import BASE_URL, files_of, llm_adapters_folder
    from dora_lab.tasks import MIXTURE, TASKS

    folder = llm_adapters_folder()
    with told():
        needed = {file: (of, split) for name in task or [*TASKS, MIXTURE] for of, split, file in files_of(name)}
        for file, (of, split) in needed.items():
            if listed:
                typer.echo(f"{BASE_URL}{file.path}\n    {file.expected or 'no hash known'}")
                typer.echo(f"    -> {folder / file.path}")
            else:
                typer.echo(f"{folder / file.path}: {count_fetched(of, split)} records")


@app.command()
def pretrain(
    out: Annotated[Path, typer.Argument(help="Folder for tasks/, base/ and pretraining.json.")],
    threads: Annotated[int, typer.Option(min=1)] = 2,
    compile: Annotated[bool, typer.Option(help="Use torch.compile: faster, needs a C++ compiler.")] = False,
) -> None:
    """Make the mini-world's task files, tokenizer and base model again from the one fixed schedule. Resumes."""
    from dora_lab.miniworld.pretraining import pretrain as run

    with told():
        run(out, threads=threads, compile=compile)


@app.command()
def spectra(
    model: Annotated[str, typer.Option(help="mini-world, or a folder with a model's .safetensors files.")],
    out: Annotated[Path, typer.Option(help="CSV file to write.")] = Path("spectra.csv"),
    target: Annotated[
        list[str] | None, typer.Option(help="Linear layers; q, k, v, up and down_proj if left out.")
    ] = None,
) -> None:
    """Stable and effective rank of every weight, one matrix in memory at a time. Resumes."""
    from dora_lab.adapter_config import LLAMA_TARGETS
    from dora_lab.models import base_folder
    from dora_lab.spectra import write_spectra

    with told(kept="finished rows are kept"):
        folder = base_folder(model)
        if folder is None:
            raise ValueError(f"{model} is no folder: fetch the model and give its folder, beginning with ./ or /")
        rows = write_spectra(folder, out, target or LLAMA_TARGETS, typer.echo)
    typer.echo(f"{len(rows)} weights: {out}")


@app.command()
def allocate(
    out: Annotated[Path, typer.Argument(help="Profile to write, NAME.yaml: a variant for every criterion and budget.")],
    profile: ProfileOption = "mini",
    task: Annotated[list[str] | None, typer.Option(help="These tasks; the profile's if left out.")] = None,
    rank: Annotated[list[int] | None, typer.Option(min=1, help="Budgets, as uniform ranks; 2 and 4.")] = None,
    method: Annotated[str, typer.Option(help="lora or dora.")] = "dora",
) -> None:
    """Choose a rank for every module by each criterion at equal parameters; write a profile that extends PROFILE."""
    from dataclasses import replace

    from pydantic import ValidationError

    from dora_lab.files import prepare_file, write_text
    from dora_lab.profiles import explain, load_profile
    from dora_lab.rank_study import allocate_all, profile_text

    with told():
        prepare_file(out)
        loaded = load_profile(profile)
        try:
            loaded = replace(loaded, tasks=task or loaded.tasks)
        except ValidationError as error:
            raise ValueError(explain(error)) from error
        found = allocate_all(loaded, rank or [2, 4], method, report=typer.echo)
        extends = str(Path(profile).resolve()) if Path(profile).is_file() else profile
        write_text(out, profile_text(out.stem, extends, loaded, method, found))
    typer.echo(f"written: {out}")


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="llama-7b, llama3-8b, …, or a folder with a config.json.")] = "llama-7b",
    method: Annotated[str, typer.Option(help="full, lora, dora or dora-peft.")] = "dora",
    rank: Annotated[int, typer.Option(help="Rank of the adapter.")] = 32,
    batch: Annotated[int, typer.Option(help="Sequences of a micro-batch.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens of a sequence, padding included.")] = 512,
    target: Annotated[
        list[str] | None, typer.Option(help="Adapted layers; q, k, v, up and down_proj if left out.")
    ] = None,
    dropout: Annotated[float, typer.Option(help="On what the adapter reads.")] = 0.05,
    checkpointing: Annotated[bool, typer.Option(help="Gradient checkpointing of every layer.")] = True,
    base_precision: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, int8, nf4 or nf4-double.")
    ] = "bfloat16",
    optimizer: Annotated[str, typer.Option(help="adamw, adamw-8bit or paged-adamw.")] = "adamw",
    accumulation: Annotated[int, typer.Option(help="Micro-batches of a step.")] = 1,
    logit_columns: Annotated[int | None, typer.Option(help="Positions that go through the output layer.")] = None,
) -> None:
    """Plan the GPU memory of a training run from shapes alone: what it goes to, where it fits, what would save most."""
    from dora_lab.adapters import LLAMA_TARGETS
    from dora_lab.memory import changes, plan_rows
    from dora_lab.memory import plan as plan_memory
    from dora_lab.shapes import find_shape

    choices = {"method": method, "rank": rank, "batch": batch, "length": length, "dropout": dropout}
    choices |= {"target_modules": tuple(target or LLAMA_TARGETS), "checkpointing": checkpointing}
    choices |= {"base_precision": base_precision, "optimizer": optimizer, "accumulation": accumulation}
    with told():
        planned = plan_memory(find_shape(model), logit_columns=logit_columns, **choices)
    typer.echo(f"{planned.job.shape.name}: {planned.job.name}")
    for row in plan_rows(planned):
        typer.echo(f"  {row['part']:12} {row['bytes'] / 1e9:8.2f} GB {row['percent']:5.1f} %")
    typer.echo(f"  {'total':12} {planned.total / 1e9:8.2f} GB at {planned.peak_at}; 1 GB more is kept free")
    typer.echo("fits on: " + ", ".join(f"{size} GB {'yes' if fits else 'no'}" for size, fits in planned.fits.items()))
    typer.echo("it does not depend on the number of examples; single changes that save:")
    for name, changed in changes(planned):
        typer.echo(f"  {name:40} {changed.total / 1e9:8.2f} GB")


@app.command()
def bench(
    out: Annotated[Path, typer.Argument(help="JSON file to write.")],
    turns: Annotated[int, typer.Option(min=2, help="Measured steps of every variant.")] = 15,
) -> None:
    """Measure steps and bytes of LoRA and DoRA, ours and PEFT's, in turns, and write them to OUT."""
    from dora_lab.bench import run
    from dora_lab.measured import write_measured

    with told(kept="finished settings are kept"):
        write_measured(lambda partial: run(turns=turns, report=typer.echo, partial=partial), out)
    typer.echo(f"written: {out}")


@app.command()
def scaling(
    out: Annotated[Path, typer.Argument(help="JSON file to write.")] = Path("data/results/scaling.json"),
) -> None:
    """Measure cells an hour and the overhead of a cell on the smoke profile; plan 1,000 LLaMA-7B cells on paper."""
    from dora_lab.files import prepare_file
    from dora_lab.measured import write
    from dora_lab.scaling import measure, on_paper, table

    with told(RuntimeError):
        prepare_file(out)
        measured = measure(report=typer.echo)
        write(measured, out)
    for row in table(measured):
        typer.echo(f"| {' | '.join(row)} |")
    typer.echo("1,000 cells of LLaMA-7B on 64 GPUs, on paper:")
    for line in on_paper():
        typer.echo(line)
    typer.echo(f"written: {out}")


@app.command()
def claims(
    figures_dir: Annotated[Path, typer.Option(help="Where claims.md is written.")] = Path("figures"),
    fetch: Annotated[bool, typer.Option("--fetch", help="Get the report's raw outputs first.")] = False,
) -> None:
    """Test every claim of data/claims.yaml and write FIGURES_DIR/claims.md: verdict, number, measured on what."""
    from dora_lab.claims import read_claims, run_claims, write_claims
    from dora_lab.files import prepare_folder
    from dora_lab.report_outputs import FILES, fetch_outputs

    with told():
        prepare_folder(figures_dir, "another folder as --figures-dir")
        for method in FILES if fetch else ():
            typer.echo(f"{fetch_outputs(method)}: verified")
        page = write_claims(run_claims(read_claims(), typer.echo), figures_dir)
    typer.echo(f"the claims: {page}")


@app.command("measure-7b")
def measure_7b(
    out: Annotated[Path, typer.Argument(help="JSON file to write.")] = Path("data/results/gpu/llama-7b.json"),
    model: Annotated[str, typer.Option(help="A shape: llama-7b, llama3-8b, …")] = "llama-7b",
    variant: Annotated[list[str] | None, typer.Option(help="lora, dora, qdora, dora-peft; all if left out.")] = None,
    rank: Annotated[int, typer.Option(min=1)] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Sequences a step.")] = 16,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 512,
    logit_columns: Annotated[int | None, typer.Option(min=1, help="Labelled positions; all if left out.")] = None,
    cap_gb: Annotated[float, typer.Option(help="GB of the GPU that may be used.")] = 40.0,
    steps: Annotated[int, typer.Option(min=1, help="Measured steps of every variant.")] = 10,
) -> None:
    """Measure memory and speed of training LLaMA-7B's shape, random weights, beside the plan; write to OUT. Resumes."""
    from dora_lab.measure import Workload, measure
    from dora_lab.measured import write_measured

    work = Workload(model, rank, batch, length, logit_columns=logit_columns, cap_gb=cap_gb)
    variants = tuple(variant) if variant else None
    with told(kept="finished variants are kept"):
        write_measured(lambda partial: measure(work, variants, steps, typer.echo, partial), out)
    typer.echo(f"written: {out}")


@app.command()
def book(
    out: Annotated[Path, typer.Argument(help="Folder for the site; its pages are in OUT/html.")] = Path("build/book"),
    profile: ProfileOption = "mini",
) -> None:
    """Run every chapter headless and set the book: static HTML that needs no network. Resumes."""
    from dora_lab.book import build

    with told(RuntimeError, kept="finished chapters are kept"):
        index = build(out.resolve(), profile, typer.echo)
    typer.echo(f"the book: {index}")

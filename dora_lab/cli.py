"""`dora-lab`: the grid of runs, the record of results, and the mini-world's pretraining."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

ProfileOption = Annotated[str, typer.Option(help="Name of a profile, or path of a .yaml file.")]
RunsOption = Annotated[Path, typer.Option(help="Where runs are kept.")]


def _fail(error: Exception) -> None:
    typer.echo(f"error: {error}", err=True)
    raise typer.Exit(2)


@app.command()
def profiles() -> None:
    """List the profiles."""
    from dora_lab.profiles import known_profiles, load_profile

    for name in known_profiles():
        typer.echo(f"{name:12} {load_profile(name).summary}")


@app.command()
def reproduce(
    profile: ProfileOption = "mini",
    seeds: Annotated[int | None, typer.Option(min=1, help="How many seeds: 0, 1, …")] = None,
    method: Annotated[list[str] | None, typer.Option(help="These methods; the profile's if left out.")] = None,
    rank: Annotated[list[int] | None, typer.Option(min=1, help="These ranks; the profile's if left out.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at a time.")] = None,
    runs_dir: RunsOption = Path("runs"),
) -> None:
    """Do the grid of runs and write the results table and figure to RUNS_DIR/PROFILE/figures. Resumes."""
    from dora_lab import pipeline
    from dora_lab.profiles import load_profile

    try:
        loaded = load_profile(profile)
        pipeline.preflight(runs_dir)
        specs = pipeline.grid(loaded, None if seeds is None else list(range(seeds)), method, rank)
        summary = pipeline.run_grid(profile, specs, runs_dir.resolve(), jobs, typer.echo)
        figures = runs_dir.resolve() / loaded.name / "figures"
        for chapter in pipeline.RESULT_CHAPTERS:
            pipeline.run_chapter(
                chapter,
                runs_dir.resolve() / loaded.name / f"{chapter}.ipynb",
                profile=profile,
                runs_dir=str(runs_dir.resolve()),
                figures_dir=str(figures),
            )
    except (ValueError, OSError, RuntimeError) as error:
        _fail(error)
    except KeyboardInterrupt:
        typer.echo("interrupted: finished runs are kept; the same command goes on from here", err=True)
        raise typer.Exit(130) from None
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

    try:
        loaded = load_profile(profile)
        preflight(runs_dir)
        earlier = RECORDED / loaded.name / SWEEP
        recorded = read_sweep(earlier) if earlier.exists() else []
        rows = run_sweep(sweep_specs(loaded), runs_dir, jobs, typer.echo, recorded)
        chosen = best_rates(rows)
    except (ValueError, OSError) as error:
        _fail(error)
    except KeyboardInterrupt:
        typer.echo("interrupted: finished runs are kept; the same command goes on from here", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"all scores: {runs_dir / loaded.name / SWEEP}; the best mean of each, for the profile:")
    typer.echo("learning_rate:")
    for method in sorted(loaded.learning_rate):
        rates = ", ".join(f"{task}: {chosen[method, task]:.1e}" for task in loaded.tasks)
        typer.echo(f"  {method}: {{{rates}}}")


@app.command()
def record(profile: ProfileOption = "mini", runs_dir: RunsOption = Path("runs")) -> None:
    """Copy finished runs, without adapters, to data/results/PROFILE."""
    from dora_lab import pipeline
    from dora_lab.profiles import load_profile

    try:
        count = pipeline.record_results(load_profile(profile), runs_dir)
    except (ValueError, OSError) as error:
        _fail(error)
    typer.echo(f"{count} runs recorded in {pipeline.RECORDED / profile}")


@app.command()
def pretrain(
    out: Annotated[Path, typer.Argument(help="Folder for tasks/, base/ and pretraining.json.")],
    threads: Annotated[int, typer.Option(min=1)] = 2,
    compile: Annotated[bool, typer.Option(help="Use torch.compile: faster, needs a C++ compiler.")] = False,
) -> None:
    """Make the mini-world's task files, tokenizer and base model again from the one fixed schedule. Resumes."""
    from dora_lab.miniworld.pretraining import pretrain as run

    try:
        run(out, threads=threads, compile=compile)
    except (ValueError, OSError) as error:
        _fail(error)


@app.command()
def bench(
    out: Annotated[Path, typer.Argument(help="JSON file to write.")],
    turns: Annotated[int, typer.Option(min=2, help="Measured steps of every variant.")] = 15,
) -> None:
    """Measure steps and bytes of LoRA and DoRA, ours and PEFT's, in turns, and write them to OUT."""
    from dora_lab.bench import run, write

    try:
        write(run(turns=turns, report=typer.echo), out)
    except (ValueError, OSError) as error:
        _fail(error)
    typer.echo(f"written: {out}")

"""`dora-lab assignment …`: hand out, hand in, grade."""

from pathlib import Path
from typing import Annotated

import typer

from dora_lab.exits import told

app = typer.Typer(no_args_is_help=True, help="Build assignments from the chapters, and grade what comes back.")

NumberArgument = Annotated[str, typer.Argument(help="01, 02, 03 or 04; `assignment list` says what they are.")]
OutOption = Annotated[Path, typer.Option("--out", help="Folder to write to.")]


@app.command("list")
def list_assignments() -> None:
    """The assignments: points, hours, what each examines, and the instructor's page."""
    from dora_lab.assignments.build import cut, points_of
    from dora_lab.assignments.catalogue import ASSIGNMENTS

    for a in ASSIGNMENTS:
        typer.echo(f"{a.number}  {a.title}: {sum(points_of(cut(a)).values())} points, {a.hours} hours; {a.examines}")
        typer.echo(f"    {a.guide}")


@app.command()
def build(number: NumberArgument, out: OutOption) -> None:
    """Write a student's copy: stubs for solutions, no hidden tests."""
    from dora_lab.assignments.build import build as build_assignment
    from dora_lab.assignments.catalogue import find_assignment

    with told():
        path = build_assignment(find_assignment(number), out)
    typer.echo(f"for students: {path}")


@app.command()
def samples(number: NumberArgument, out: OutOption) -> None:
    """Write sample submissions (right, half, hostile, damaged, broken) to try grading with. They hold solutions."""
    from dora_lab.assignments.catalogue import find_assignment
    from dora_lab.assignments.samples import write_samples

    with told():
        write_samples(find_assignment(number), out, typer.echo)


@app.command()
def grade(
    submissions: Annotated[Path, typer.Argument(help="Folder of <student id>/<assignment>.ipynb.", exists=True)],
    out: OutOption,
    assignment: Annotated[str | None, typer.Option(help="Its number; read from the notebooks if left out.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Submissions at a time.")] = 2,
    seconds: Annotated[float, typer.Option(min=1, help="For a cell, or a call of a student's function.")] = 20.0,
    memory_gb: Annotated[float, typer.Option(min=0.1, help="What a student's code may allocate.")] = 2.0,
) -> None:
    """Grade submissions with nbgrader, shut off from network and tests: OUT/grades.csv, OUT/feedback. Resumes."""
    from dora_lab.assignments.catalogue import find_assignment
    from dora_lab.assignments.grade import grade as grade_submissions

    with told(RuntimeError, kept="what is graded is kept"):
        chosen = find_assignment(assignment) if assignment else None
        memory_bytes = int(memory_gb * 2**30)
        table = grade_submissions(submissions, out, chosen, jobs, seconds, memory_bytes, typer.echo)
    typer.echo(f"grades: {table}; a page for each student: {out / 'feedback'}")

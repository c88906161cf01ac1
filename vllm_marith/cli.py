"""`marith`: the command.

    marith models     make the embedded models, or list them
    marith demo       watch formulas steer a model on this machine
    marith chat       talk to a server's formula
    marith explain    what a formula means, without running it
    marith import     a formula saved by the paper's reference implementation, as a preset
    marith check      whether this environment can serve formulas
    marith bench      the benchmarks of a checkout
    marith eval       what formulas do to texts, measured, with a report

Exit codes: 0 done; 1 a mistake or a missing part, told in a sentence; 2 wrong usage; 130 interrupted.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vllm_marith import cli_distributed
from vllm_marith.distributed.errors import DeploymentError
from vllm_marith.importing import SavedFormulaError, preset_name, read_saved
from vllm_marith.language import Formula, FormulaError, PresetError, Presets, parse_request
from vllm_marith.models import ARTEFACTS, ModelsError, Paths, default_home, ensure
from vllm_marith.models.store import is_made, manifest, summary

app = typer.Typer(
    name="marith",
    help="Language-model arithmetic for vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

INTERRUPTED = 130
"""What a shell reports for a process that Ctrl-C ended."""

HomeOption = Annotated[
    Path | None,
    typer.Option(help="Where the models are kept (default: MARITH_HOME or ~/.cache/vllm-marith)."),
]


class UserError(Exception):
    """A mistake of the user's, or something missing; the message is all there is to print."""


def main() -> None:
    """Entry point of the `marith` script."""
    try:
        app(prog_name="marith")
    except (UserError, DeploymentError, FormulaError, PresetError, ModelsError) as error:
        print(f"marith: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader of our output, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


@app.command()
def models(
    home: HomeOption = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help=f"Make only these, and what they need: {', '.join(ARTEFACTS)}.  Repeatable."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Make them again even if they are there.")] = False,
    listing: Annotated[bool, typer.Option("--list", help="Only show what is there.")] = False,
) -> None:
    """Make the small embedded models from text on this machine: minutes once, nothing afterwards."""
    if listing:
        Console().print(_inventory(Paths.under(home or default_home())))
        return
    names = [name.strip() for value in only for name in value.split(",")] if only else None
    print(ensure(home, only=names, force=force).home)


@app.command()
def demo(
    tokens: Annotated[int, typer.Option(min=8, max=256, help="Length of each text.")] = 64,
    samples: Annotated[int, typer.Option(min=2, max=1000, help="Texts per formula to judge.")] = 64,
    seed: Annotated[int, typer.Option(help="Another seed, other texts.")] = 0,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="Of sampling.")] = 0.7,
    home: HomeOption = None,
) -> None:
    """Steer a small model with formulas, on this machine and through vLLM, and measure what happened.

    The first run makes the models (about three minutes on two cores); later runs take seconds.
    """
    if find_spec("vllm") is None:  # said before minutes are spent on models
        raise UserError(
            "the demo needs vLLM; pip install 'vllm-marith[cpu]' or 'vllm-marith[cuda]' brings it"
        )
    from vllm_marith.demo import run
    from vllm_marith.engine.plugin import UnsupportedError

    try:
        run(home, tokens=tokens, samples=samples, seed=seed, temperature=temperature)
    except UnsupportedError as error:
        raise UserError(str(error)) from error


@app.command()
def chat(
    url: Annotated[str, typer.Option(help="The server.")] = "http://localhost:8000",
    formula: Annotated[
        str | None,
        typer.Option(help="Over the terms of the server's presets, a preset's name, or a request's JSON."),
    ] = None,
    terms: Annotated[
        str | None, typer.Option(help="""Terms as JSON: '{"child": {"system": "You are a child."}}'.""")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="Of sampling.")] = 0.7,
    api_key: Annotated[
        str, typer.Option(envvar="OPENAI_API_KEY", help="The server's, if it has one.", show_envvar=True)
    ] = "",
) -> None:
    """Talk to a server's formula; the words are coloured by the term that spoke most for them."""
    from vllm_marith.chat import ChatError, Server, run

    request: dict[str, Any] | None = None
    if formula is not None:
        is_json = formula.lstrip().startswith("{")
        request = _json_object(formula, "--formula") if is_json else {"formula": formula}
        if terms is not None:
            request["terms"] = _json_object(terms, "--terms")
    try:
        run(Server(url, api_key), request, {"max_tokens": tokens, "temperature": temperature})
    except ChatError as error:
        raise UserError(str(error).removeprefix("marith: ")) from None


@app.command()
def explain(
    formula: Annotated[str, typer.Argument(help="Such as 'child - 0.6*adult', or a request's JSON.")],
    terms: Annotated[
        str | None, typer.Option(help="""Terms as JSON: '{"child": {"system": "You are a child."}}'.""")
    ] = None,
    presets: Annotated[
        list[Path] | None,
        typer.Option(
            help="A folder of presets; every name must then be defined, as on a server.  Repeatable."
        ),
    ] = None,
    normalize: Annotated[str | None, typer.Option(help="sum (the default) or none.")] = None,
) -> None:
    """Print what a formula means: weights, terms and the program that a step runs; or why it is refused."""
    print(_formula(formula, terms, presets, normalize).explain())


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="What `save` or `save_pretrained` wrote there.")],
    output: Annotated[
        Path | None, typer.Option(help="Where to write the preset; its name is the file's.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Which of the file's models the server serves (default: its default or leading one)."
        ),
    ] = None,
) -> None:
    """Turn a formula saved by the paper's reference implementation into a preset's YAML.

    Nothing in the file is executed; what has no counterpart here is refused with its place in the file.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    name = preset_name((output or file).stem)
    try:
        preset = read_saved(text, base=base, name=name).to_yaml(name)
    except SavedFormulaError as error:
        raise UserError(f"{file}: {error}") from None
    if output is None:
        print(preset, end="")
        return
    try:
        output.write_text(preset, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error}") from None


@app.command()
def check() -> None:
    """Say whether this environment can serve formulas; exit code 1 if not."""
    report: list[tuple[str, bool, str]] = [
        (
            "python",
            (3, 11) <= sys.version_info[:2] < (3, 14),
            f"{platform.python_version()}; 3.11 to 3.13 are supported",
        )
    ]
    try:
        from vllm_marith.engine.plugin import environment_report
    except ImportError as error:
        report.append(("engine", False, f"cannot be imported: {error}"))
    else:
        report += environment_report()
    paths = Paths.under(default_home())
    made = [name for name in ARTEFACTS if is_made(name, paths.home)]
    told = f"{len(made)} of {len(ARTEFACTS)} made in {paths.home}"
    report.append(
        ("models", True, told if len(made) == len(ARTEFACTS) else f"{told}; `marith models` makes all")
    )
    table = Table.grid(padding=(0, 2))
    for name, fine, sentence in report:
        table.add_row("[green]ok[/]" if fine else "[red]no[/]", name, sentence)
    Console().print(table)
    if not all(fine for _, fine, _ in report):
        raise typer.Exit(1)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Run the benchmarks of a checkout; arguments are passed on (`marith bench -- --help` lists them)."""
    script = Path(__file__).resolve().parents[1] / "scripts" / "bench.py"
    if not script.is_file():
        raise UserError(
            f"the benchmarks are part of a checkout of vllm-marith (scripts/bench.py); there is no {script}"
        )
    raise typer.Exit(subprocess.call([sys.executable, str(script), *context.args]))


@app.command("eval")
def eval_(
    report: Annotated[Path, typer.Option(help="The report, one HTML file.")] = Path("evaluation.html"),
    quick: Annotated[bool, typer.Option("--quick", help="A sixth of the texts.")] = False,
    samples: Annotated[
        int | None, typer.Option(min=2, help="Texts for each arm and seed; 96, or 16 with --quick.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Separated by commas.")] = "0,1,2",
    scenario: Annotated[
        str | None,
        typer.Option(
            help="embedded, instruct, or a YAML file like them (default: embedded; with --model, instruct)."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Another model: a directory or a name on the hub.")
    ] = None,
    constituent: Annotated[
        list[str] | None, typer.Option(help="NAME=MODEL, a further model of the scenario's.  Repeatable.")
    ] = None,
    classifier: Annotated[
        list[str] | None, typer.Option(help="NAME=MODEL, a classifier that formulas use.  Repeatable.")
    ] = None,
    judge: Annotated[
        list[str] | None, typer.Option(help="AXIS=MODEL, the classifier that judges an axis.  Repeatable.")
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="Keep every text with its labels and likelihood here, as JSON.")
    ] = None,
    again: Annotated[
        Path | None, typer.Option("--from", help="Write nothing: make the report again from such a file.")
    ] = None,
    figures: Annotated[Path | None, typer.Option(help="A folder for the figures, as PNG.")] = None,
    home: HomeOption = None,
) -> None:
    """Measure what formulas do: control, weights, combinations, coherence; with intervals, in one report.

    The embedded models are made first if they are not there (about four minutes on two cores).
    """
    from vllm_marith.evaluation import Results, Scenario, ScenarioError, Sizes, evaluate

    for package in ("matplotlib", "jinja2"):  # said before minutes are spent
        if find_spec(package) is None:
            raise UserError(f"the report needs {package}; pip install 'vllm-marith[eval]' brings it")
    for file in filter(None, (report, results, figures)):
        if not file.resolve().parent.is_dir():
            raise UserError(f"there is no folder {file.resolve().parent} to write {file.name} to")
    if again is None and find_spec("vllm") is None:
        raise UserError("it needs vLLM; pip install 'vllm-marith[cpu]' or 'vllm-marith[cuda]' brings it")
    try:
        if again is not None:
            found = Results.read(again)
        else:
            from vllm_marith.engine.plugin import UnsupportedError

            chosen = Scenario.load(scenario or ("instruct" if model else "embedded")).with_models(
                model,
                _pairs(constituent, "--constituent"),
                _pairs(classifier, "--classifier"),
                _pairs(judge, "--judge"),
            )
            sizes = Sizes(samples or (16 if quick else 96), _seeds(seeds))
            try:
                found = evaluate(chosen, sizes, home)
            except UnsupportedError as error:
                raise UserError(str(error)) from error
    except ScenarioError as error:
        raise UserError(str(error)) from None
    from vllm_marith.evaluation.report import html, summary, write_figures
    from vllm_marith.evaluation.sections import sections

    parts = sections(found)
    try:
        if results is not None and again is None:
            found.save(results)
        report.write_text(html(found, parts), encoding="utf-8")
        if figures is not None:
            write_figures(parts, figures)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be written: {error.strerror}") from None
    Console().print(summary(parts), highlight=False, markup=False)
    print(f"\nThe report: {report}")


app.command(context_settings=cli_distributed.PASS_ON)(cli_distributed.deploy)
app.command()(cli_distributed.plan)


def _seeds(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(seed) for seed in text.split(","))
    except ValueError:
        raise UserError("--seeds are whole numbers separated by commas, such as 0,1,2") from None
    if len(set(found)) != len(found):
        raise UserError("--seeds has a seed twice")
    return found


def _pairs(values: list[str] | None, option: str) -> dict[str, str]:
    """NAME=VALUE options."""
    found = dict(value.partition("=")[::2] for value in values or [])
    if not all(found.values()):
        raise UserError(f"{option} is NAME=MODEL")
    return found


def _formula(text: str, terms: str | None, presets: list[Path] | None, normalize: str | None) -> Formula:
    """The formula of `explain`'s arguments."""
    if text.lstrip().startswith("{"):
        if terms or normalize:
            raise UserError(
                "a request's JSON has its own terms and normalize; --terms and --normalize do not apply"
            )
        return parse_request(text, presets=Presets.load(*presets) if presets else None)
    defined = _json_object(terms, "--terms") if terms else {}
    if not presets:
        return Formula.parse(text, defined, normalize or "sum").check()
    request = {"formula": text, "terms": defined} | ({"normalize": normalize} if normalize else {})
    return parse_request(json.dumps(request), presets=Presets.load(*presets))


def _json_object(text: str, option: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{option} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{option} must be a JSON object from names to terms")
    return value


def _inventory(paths: Paths) -> Table:
    """What is made, how long it took and what it measured."""
    table = Table(title=str(paths.home), title_justify="left", box=None)
    for column in ("model", "state", "seconds", "on held-out text"):
        table.add_column(column, justify="right" if column == "seconds" else "left")
    for name in ARTEFACTS:
        found = manifest(paths.home / name)
        state = "made" if is_made(name, paths.home) else "outdated" if found else "missing"
        seconds = f"{found['seconds']:.0f}" if found else ""
        table.add_row(name, state, seconds, summary(found.get("held_out", {})))
    return table


if __name__ == "__main__":
    main()

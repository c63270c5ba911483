"""The command line: words to calls. In: arguments. Out: one clear message or one JSON object, and an exit code.

Nothing is decided here but defaults. Each command imports what it needs when it runs, so that help is instant.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from rayrec.bench.commands import bench_app
from rayrec.config import Config, PrepareConfig, ServeConfig, preset
from rayrec.errors import RayrecError, UsageError
from rayrec.options import Json, Seed, Set, print_json
from rayrec.progress import step
from rayrec.settings import with_file, with_settings

app = typer.Typer(
    help="A real-time recommender on Ray: logs and product images in, a live personal ranking out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


INTERRUPTED = 130


class Split(str, Enum):
    """Targets to judge on."""

    TEST = "test"
    VALID = "valid"


bundles_app = typer.Typer(help="Look at trained bundles.", no_args_is_help=True)
app.add_typer(bundles_app, name="bundles")
app.add_typer(bench_app, name="bench")
events_app = typer.Typer(help="The log of what was served and done.", no_args_is_help=True)
app.add_typer(events_app, name="events")
experiment_app = typer.Typer(help="Two versions before live visitors.", no_args_is_help=True)
app.add_typer(experiment_app, name="experiment")

Port = Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")]
State = Annotated[str | None, typer.Option(help="sqlite:///PATH (default: beside the bundle) or redis://HOST:PORT/0.")]

ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML of settings: scenes, their rules, all that --set can change.")
]
TrainFile = Annotated[
    Path | None, typer.Option("--config", help="YAML of settings over the preset's, as tune writes its best.")
]


@app.command()
def demo(
    work: Annotated[Path | None, typer.Option(help="Where to work (default: ./rayrec-demo).")] = None,
    port: Port = 8000,
    exit_: Annotated[bool, typer.Option("--exit", help="Run a scripted shopper and stop.")] = False,
    as_json: Json = False,
) -> None:
    """A sample shop, prepared, trained on, judged and served: all of rayrec in one go."""
    from rayrec.demo import run

    result = run(work or Path("rayrec-demo"), port, exit_)
    if as_json:
        print_json(result)


@app.command()
def sample(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that does not exist yet, or is empty.")],
    users: Annotated[int, typer.Option(min=1)] = 2000,
    items: Annotated[int, typer.Option(min=1)] = 600,
    events: Annotated[int, typer.Option(min=1)] = 60_000,
    seed: Seed = 0,
    dirty: Annotated[bool, typer.Option("--dirty", help="Add a little of every kind of dirt.")] = False,
    as_json: Json = False,
) -> None:
    """Write a shop whose right answers are known: logs, catalogue, pictures and truth.json."""
    from dataclasses import asdict

    from rayrec.data.sample import SampleConfig, write_shop

    report = write_shop(folder, SampleConfig(users=users, items=items, events=events, seed=seed, dirty=dirty))
    step(f"{report.rows} rows of {report.users} users on {report.items} items in {report.folder}")
    if as_json:
        print_json(asdict(report))


@app.command("import")
def import_(
    name: Annotated[str | None, typer.Argument(help="A public format; --list names them.")] = None,
    src: Annotated[Path | None, typer.Argument(help="What was downloaded: a file, an archive or a folder.")] = None,
    folder: Annotated[Path | None, typer.Argument(metavar="DIR", help="The raw folder to write.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the formats.")] = False,
) -> None:
    """Turn a public data set into a raw folder."""
    from rayrec.data.sources import SOURCES, import_source

    if list_:
        for known, source in SOURCES.items():
            typer.echo(f"{known:<22} {source.description}")
        return
    if name is None or src is None or folder is None:
        raise UsageError("give NAME, SRC and DIR: rayrec import NAME SRC DIR; rayrec import --list names the formats")
    import_source(name, src, folder)


@app.command()
def prepare(
    raw: Annotated[str, typer.Argument(help="The raw folder, file or glob, or a URI.")],
    dataset: Annotated[str, typer.Argument(help="The dataset folder to write.")],
    map_: Annotated[Path | None, typer.Option("--map", help="YAML that names your columns and actions.")] = None,
    add: Annotated[bool, typer.Option("--add", help="Add to DATASET what it does not know of RAW yet.")] = False,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Clean logs, catalogue and images into a dataset. Every row is kept, collapsed, or rejected with its reason."""
    from rayrec.cluster import disconnect, require_absolute
    from rayrec.data.mapping import load_mapping
    from rayrec.data.pipelines import add as run_on
    from rayrec.data.pipelines import prepare as run

    require_absolute(raw, dataset)
    config = with_settings(PrepareConfig(), set_ or [])
    mapping = load_mapping(map_) if map_ else None
    try:
        report = run_on(raw, dataset, set_ or [], mapping) if add else run(raw, dataset, config, mapping)
    finally:
        disconnect()
    _say_prepared(report, dataset)
    if as_json:
        print_json(report)


@app.command()
def train(
    dataset: Annotated[str, typer.Argument(help="A dataset folder made by prepare.")],
    bundles: Annotated[str, typer.Argument(help="Where bundles are kept.")],
    preset_: Annotated[str, typer.Option("--preset", help="small, wide, base or paper.")] = "small",
    workers: Annotated[int | None, typer.Option(min=1, help="Data-parallel workers.")] = None,
    min_workers: Annotated[
        int | None, typer.Option(min=1, help="Go on with as few while nodes are gone; take more when they are back.")
    ] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="One GPU a worker.")] = False,
    epochs: Annotated[int | None, typer.Option(min=1)] = None,
    seed: Annotated[int | None, typer.Option(help="The same gives the same result on as many cores.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the training that did not finish, if there is one.")
    ] = False,
    from_: Annotated[str | None, typer.Option("--from", metavar="BUNDLE", help="Start from its weights.")] = None,
    no_publish: Annotated[bool, typer.Option("--no-publish", help="Do not make the bundle the live one.")] = False,
    config_: TrainFile = None,
    wait: Annotated[float, typer.Option(min=0, help="Seconds that a cluster may take to add nodes.")] = 0.0,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Train the CNN + LSTM ranker, data-parallel, into a bundle."""
    from rayrec.cluster import disconnect, require_absolute
    from rayrec.training.trainer import train as run

    require_absolute(dataset, bundles, from_)
    given = {"workers": workers, "min_workers": min_workers, "epochs": epochs, "seed": seed, "gpu": gpu or None}
    options = [f"train.{name}={json.dumps(value)}" for name, value in given.items() if value is not None]
    config = with_settings(_preset(preset_, config_), [*options, *(set_ or [])])
    try:
        bundle = run(dataset, bundles, config, resume=resume, start_from=from_, publish=not no_publish, wait_s=wait)
    finally:
        disconnect()
    step(f"bundle {bundle.path}")
    if as_json:
        print_json({"version": bundle.version, "path": str(bundle.path), **bundle.json("metrics.json")})


@app.command()
def tune(
    dataset: Annotated[str, typer.Argument(help="A dataset folder made by prepare.")],
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="Where trials, table, picture and best.yaml go: a folder, or a URI.")
    ],
    preset_: Annotated[
        str, typer.Option("--preset", help="small, wide, base or paper: where the search begins.")
    ] = "small",
    trials: Annotated[int, typer.Option(min=1, help="The first is the preset itself.")] = 12,
    dial: Annotated[
        list[str] | None, typer.Option("--dial", metavar="PATH=LOW..HIGH", help="Or PATH=A,B,C; repeatable.")
    ] = None,
    cpus: Annotated[int, typer.Option(min=1, help="Of each trial.")] = 1,
    gpu: Annotated[bool, typer.Option("--gpu", help="One GPU a trial.")] = False,
    seed: Annotated[int, typer.Option(help="The same seed tries the same settings.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the search of this folder, if any.")] = False,
    config_: TrainFile = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Search a preset's main dials; trials run side by side, and poor ones stop early."""
    from rayrec.cluster import disconnect, require_absolute
    from rayrec.files import absolute, filesystem, is_uri, read_text
    from rayrec.training.dials import PAPER_DIALS, SMALL_DIALS, parse
    from rayrec.training.tuning import Search, search

    require_absolute(dataset, out)
    given = ["train.gpu=true"] if gpu else []
    config = with_settings(_preset(preset_, config_), [*given, *(set_ or [])])
    dials = dial or (PAPER_DIALS if config.model.kind == "paper" else SMALL_DIALS)
    what = Search(config, [parse(text, config) for text in dials], trials, seed, cpus, float(gpu))
    try:
        found = search(dataset, out, what, resume=resume)
    finally:
        disconnect()
    fs, root = filesystem(out)
    typer.echo(read_text(fs, f"{root}/table.md"))
    best = f"{absolute(out)}/best.yaml"
    step(f"the best are in {best}: rayrec train {dataset} BUNDLES --config {'A-COPY-OF-IT' if is_uri(out) else best}")
    if as_json:
        print_json(found)


@app.command()
def evaluate(
    bundle: Annotated[str, typer.Argument(help="A bundle, or a BUNDLES folder.")],
    dataset: Annotated[str, typer.Argument(help="The dataset folder.")],
    split: Annotated[Split, typer.Option(help="Which targets.")] = Split.TEST,
    users: Annotated[
        int | None,
        typer.Option(min=1, help="Ask about a sample of so many; its figures are not kept."),
    ] = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Also write the report here.")] = None,
    as_json: Json = False,
) -> None:
    """Judge a bundle by full ranking in four protocols, with the floors beside it."""
    from rayrec.cluster import disconnect, require_absolute
    from rayrec.evaluation.table import table_lines
    from rayrec.serving.judging import judge

    require_absolute(bundle, dataset, report)
    try:
        result = judge(bundle, dataset, split.value, report, users=users)
    finally:
        disconnect()
    for line in table_lines(result):
        typer.echo(line, err=True)
    if as_json:
        print_json(result)


@app.command()
def retrain(
    bundles: Annotated[str, typer.Argument(help="Where bundles are kept; the current one is where it starts.")],
    dataset: Annotated[str, typer.Argument(help="The dataset, which new days are added to.")],
    state: State = None,
    raw: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where exports of the state are kept (default: DATASET-exports).")
    ] = None,
    margin: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the current bundle's NDCG@10 that the new one may lack.")
    ] = 0.02,
    days: Annotated[float, typer.Option(min=0, help="How many of the newest days both are asked about.")] = 1.0,
    least: Annotated[int, typer.Option(min=1, help="Visitors to ask about; older days make up for it.")] = 200,
    workers: Annotated[int | None, typer.Option(min=1, help="Data-parallel workers.")] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="One GPU a worker.")] = False,
    epochs: Annotated[int | None, typer.Option(min=1)] = None,
    seed: Annotated[int | None, typer.Option(help="The same gives the same result on as many cores.")] = None,
    wait: Annotated[float, typer.Option(min=0, help="Seconds that a cluster may take to add nodes.")] = 0.0,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """What was served becomes the next bundle, which is published if it is no worse than the current one."""
    from rayrec.bundle import default_state
    from rayrec.cluster import disconnect, require_absolute
    from rayrec.retrain.comparison import Rule
    from rayrec.retrain.job import Places
    from rayrec.retrain.job import retrain as run
    from rayrec.state import absolute_url

    require_absolute(bundles, dataset, raw, state and state.removeprefix("sqlite:///"))
    given = {"workers": workers, "epochs": epochs, "seed": seed, "gpu": gpu or None}
    options = [f"train.{name}={json.dumps(value)}" for name, value in given.items() if value is not None]
    state_url = absolute_url(state or default_state(bundles))
    places = Places(bundles, dataset, state_url, raw or f"{dataset.rstrip('/')}-exports")
    try:
        found = run(places, [*options, *(set_ or [])], Rule(margin, days, least), wait_s=wait)
    finally:
        disconnect()
    if as_json:
        print_json(found)


@app.command()
def serve(
    bundle: Annotated[str, typer.Argument(help="A bundle, or a BUNDLES folder.")],
    host: str = "127.0.0.1",
    port: Port = 8000,
    state: State = None,
    min_replicas: Annotated[int | None, typer.Option(min=1)] = None,
    max_replicas: Annotated[int | None, typer.Option(min=1)] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Serve each version that is published, without a stop.")
    ] = False,
    tls_cert: Annotated[Path | None, typer.Option(help="Speak TLS: a certificate, its chain below it (PEM).")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="The private key of --tls-cert (PEM).")] = None,
    config_: ConfigFile = None,
    set_: Set = None,
) -> None:
    """Serve live lists: events in, rankings out; replicas follow the load. Ctrl-C stops it."""
    from rayrec.bundle import current_version, default_state
    from rayrec.cluster import require_absolute
    from rayrec.serving.app import run_server
    from rayrec.serving.tls import Tls

    require_absolute(bundle, state and state.removeprefix("sqlite:///"), tls_cert, tls_key)
    if min_replicas and max_replicas and min_replicas > max_replicas:
        raise UsageError(f"--min-replicas {min_replicas} is more than --max-replicas {max_replicas}")
    given = {"min_replicas": min_replicas, "max_replicas": max_replicas}
    options = [f"autoscale.{name}={value}" for name, value in given.items() if value is not None]
    from_file = with_file(ServeConfig(), config_) if config_ else ServeConfig()
    config: ServeConfig = with_settings(from_file, [*options, *(set_ or [])])
    if watch and current_version(bundle) is None:
        raise UsageError(f"--watch follows a BUNDLES folder, and {bundle} is none")
    tls = Tls.opened(tls_cert, tls_key)
    state_url = state or default_state(bundle)
    run_server(bundle, state_url=state_url, config=config, host=host, port=port, tls=tls, watch=watch)


@app.command()
def recommend(
    bundle: Annotated[str, typer.Argument(help="A bundle, or a BUNDLES folder.")],
    user: Annotated[str, typer.Option(help="Whose list.")],
    scene: Annotated[str, typer.Option(help="home, item, cart, search, or one of --config.")] = "home",
    k: Annotated[int, typer.Option("-k", min=1, max=200)] = 10,
    item: Annotated[str | None, typer.Option(help="The item at hand, for scene item.")] = None,
    query: Annotated[str | None, typer.Option(help="What is searched for, for scene search.")] = None,
    history: Annotated[str | None, typer.Option(metavar="DATASET", help="Take the user's past from here.")] = None,
    state: State = None,
    config_: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """A user's list, without a server: the body of /v1/recommend."""
    from rayrec.bundle import default_state
    from rayrec.serving.offline import recommend as run

    config = with_file(ServeConfig(), config_) if config_ else None
    answer = run(bundle, state or default_state(bundle), user, scene, k, item, history, query, config)
    if as_json:
        print_json(answer)
        return
    for place, shown in enumerate(answer["items"], 1):
        typer.echo(f"{place:3d}  {shown['score']:.4f}  {shown['item_id']:<14} {shown['title'] or ''}")


@app.command()
def load(
    url: Annotated[str, typer.Argument(help="Of a running service, as http://127.0.0.1:8000.")],
    seconds: Annotated[float, typer.Option(min=0.1, help="How long.")],
    rate: Annotated[float | None, typer.Option(min=0.001, help="Requests a second, whatever comes of them.")] = None,
    clients: Annotated[int | None, typer.Option(min=1, help="Clients who wait for each answer.")] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Send what failed once more.")] = False,
    users: Annotated[int, typer.Option(min=1, help="Of whom few come often (Zipf).")] = 10_000,
    mix: Annotated[str, typer.Option(help="Shares of scenes and events, as home=6,events=4.")] = "",
    picture: Annotated[Path | None, typer.Option(help="Draw rate, latency and replicas over time (PNG).")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Load a running service and tell how it does: failures, latencies, replicas. Keys come from RAYREC_API_KEYS."""
    from rayrec.bench.load import run
    from rayrec.serving.keys import own_headers

    figures = run(
        url, seconds=seconds, rate=rate, clients=clients, retry=retry, users=users, mix=mix, seed=seed,
        headers=own_headers(), picture=picture,
    )  # fmt: skip
    ms, late = figures["ms"], figures["late_ms"]
    step(f"{figures['requests']} requests, {figures['failed']} failed, {figures['rate']:g} answered a second")
    if ms["p50"] is not None:
        step(f"ms: p50 {ms['p50']:g}, p95 {ms['p95']:g}, p99 {ms['p99']:g}, max {ms['max']:g}")
        step(f"sent late, for which this program is to blame: p50 {late['p50']:g} ms, p99 {late['p99']:g} ms")
    if as_json:
        print_json(figures)


@bundles_app.command("list")
def bundles_list(
    bundles: Annotated[str, typer.Argument(help="A BUNDLES folder, or a URI.")], as_json: Json = False
) -> None:
    """Versions in a BUNDLES folder: where they come from, and how they were judged; the live one is marked."""
    from rayrec.training.listing import line, listing

    found = listing(bundles)
    if not found:
        step(f"{bundles}: no bundles; make one with: rayrec train DATASET {bundles}")
    for row in found:
        typer.echo(line(row))
    if as_json:
        print_json({"bundles": found})


@events_app.command("export")
def events_export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The raw folder to write: new, or empty.")],
    state: Annotated[str, typer.Option(help="sqlite:///PATH or redis://HOST:PORT/0.")],
    as_json: Json = False,
) -> None:
    """Write all events and lists shown as a raw folder for `rayrec prepare`: served today, learned tomorrow."""
    from dataclasses import asdict

    from rayrec.state import using
    from rayrec.state.export import export_events

    with using(state) as opened:
        done = export_events(opened, folder)
    nobody = f"; {done.nobodys} lists shown to nobody in particular are left out" if done.nobodys else ""
    step(f"{folder}: {done.events} events and {done.impressions} impressions of {done.visitors} visitors{nobody}")
    if as_json:
        print_json(asdict(done))


def _preset(name: str, file: Path | None) -> Config:
    """A preset, with what a file says put in."""
    return with_file(preset(name), file) if file else preset(name)


StateUrl = Annotated[str, typer.Option("--state", help="sqlite:///PATH or redis://HOST:PORT/0.")]


@experiment_app.command("start")
def experiment_start(
    name: Annotated[str, typer.Argument(help="Another name draws other visitors.")],
    version: Annotated[str, typer.Argument(help="A version beside the live one.")],
    state: StateUrl,
    share: Annotated[float, typer.Option(help="Of the visitors, who are served by VERSION.")] = 0.1,
    wait: Annotated[float, typer.Option(help="Seconds that a replica may take to load VERSION.")] = 120.0,
) -> None:
    """Serve a share of the visitors by another version, in all replicas within seconds."""
    from rayrec.evaluation.experiment import start, taken_up
    from rayrec.state import using

    with using(state) as opened:
        runs = taken_up(opened, start(opened, name, version, share), wait)
    begins = "" if runs else "; no replica is up, so it begins when one is"
    step(f"experiment '{name}': {share:.0%} of the visitors get {version}{begins}")


@experiment_app.command("stop")
def experiment_stop(state: StateUrl) -> None:
    """Serve everybody by the live version again. Report before: the figures are of the experiment that runs."""
    from rayrec.evaluation.experiment import stop
    from rayrec.state import using

    with using(state) as opened:
        stop(opened)


@experiment_app.command("report")
def experiment_report(state: StateUrl, as_json: Json = False) -> None:
    """Clicks, carts and purchases of both versions, with intervals that may be looked at any day."""
    from rayrec.evaluation.experiment import report, running, table
    from rayrec.state import using

    with using(state) as opened:
        experiment = running(opened)
        if experiment is None:
            raise UsageError("no experiment is running; start one with: rayrec experiment start NAME VERSION")
        found = report(opened, experiment)
    step(table(found))
    if as_json:
        print_json(found)


# ---------------------------------------------------------------- what commands share


def _say_prepared(report: dict[str, Any], dataset: str) -> None:
    for name in ("events", "items", "images"):
        part = report[name]
        reasons = ", ".join(f"{reason} {n}" for reason, n in part["rejected"].items())
        step(
            f"{name}: read {part['read']} = kept {part['kept']} + collapsed {part['collapsed']} "
            f"+ rejected {sum(part['rejected'].values())}" + (f" ({reasons})" if reasons else "")
        )
    if report["unlisted_items"]:
        step(
            f"{report['unlisted_items']} of {report['catalogue']} items occur in events and not in the catalogue: they "
            "are learned from and never recommended; if they should be, add them to items, or see whether ids differ"
        )
    step(f"dataset {dataset}: {report['users']} users, {report['sessions']} sessions, clock {report['clock']}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    # Ray reads it when it is imported. It reports the end of Serve's controller, which is asked to end, as a failure.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", r"ServeController\.graceful_shutdown failed")
    # As this: a Ray that we start is for this machine alone, and this has all of it listen there alone, on Linux too.
    if not os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    sys.unraisablehook = quiet_about_half_built
    sys.exit(_run(list(sys.argv[1:] if arguments is None else arguments)))


def quiet_about_half_built(unraisable: sys.UnraisableHookArgs) -> None:
    """Say nothing of a `__del__` of Ray's that misses an attribute; all else as Python does.

    Ctrl-C may come while Ray builds an object (a Dataset, say), which then cannot be torn down.
    """
    torn_down = getattr(unraisable.object, "__name__", "") == "__del__"
    of_ray = str(getattr(unraisable.object, "__module__", "")).startswith("ray.")
    if not (torn_down and of_ray and isinstance(unraisable.exc_value, AttributeError)):
        sys.__unraisablehook__(unraisable)


def _run(arguments: list[str]) -> int:
    try:
        app(arguments, standalone_mode=True)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0
        if code == INTERRUPTED:  # what Typer makes of Ctrl-C
            print("rayrec: interrupted", file=sys.stderr)
        return code
    except RayrecError as error:
        print(f"rayrec: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    main()

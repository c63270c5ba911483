"""`rayrec bench NAME`: words to calls, as `rayrec.cli` does for all else. Nothing heavy is imported early."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rayrec.errors import UsageError
from rayrec.options import Json, Set, print_json

bench_app = typer.Typer(no_args_is_help=True)


@bench_app.callback()
def bench() -> None:
    """Measure rayrec against other ways of doing the same."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that what was started ends too


Events = Annotated[int, typer.Option(min=1000, help="Events of the data that is made for it.")]
Rounds = Annotated[int, typer.Option(min=1, help="Interleaved rounds; medians are reported.")]


@bench_app.command("prepare")
def bench_prepare(events: Events = 1_000_000, rounds: Rounds = 3, as_json: Json = False) -> None:
    """Cleaning against pandas doing the same in one process."""
    from rayrec.bench.prepare import run

    _show(run(events, rounds), as_json)


@bench_app.command("add")
def bench_add(events: Events = 1_000_000, rounds: Rounds = 3, as_json: Json = False) -> None:
    """The thirtieth day added to a dataset of 29, against a run over all thirty."""
    from rayrec.bench.prepare_add import run

    _show(run(events, rounds), as_json)


@bench_app.command("shapes")
def bench_shapes(
    events: Events = 1_200_000,
    rounds: Rounds = 1,
    only: Annotated[
        list[str] | None,
        typer.Option(help="'many files', 'one file', 'one group', 'tiny files', 'fast robot' or 'slow robot'."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Prepare on awkward logs: one huge file, 5,000 tiny ones, a robot with five rows in six."""
    from rayrec.bench.shapes import run

    _show(run(events, rounds, only or ()), as_json)


@bench_app.command("decode")
def bench_decode(
    pictures: Annotated[int, typer.Option(min=10, help="That are painted for it.")] = 20_000,
    rounds: Rounds = 3,
    as_json: Json = False,
) -> None:
    """Pictures a second through prepare, against the same function in one plain process."""
    from rayrec.bench.decode import run

    _show(run(pictures, rounds), as_json)


@bench_app.command("chain")
def bench_chain(
    out: Annotated[Path, typer.Option(help="Where all is made and kept.")],
    events: Events = 1_000_000,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Sample, prepare, train an epoch and evaluate, with the peak memory of each; goes on where it was stopped."""
    from rayrec.bench.chain import run

    _show(run(events, out, set_ or []), as_json)


@bench_app.command("train")
def bench_train(
    events: Events = 1_000_000,
    rounds: Rounds = 3,
    workers: Annotated[int, typer.Option(min=1, help="Of each side.")] = 2,
    as_json: Json = False,
) -> None:
    """Ray Train against the same loop under torchrun, and how much of a step is arithmetic."""
    from rayrec.bench.training import run

    _show(run(events, rounds, workers), as_json)


@bench_app.command("epoch")
def bench_epoch(
    dataset: Annotated[str, typer.Argument(help="A prepared dataset.")],
    out: Annotated[Path, typer.Option(help="Where runs and the others' environments are kept.")],
    rounds: Rounds = 3,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Events a second of an epoch against the sequence models of other libraries; goes on where it was stopped."""
    from rayrec.bench.epoch import run

    _show(run(dataset, out, rounds, set_ or []), as_json)


@bench_app.command("images")
def bench_images(events: Events = 1_000_000, rounds: Rounds = 3, as_json: Json = False) -> None:
    """Each distinct picture of a batch once against a picture beside every row."""
    from rayrec.bench.pictures import run

    _show(run(events, rounds), as_json)


@bench_app.command("ids")
def bench_ids(
    items: Annotated[int, typer.Option(min=10, help="Of the catalogue that is made for it.")] = 1_000_000,
    steps: Annotated[int, typer.Option(min=1, help="That are timed of each in a round.")] = 10,
    rounds: Rounds = 3,
    workers: Annotated[int, typer.Option(min=1, help="That train together; several may share the table.")] = 1,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """A step with a large table of ids: AdamW over all of it against row-wise Adagrad over the rows that were read."""
    from rayrec.bench.id_table import run

    _show(run(items, steps, rounds, set_ or [], workers), as_json)


@bench_app.command("sizing")
def bench_sizing(
    preset_: Annotated[str, typer.Option("--preset", help="Whose model: small or base.")] = "small",
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=NUMBER", help="Of the shop, rates or prices; repeatable.")
    ] = None,
    as_json: Json = False,
) -> None:
    """What a shop needs of machines, and what they cost: arithmetic from measured rates and assumed prices."""
    from dataclasses import asdict

    from rayrec.bench.sizing import LEFT_OUT, changed, cost_table, costs, needs, rates_table, table
    from rayrec.config import preset

    shop, rates, prices = changed(set_ or [])
    found, paid = needs(shop, rates, preset(preset_)), costs(shop, rates, prices, preset(preset_))
    typer.echo("\n\n".join([table(found), cost_table(paid), rates_table(rates, prices), LEFT_OUT]))
    if as_json:
        print_json(
            {
                "shop": asdict(shop),
                "rates": asdict(rates),
                "prices": asdict(prices),
                "needs": [asdict(need) for need in found],
                "costs": [asdict(cost) for cost in paid],
            }
        )


@bench_app.command("quality")
def bench_quality(
    datasets: Annotated[list[str], typer.Argument(metavar="DATASET...", help="Prepared datasets.")],
    out: Annotated[Path, typer.Option(help="Where runs are kept, and the table and picture written.")],
    model: Annotated[list[str] | None, typer.Option(help="Only these models; repeatable. Default: all.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each model with its chosen settings.")] = 3,
    peer_seeds: Annotated[int | None, typer.Option(min=1, help="The same of the others than rayrec.")] = None,
    minutes: Annotated[float, typer.Option(min=0, help="CPU minutes of a peer's training; 0 is no limit.")] = 0,
    settings: Annotated[int, typer.Option(min=0, help="Of each peer's, at most; 0 is all.")] = 0,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Lists of rayrec and of other libraries before one judge; goes on where it was stopped."""
    from rayrec.bench.peer_runs import PEERS
    from rayrec.bench.quality import FLOORS, US, run

    _show(run(datasets, out, model or [US, *FLOORS, *PEERS], seeds, minutes, settings, set_ or [], peer_seeds), as_json)


@bench_app.command("cold")
def bench_cold(
    dataset: Annotated[str, typer.Argument(help="A prepared dataset with pictures.")],
    out: Annotated[Path, typer.Option(help="Where runs are kept, and the tables written.")],
    share: Annotated[float, typer.Option(min=0.001, max=0.9, help="Share of known items that become cold.")] = 0.1,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each variant.")] = 3,
    backbone: Annotated[
        list[str] | None, typer.Option(help="Values of model.image_backbone to compare; repeatable.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only these variants; repeatable. Default: all.")] = None,
    raw: Annotated[Path | None, typer.Option(help="The sample shop of the dataset: its oracle is judged too.")] = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """What pictures are worth for items without events, and for known ones; goes on where it was stopped."""
    from rayrec.bench.cold import run

    result = run(
        dataset, out, share=share, seeds=seeds, backbones=backbone or ["scratch"], only=only or [], raw=raw,
        settings=set_ or [],
    )  # fmt: skip
    _show(result, as_json)


@bench_app.command("budgets")
def bench_budgets(
    dataset: Annotated[str, typer.Argument(help="A prepared dataset with pictures.")],
    out: Annotated[Path, typer.Option(help="Where runs are kept, and the tables written.")],
    budgets: Annotated[str, typer.Option(help="Values of train.image_budget, comma-separated.")] = "0,12,48,192,all",
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each budget.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="That are timed of each in a round.")] = 20,
    rounds: Rounds = 3,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Accuracy and rows a second by how many pictures a step encodes, and beside every row; goes on where stopped."""
    from rayrec.bench.budgets import run

    result = run(
        dataset, out, budgets=[one.strip() for one in budgets.split(",")], seeds=seeds, steps=steps, rounds=rounds,
        settings=set_ or [],
    )  # fmt: skip
    _show(result, as_json)


@bench_app.command("degrade")
def bench_degrade(
    dataset: Annotated[str, typer.Argument(help="A prepared dataset; it is the clean one.")],
    out: Annotated[Path, typer.Option(help="Where runs are kept, and the table and picture written.")],
    kinds: Annotated[str | None, typer.Option(help="Only these kinds of damage, comma-separated.")] = None,
    shares: Annotated[str, typer.Option(help="How much is damaged, comma-separated.")] = "0.1,0.3,0.5",
    seeds: Annotated[int, typer.Option(min=1, help="Damages and trainings of each kind and share.")] = 1,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """NDCG@10 over missing and noisy data, with each remedy off and on; goes on where it was stopped."""
    from rayrec.bench.degrade import KINDS, run
    from rayrec.cluster import disconnect

    try:
        amounts = [float(share) for share in shares.split(",")]
    except ValueError:
        raise UsageError(f"--shares {shares}: write numbers with commas between, for example 0.1,0.3,0.5") from None
    try:
        result = run(dataset, out, kinds.split(",") if kinds else list(KINDS), amounts, seeds, set_ or [])
    finally:
        disconnect()
    _show(result, as_json)


@bench_app.command("serve")
def bench_serve(
    out: Annotated[Path, typer.Option(help="Where runs are kept, and the table and picture written.")],
    rounds: Rounds = 3,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of each server at each number of clients.")] = 10,
    clients: Annotated[
        str, typer.Option(help="Who wait for an answer before they ask again, comma-separated.")
    ] = "1,8,32",
    items: Annotated[str | None, typer.Option(help="Sizes of the catalogue, comma-separated.")] = None,
    history: Annotated[str | None, typer.Option(help="Events of each visitor, comma-separated.")] = None,
    users: Annotated[str | None, typer.Option(help="Visitors in the state, comma-separated.")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="A server, items, history, users, layers or ramp; repeatable. Default: all."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Lists a second behind Ray Serve, uvicorn, LitServe and BentoML, how they grow, and where the time goes."""
    from rayrec.bench.serving import Sizes, run

    given = {"items": items, "history": history, "users": users}
    sizes = Sizes(**{name: _numbers(name, text) for name, text in given.items() if text is not None})
    _show(
        run(out, rounds=rounds, seconds=seconds, clients=_numbers("clients", clients), sizes=sizes, only=only or ()),
        as_json,
    )


def _numbers(option: str, text: str) -> list[int]:
    """Raises UsageError."""
    numbers = [int(part) for part in text.split(",") if part.strip().isdecimal()]
    if len(numbers) != text.count(",") + 1 or min(numbers) < 1:
        raise UsageError(f"--{option} {text}: write numbers from 1 on with commas between, for example 1,8,32")
    return numbers


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(result)

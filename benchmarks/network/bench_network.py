"""Measure clients across a network: a round's exchange, accuracy and bytes on the interface, training on slow links.

    sudo python benchmarks/network/bench_network.py --data-dir DIR --out RESULTS --table docs/network_results.md
    sudo python benchmarks/network/bench_network.py --data-dir DIR --out RESULTS --part accuracy --clients 2
    python benchmarks/network/bench_network.py --part exchange --out RESULTS        # a part without root and data

exchange: rounds of `fedq server` in which nothing is trained, beside the same bytes on bare gRPC with the same TLS.
accuracy: MNIST with 2, 5 and 10 clients; every party in a network namespace of its own, behind a bridge, with TLS.
links: the same through a slow link for each party, until 95 % of the validation images are right, beside R2's way
(whole float32 models, pickled, on TCP) and, with --flower-python, plain Flower.
RESULTS keeps a JSON file of every run, and what is there is not run again. Tables are `network_tables.py`'s.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of what the benchmarks share

from evidence import replace_section
from links import LinksUnavailable, about_run
from network_runs import (
    FLOWER,
    IMAGE_SIZE,
    OURS,
    PIECES,
    SOCKET,
    WHOLE,
    Exchange,
    Federation,
    idle_client,
    run_exchange,
    run_federation,
)
from network_tables import TITLES, Cell, ExchangeRow, Facts, accuracy_section, exchange_section, links_section

from fedq.data import load_dataset
from fedq.report.encoding import make_readable

MODELS = ("cnn62k", "resnet18")
"""Of the exchange: 0.25 MB and 44.7 MB in float32."""


def exchange_part(args: argparse.Namespace, about: Facts) -> str:
    """Run all systems in turns; return the section."""
    rows = []
    for model in args.models:
        for clients in args.exchange_clients:
            turns: dict[str, list[Facts]] = {system: [] for system in (WHOLE, PIECES, OURS)}
            for turn in range(args.turns):
                exchange = Exchange(model, clients, args.exchange_rounds, turn)
                order = list(turns)
                for system in order[turn % 3 :] + order[: turn % 3]:
                    turns[system].append(run_exchange(exchange, system, args.out))
            rows.append(ExchangeRow(exchange, turns))
    return exchange_section(rows, about)


def accuracy_part(args: argparse.Namespace, about: Facts) -> str:
    """Run codecs and numbers of clients, float32 and int8 with every seed at the fewest; return the section."""
    cells = []
    for clients in args.clients:
        for uplink in args.codecs:
            seeds = args.seeds if clients == min(args.clients) and uplink in ("fp32", "int8") else args.seeds[:1]
            base = federation_of(args, uplink, clients=clients, link=args.plain_link)
            cells.append(Cell(base, [run_federation(replace(base, seed=seed), args.out) for seed in seeds]))
    return accuracy_section(cells, about)


def links_part(args: argparse.Namespace, about: Facts) -> str:
    """Run codecs and rivals through the slow link; return the section."""
    arms = [federation_of(args, uplink, link=args.link, target=args.target) for uplink in args.codecs]
    arms += [replace(arm, downlink="int4") for arm in arms if arm.uplink in ("int4", "sign")]
    plain = federation_of(args, "fp32", link=args.link, target=args.target)
    arms += [replace(plain, system=system) for system in (SOCKET, *([FLOWER] if args.flower_python else []))]
    return links_section([(arm, run_federation(arm, args.out, args.flower_python)) for arm in arms], about)


PARTS = {"exchange": exchange_part, "accuracy": accuracy_part, "links": links_part}


def federation_of(args: argparse.Namespace, uplink: str, *, clients: int = 2, **values: Any) -> Federation:
    """Return what is run for a codec: float32 travels both ways, all others with int8 downwards."""
    return Federation(
        data_dir=str(args.data_dir.resolve()),
        rounds=args.rounds.get(clients, max(args.rounds.values())),
        batch_size=args.batch_size,
        lr=args.lr,
        uplink=uplink,
        downlink="fp32" if uplink == "fp32" else "int8",
        clients=clients,
        train_examples=args.train_examples,
        **values,
    )


def rounds_by_clients(words: Sequence[str]) -> dict[int, int]:
    """Return rounds by number of clients from words like ``2:4``."""
    return {int(clients): int(rounds) for clients, _, rounds in (word.partition(":") for word in words)}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--data-dir", type=Path, help="where MNIST is")
    parser.add_argument("--data-note", default="MNIST-10k", help="what a reader must know of these files")
    parser.add_argument("--out", type=Path, default=Path("network"), help="folder of what was measured")
    parser.add_argument("--table", type=Path, help="Markdown file whose sections are replaced; they are printed anyway")
    trained = parser.add_argument_group("accuracy and links")
    trained.add_argument("--codecs", nargs="+", default=["fp32", "int8", "int4", "sign"], metavar="SPEC")
    trained.add_argument("--clients", nargs="+", type=int, default=[2, 5, 10])
    trained.add_argument(
        "--seeds", nargs="+", type=int, default=list(range(10)), help="fp32 and int8 at the fewest clients"
    )
    trained.add_argument("--rounds", nargs="+", default=["2:6", "5:12", "10:28"], metavar="CLIENTS:ROUNDS")
    trained.add_argument("--batch-size", type=int, default=16)
    trained.add_argument("--lr", type=float, default=0.015)
    trained.add_argument("--train-examples", type=int, help="fewer training images, to try it out")
    trained.add_argument("--plain-link", default="unlimited", help="of the part on accuracy; none: no namespaces")
    trained.add_argument("--link", default="10mbit", help="of the part on links")
    trained.add_argument("--target", type=float, default=0.95)
    trained.add_argument("--flower-python", help="interpreter that has Flower")
    empty = parser.add_argument_group("exchange")
    empty.add_argument("--models", nargs="+", default=list(MODELS))
    empty.add_argument("--exchange-clients", nargs="+", type=int, default=[1, 2])
    empty.add_argument("--exchange-rounds", type=int, default=16, help="of a turn; the first is not counted")
    empty.add_argument("--turns", type=int, default=3)
    parser.add_argument("--as-client", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.rounds = rounds_by_clients(args.rounds)
    if args.as_client is None and args.part != "exchange" and args.data_dir is None:
        parser.error("--data-dir is needed for this part")
    return args


def main() -> None:
    make_readable()
    args = parse_args()
    if args.as_client:
        idle_client(args.as_client)
        return
    import grpc

    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    about = about_run() | {"grpcio": grpc.__version__, "data_note": args.data_note}
    if args.data_dir:  # decoded once, before several processes want it at the same time
        load_dataset("mnist", data_dir=args.data_dir, image_size=IMAGE_SIZE)
    for part in PARTS if args.part == "all" else [args.part]:
        try:
            section = PARTS[part](args, about)
        except LinksUnavailable as error:
            raise SystemExit(str(error)) from None
        print(section, flush=True)
        if args.table:
            replace_section(args.table, TITLES[part], section)


if __name__ == "__main__":
    main()

"""A thousand processes and a hundred tags share one ledger: a simulation.

    python benchmarks/ledger_simulation.py --processes 1000 --tags 100

Prints, for each phase, how long it took until every tag had its share, how many
transactions the store had to bear, and how even the shares were.
"""

from __future__ import annotations

import argparse
import time

from sqla_fairpool.bench.ledger_simulation import simulate


def main() -> None:
    parser = argparse.ArgumentParser(description="simulate processes on one ledger")
    parser.add_argument("--processes", type=int, default=1000)
    parser.add_argument("--tags", type=int, default=100)
    parser.add_argument("--capacity", type=int, default=250)
    parser.add_argument("--threads", type=int, default=2, help="in each process")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each phase")
    parser.add_argument("--hold", type=float, default=0.2, help="mean, in seconds")
    parser.add_argument("--think", type=float, default=0.005, help="most, in seconds")
    parser.add_argument("--seed", type=int, default=1)
    began = time.perf_counter()
    report = simulate(**vars(parser.parse_args()))
    for line in report.lines():
        print(line)
    print(f"simulated in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()

"""Many simulated runs, and for each broken promise the seed that shows it."""

from __future__ import annotations

import argparse
import sys
import time

from .play import simulate


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--lines", type=int, default=40, help="of the trace, printed for each violation; 0 for all")
    parser.add_argument("--digests", action="store_true", help="print the digest of every trace")
    asked = parser.parse_args()
    begun, violations, calls, faults = time.monotonic(), 0, 0, 0
    for seed in range(asked.first_seed, asked.first_seed + asked.seeds):
        result = simulate(seed)
        calls, faults = calls + result.calls, faults + result.faults
        if asked.digests:
            print(seed, result.digest, flush=True)
        if result.wrong:
            violations += 1
            print(*result.trace[-asked.lines :], f"VIOLATION {result.wrong}", sep="\n")
            print(f"again: python -m tests.simulation --first-seed {seed} --seeds 1 --lines 0\n", flush=True)
    took_s = time.monotonic() - begun
    print(
        f"{asked.seeds} seeds from {asked.first_seed} in {took_s:.0f} s ({asked.seeds / took_s:.0f} a second), on "
        f"average {calls / asked.seeds:.0f} store calls and {faults / asked.seeds:.0f} faults: {violations} violations",
        file=sys.stderr,
    )
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())

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
    parser.add_argument("--lines", type=int, default=40, help="lines of trace to print per violation; 0: all")
    parser.add_argument("--digests", action="store_true", help="print the digest of every trace")
    args = parser.parse_args()
    begun, violations, calls, faults = time.monotonic(), 0, 0, 0
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        result = simulate(seed)
        calls, faults = calls + result.calls, faults + result.faults
        if args.digests:
            print(seed, result.digest, flush=True)
        if result.wrong:
            violations += 1
            print(*result.trace[-args.lines :], f"VIOLATION {result.wrong}", sep="\n")
            print(f"reproduce: python -m tests.simulation --first-seed {seed} --seeds 1 --lines 0\n", flush=True)
    took_s = time.monotonic() - begun
    print(
        f"{args.seeds} seeds from {args.first_seed} in {took_s:.0f} s ({args.seeds / took_s:.0f} a second), on "
        f"average {calls / args.seeds:.0f} store calls and {faults / args.seeds:.0f} faults: {violations} violations",
        file=sys.stderr,
    )
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())

"""Compares the two halves; exit code 1 if any number differs by more than 1e-6.

Usage: python infra/metrics_check/compare.py OUT [--golden FILE]
"""

import argparse
import json
import math
from pathlib import Path

WITHIN = 1e-6


def differences(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, float]:
    """By name of every score of the devkit; NaN on both sides is 0, on one side infinite, as is what we lack."""
    out = {}
    for name, value in theirs.items():
        mine = ours.get(name, math.inf)
        same = math.isnan(mine) and math.isnan(value)
        apart = abs(mine - value)
        out[name] = 0.0 if same else math.inf if math.isnan(apart) else apart
    return out


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--golden", type=Path, help="write the devkit's scores there")
    given = parser.parse_args()
    ours, theirs = (json.loads((given.out / f"{name}.json").read_text()) for name in ("ours", "theirs"))
    versions = theirs.pop("versions")
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    worst = 0.0
    for kind, scores in theirs.items():
        apart = differences(ours[kind], scores)
        name = max(apart, key=apart.__getitem__)
        worst = max(worst, apart[name])
        heads = [n for n in scores if "/" not in n]
        print(f"{kind}: {len(apart)} scores, largest difference {apart[name]:.1e} ({name})")
        print("  ours   " + ", ".join(f"{n} {ours[kind][n]:.6f}" for n in heads))
        print("  devkit " + ", ".join(f"{n} {scores[n]:.6f}" for n in heads))
    print(f"{'equal' if worst <= WITHIN else 'DIFFERENT'}: largest difference {worst:.1e}, allowed {WITHIN:g}")
    if given.golden:
        text = json.dumps({"versions": versions, **theirs}, indent=1)
        given.golden.write_text(text.replace("NaN", "null") + "\n")
    return int(worst > WITHIN)


if __name__ == "__main__":
    raise SystemExit(main())

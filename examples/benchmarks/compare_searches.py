"""Every search and method of `deme merge` on one family of experts, side by side.

Run by hand in a folder that holds a run (deme.toml, base, experts ft_*.safetensors, and a control
trained with as many updates), as `deme demo` leaves it:

    python compare_searches.py RUN_FOLDER --objective fid --num 500

Each line of `LINES` is one `deme merge`, without its report; then one `deme eval` measures all that
came out, with base, ensemble and control, on seeds and images the searches have not seen. Prints a
table in Markdown; what is finished is kept, so the same command goes on after a stop.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

GRID = "0,0.25,0.5,0.75,1"
GLOBAL = {
    "grid": ["--search", "grid", "--grid", GRID],
    **{name: ["--search", name] for name in ("random", "cmaes", "tpe")},
}
FINER = {
    "cmaes per block": ["--search", "cmaes", "--per", "block"],
    "tpe per block": ["--search", "tpe", "--per", "block"],
}
WITHOUT_SAMPLING = {
    f"gradient {objective} per {per}": [
        "--search", "gradient", "--objective", objective, "--per", per, "--num", "2048",
    ]
    for objective in ("loss", "experts") for per in ("model", "block", "layer")
}  # fmt: skip
METHODS = {
    "1/N each": ["-w", "mean"],
    "1 each": ["-w", "ones"],
    "ties": ["--method", "ties", "-w", "mean"],
    "dare": ["--method", "dare", "-w", "mean"],
    "model-stock": ["--method", "model-stock"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--objective", default="fid")
    parser.add_argument("--num", default="500")
    parser.add_argument("--eval-num", default="2000")
    parser.add_argument("--only", default="", help="comma-separated names of lines")
    options = parser.parse_args()
    lines = {**METHODS, **GLOBAL, **FINER, **WITHOUT_SAMPLING}
    if options.only:
        lines = {name: lines[name] for name in options.only.split(",")}
    found = {name: run(options, name, words) for name, words in lines.items()}
    print(table(options, found))


def run(options: argparse.Namespace, name: str, words: list[str]) -> dict:
    """One merge; its JSON document with the seconds it took."""
    output = (
        options.folder / f"merged_{options.objective}_{name.replace(' ', '_').replace('/', '')}"
    )
    kept = output.with_suffix(".json")
    if kept.exists():
        return json.loads(kept.read_text())
    experts = sorted(path.name for path in options.folder.glob("ft_*of*.safetensors"))
    count = len(experts)
    words = [{"mean": ",".join([str(1 / count)] * count), "ones": ",".join(["1"] * count)}.get(w, w)
             for w in words]  # fmt: skip
    if "--search" in words:
        words += ["--no-report"]
        words += [] if "--objective" in words else ["--objective", options.objective]
        words += [] if "--num" in words else ["--num", options.num]
    file = f"{output.name}.safetensors"
    command = [sys.executable, "-m", "deme_cli", "merge", *experts, *words, "-o", file, "--json"]
    began = time.monotonic()
    done = subprocess.run(command, cwd=options.folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    document = {**json.loads(done.stdout), "seconds": time.monotonic() - began}
    kept.write_text(json.dumps(document))
    print(f"{name}: {document['seconds']:.0f} s", file=sys.stderr)
    return document


def table(options: argparse.Namespace, found: dict[str, dict]) -> str:
    """The evaluation of everything, as Markdown."""
    paths = {name: document["path"] for name, document in found.items()}
    experts = sorted(path.name for path in options.folder.glob("ft_*of*.safetensors"))
    command = [
        sys.executable, "-m", "deme_cli", "eval", "base.safetensors", *experts,
        *(["control.safetensors"] if (options.folder / "control.safetensors").exists() else []),
        *paths.values(), "--fid", "digits", "--num", options.eval_num, "--repeats", "3", "--json",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=options.folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    rows = {
        row["name"]: next(iter(row["metrics"].values())) for row in json.loads(done.stdout)["rows"]
    }
    gain = -rows["ensemble"]["difference"]["mean"]
    lines = [
        "| model | distance | minus base | gain kept | evaluations | seconds | coefficients |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in ["base", "control", "ensemble", *paths]:
        row = rows.get(Path(paths[name]).stem if name in paths else name)
        if row is None:
            continue
        difference = row.get("difference")
        document = found.get(name, {})
        cells = [
            name,
            f"{row['value']:.3f}",
            f"{difference['mean']:+.3f} ± {difference['sd']:.3f}" if difference else "",
            f"{-100 * difference['mean'] / gain:.0f} %" if difference else "",
            str(document.get("evaluations", "")),
            f"{document['seconds']:.0f}" if document else "",
            ", ".join(f"{w:.2f}" for w in document.get("coefficients", [])),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

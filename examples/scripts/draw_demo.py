"""
Draws what `latent-trl demo` prints into a file, for the README: the last line of each step, and the rewards. Times are
left out: they are the machine's.

```bash
latent-trl demo | tee demo.log
python examples/scripts/draw_demo.py demo.log --output docs/assets/demo.svg
```
"""

import argparse
import io
import re
from pathlib import Path

from rich.console import Console
from rich.text import Text

STEP = re.compile(r"(?P<name>\S.*?)  (?P<done>\d+/\d+)  \d+ s(?P<figures>.*)")
WIDTH = 80


def drawn(lines: list[str]) -> list[Text]:
    """The last line of each step in their order, and all lines from the table on."""
    steps: dict[str, re.Match[str]] = {}
    for line in lines:
        found = STEP.fullmatch(line)
        if found:
            steps[found["name"]] = found
    names = max(map(len, steps))
    shown = [
        Text.assemble((name.ljust(names), "bold"), f"  {step['done']:>7}", (step["figures"], "cyan"))
        for name, step in steps.items()
    ]
    table = next(i for i, line in enumerate(lines) if "Reward on held-out" in line)
    return [*shown, Text(), *(Text(line) for line in lines[table:] if not line.endswith("s in all"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, help="what the demo printed")
    parser.add_argument("--output", type=Path, default=Path("docs/assets/demo.svg"))
    args = parser.parse_args()
    console = Console(record=True, width=WIDTH, force_terminal=True, file=io.StringIO())
    console.print(Text("$ latent-trl demo", style="bold green"))
    for line in drawn(args.log.read_text(encoding="utf-8").splitlines()):
        console.print(line)
    args.output.write_text(console.export_svg(title="latent-trl demo"), encoding="utf-8")


if __name__ == "__main__":
    main()

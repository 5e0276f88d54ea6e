"""
Draws the terminal of `latent-trl demo`, run as it is, for the README.

```bash
python examples/scripts/draw_demo.py --output docs/assets/demo.svg
```
"""

import argparse
from pathlib import Path

from latent_trl.commands import demo, progress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/assets/demo.svg"))
    args = parser.parse_args()
    console = progress.console
    console.record, console._force_terminal, console.width = True, True, 90
    demo.main([])
    args.output.write_text(console.export_svg(title="latent-trl demo"), encoding="utf-8")


if __name__ == "__main__":
    main()

"""
The whole method on the pocket VLM, on two CPU cores, with a report: `latent-trl demo` as a script.

    python examples/quickstart.py --output-dir outputs/demo
"""

import sys

from latent_trl.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))

#!/usr/bin/env bash
# What a newcomer does, in a fresh clone and a fresh virtual environment: the README's installation and demo, its twenty lines,
# the quickstart, every configuration of the pocket VLM and every notebook. Half an hour on two cores.
#
#     tests/newcomer.sh [PYTHON]        # python3.12 by default; PIP_OPTIONS are added to the installation
set -euo pipefail
python=${1:-python3.12}
source=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
git clone --quiet "$source" "$work/latent_trl"
cd "$work/latent_trl"
"$python" -m venv .venv
# shellcheck disable=SC1091
. .venv/bin/activate
# shellcheck disable=SC2086
pip install --quiet ${PIP_OPTIONS:-} -e ".[demo]" pytest nbconvert ipykernel

echo "== the demo"
latent-trl demo --output-dir outputs/demo
echo "== the twenty lines, the command line page and the notebook learn, without an alarm; each page's blocks run"
python -m pytest -q -m slow tests/test_docs.py
echo "== every configuration, as it is"
for command in learn sft grpo rloo ppo; do
  latent-trl "$command" --config "examples/configs/pocket_$command.yaml" --disable_tqdm true
done
latent-trl evaluate outputs/pocket/grpo shapes --limit 300 --reward-funcs exact_match --max-new-tokens 12
echo "== the quickstart"
python examples/quickstart.py
echo "== every notebook"
for notebook in examples/notebooks/*.ipynb; do
  jupyter nbconvert --to notebook --execute --output-dir "$work/notebooks" "$notebook"
done
echo "a newcomer's first hour: all of it ran"

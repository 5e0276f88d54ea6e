#!/usr/bin/env bash
# What a newcomer does, in a fresh clone and a fresh virtual environment: the README's installation and demo, its twenty lines,
# the quickstart, every configuration and every notebook. An hour on two cores. The README's test command is what CI runs.
#
#     tests/newcomer.sh [PYTHON]        # python3.12 by default; PIP_OPTIONS are added to the installation
#
# Every step runs, also after one that failed; the last lines name those that did, and then the exit status is 1.
set -uo pipefail
python=${1:-python3.12}
source=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=()

# step NAME COMMAND...: says what runs, how long it took, and remembers what failed.
step() {
  local name=$1 start=$SECONDS
  shift
  echo "== $name"
  "$@" || { failed+=("$name"); echo "== $name: FAILED"; }
  echo "== $name: $((SECONDS - start)) s"
}

git clone --quiet "$source" "$work/latent_trl" || exit 1
cd "$work/latent_trl" || exit 1
"$python" -m venv .venv || exit 1
# shellcheck disable=SC1091
. .venv/bin/activate
# The README's own line, so that what it says is what is tested.
install=$(grep -m 1 '^pip install .*-e ".\[demo\]"' README.md) || { echo "the README has no line that installs"; exit 1; }
step "installation" bash -c "$install ${PIP_OPTIONS:-}"
step "tools of this script" pip install --quiet pytest hypothesis nbclient ipykernel

step "demo" latent-trl demo --output-dir outputs/demo
# The twenty lines, the command line page and the notebook learn, without an alarm.
step "pages" python -m pytest -q -s tests/test_docs.py
# All of them are read by their command; those of 3b run on a tiny model of the same layout.
step "configurations, each in a few steps" python -m pytest -q tests/commands/test_configs.py
for command in learn sft grpo rloo ppo; do
  step "configuration $command" latent-trl "$command" --config "examples/configs/pocket_$command.yaml"
done
step "evaluation" latent-trl evaluate outputs/pocket/grpo shapes --limit 300 --reward-funcs exact_match --max-new-tokens 12
# The same as the demo, so from a space that is learned.
step "quickstart" python examples/quickstart.py --from-pretrained model_cards/pocket-vlm-latent-actions
for notebook in examples/notebooks/*.ipynb; do
  step "notebook $(basename "$notebook")" python examples/scripts/run_notebooks.py "$notebook"
done

if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
echo "a newcomer's first hour: all of it ran"

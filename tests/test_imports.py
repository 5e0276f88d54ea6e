"""The house: which package may import which, and what each file says and is."""

import ast
from pathlib import Path

import pytest

import latent_trl

PACKAGE = Path(__file__).parents[1] / "latent_trl"

# Each package or module at the top, and all that it may import of the others. There is no circle in it.
ALLOWED = {
    "api_key": set(),
    "checkpoint": set(),
    "generation": set(),
    "hub": {"checkpoint"},
    "models": {"checkpoint", "generation", "hub"},
    "data": {"models"},
    "sizing": {"checkpoint", "generation", "models"},
    "rewards": {"data"},
    "plans": {"checkpoint", "data", "generation", "hub", "models", "vllm"},
    "search": {"data", "generation", "models", "rewards"},
    "evaluation": {"checkpoint", "data", "generation", "hub", "models", "rewards", "search"},
    "trainer": {"checkpoint", "data", "evaluation", "generation", "hub", "models", "plans", "rewards", "search"},
    "vllm": {"api_key", "checkpoint", "generation", "hub", "models"},
}
ALLOWED["trainer"] |= {"api_key", "vllm"}
ALLOWED["serving"] = ALLOWED["studio"] = ALLOWED["trainer"] | {"trainer"}
ALLOWED["commands"] = ALLOWED["serving"] | {"serving", "sizing", "studio"}
ALLOWED["__main__"] = {"commands"}
ALLOWED["__init__"] = set()

# Public names, and the modules that they come from.
PUBLIC = latent_trl._PUBLIC

# Folders of `trainer`. What several of them share is in `rollout` and `run`.
TRAINERS = {"distillation", "grpo", "plans", "ppo", "rloo", "sft", "space"}
MAY_IMPORT_TRAINERS = {"ppo": {"grpo"}, "rloo": {"grpo"}}
MOST_LINES = 400
LONGER: set[str] = set()
NO_NAMES = {"utils", "util", "helpers", "helper", "misc", "common"}


def imports_of(source: str, package: str) -> set[str]:
    """The modules of this package that a file in `package` (dots between the folders) imports, late ones included."""
    found: set[str] = set()
    _collect(ast.parse(source), package.split("."), found)
    return found


def _collect(node: ast.AST, package: list[str], found: set[str]) -> None:
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        for other in node.orelse:
            _collect(other, package, found)
        return
    if isinstance(node, ast.Import):
        found.update(alias.name for alias in node.names if alias.name.split(".")[0] == "latent_trl")
    elif isinstance(node, ast.ImportFrom):
        base = [*package[: len(package) - node.level + 1]] if node.level else []
        module = ".".join([*base, *([node.module] if node.module else [])])
        if module.split(".")[0] == "latent_trl":
            # A name may be a module: `from .. import search`.
            found.update(f"{module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
        # Names that are put together at run time cannot be read; those of a file are written out.
        named = node.args[0].value if isinstance(node.args[0], ast.Constant) else ""
        if named.startswith("."):
            named = "latent_trl" + named
        if named.split(".")[0] == "latent_trl":
            found.add(named)
    for child in ast.iter_child_nodes(node):
        _collect(child, package, found)


def faults(file: str, source: str) -> list[str]:
    """What is wrong with a file at `file`, relative to the package."""
    *folders, name = Path(file).with_suffix("").parts
    here = folders[0] if folders else name
    if here not in ALLOWED:
        return [f"{file}: {here!r} has no place in the direction of imports"]
    found = []
    for module in sorted(imports_of(source, ".".join(["latent_trl", *folders]))):
        _, *there = module.split(".")
        if there and there[0] in PUBLIC:
            there = [*PUBLIC[there[0]].split("."), there[0]]
        if not there or there[0].startswith("__"):  # the version
            continue
        if there[0] != here and there[0] not in ALLOWED[here]:
            found.append(f"{file} imports {module}: {here} may import {sorted(ALLOWED[here])}")
        if there[0] == "trainer" and here == "trainer" and len(folders) > 1:
            found += _trainer_faults(file, folders[1], module, there)
    return found


def _trainer_faults(file: str, own: str, module: str, there: list[str]) -> list[str]:
    other = there[1]
    if other not in TRAINERS or other == own or other in MAY_IMPORT_TRAINERS.get(own, ()):
        return [f"{file} imports {module}: run knows no rollout"] if (own, other) == ("run", "rollout") else []
    return [f"{file} imports {module}: trainers share through trainer/rollout and trainer/run"]


def style_faults(file: str, source: str) -> list[str]:
    found = []
    if source.strip() and not (source.startswith('"""') and ast.get_docstring(ast.parse(source))):
        found.append(f"{file} does not say what it is in its first line")
    if source.count("\n") > MOST_LINES and file not in LONGER:
        found.append(f"{file} has {source.count(chr(10))} lines, more than {MOST_LINES}")
    if NO_NAMES & set(Path(file).with_suffix("").parts):
        found.append(f"{file} has a name that says nothing")
    return found


FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def test_imports_point_one_way():
    assert [fault for file in FILES for fault in faults(file, (PACKAGE / file).read_text(encoding="utf-8"))] == []


def test_the_directions_hold_no_circle():
    levels: dict[str, int] = {}

    def level(name: str, path: tuple[str, ...] = ()) -> int:
        assert name not in path, f"a circle: {' -> '.join((*path, name))}"
        if name not in levels:
            levels[name] = 1 + max((level(other, (*path, name)) for other in ALLOWED[name]), default=0)
        return levels[name]

    assert max(level(name) for name in ALLOWED) > 3


def test_each_file_says_what_it_is_and_is_one_thing():
    found = [fault for file in FILES for fault in style_faults(file, (PACKAGE / file).read_text(encoding="utf-8"))]
    assert found == []
    assert len(FILES) > 80


@pytest.mark.parametrize(
    "file, source",
    [
        ("models/model.py", "from ..data.images import load_image"),
        ("models/model.py", "def save():\n    from ..trainer.run.hub import push"),
        ("hub/push.py", "class Push:\n    def push(self):\n        from ..models.component import read_json"),
        ("hub/push.py", "from .. import models"),
        ("hub/push.py", "import latent_trl.models.component"),
        ("hub/push.py", "from importlib import import_module\nimport_module('latent_trl.models.component')"),
        ("generation/generate.py", "from latent_trl.models import policy"),
        ("generation/generate.py", "if True:\n    from ..rewards.calling import RewardCaller"),
        ("rewards/calling.py", "from ..trainer.run import health"),
        ("evaluation/answers.py", "from ..commands.loading import load_model"),
        ("models/model.py", "from latent_trl import LatentActionGRPOTrainer"),
        ("search/tree.py", "from ..evaluation.answers import answer"),
        ("trainer/run/health.py", "from ..grpo.trainer import LatentActionGRPOTrainer"),
        ("trainer/run/health.py", "from ..rollout.rollout import Rollout"),
        ("trainer/rollout/rollout.py", "from ..ppo.config import LatentActionPPOConfig"),
        ("trainer/sft/trainer.py", "from ..grpo.trainer import LatentActionGRPOTrainer"),
        ("trainer/grpo/trainer.py", "from ..ppo import trainer"),
        ("trainer/space/trainer.py", "from ...commands import training"),
        ("plans/model.py", "from ..rewards.calling import RewardCaller"),
        ("plans/model.py", "from ..trainer.plans.space_config import PlanSpaceConfig"),
        ("models/backbone.py", "from ..plans.model import PlanModel"),
        ("trainer/plans/space_trainer.py", "from ..grpo.trainer import LatentActionGRPOTrainer"),
        ("somewhere/else.py", ""),
    ],
)
def test_what_points_the_other_way_is_found(file, source):
    assert len(faults(file, f'"""A file."""\n{source}\n')) == 1


@pytest.mark.parametrize(
    "file, source",
    [
        ("generation/generate.py", "if TYPE_CHECKING:\n    from ..models.policy import LatentActionPolicy"),
        ("models/model.py", "from ..generation.output import trunk_positions\nfrom ..hub.push import push_model"),
        ("trainer/ppo/trainer.py", "from ..grpo.trainer import LatentActionGRPOTrainer"),
        ("hub/card.py", "from .. import __version__"),
    ],
)
def test_what_points_the_right_way_is_not(file, source):
    assert faults(file, f'"""A file."""\n{source}\n') == []


@pytest.mark.parametrize(
    "file, source",
    [
        ("models/policy.py", "import torch\n"),
        ("models/policy.py", "# The policy.\n"),
        ("models/policy.py", '"""The policy."""\n' + "x = 1\n" * MOST_LINES),
        ("models/utils.py", '"""Tools."""\n'),
        ("models/helpers/policy.py", '"""Tools."""\n'),
    ],
)
def test_files_that_break_the_rules_are_found(file, source):
    assert len(style_faults(file, source)) == 1


def test_names_of_test_files_differ():
    """Folders of tests are no packages: pytest imports each file by its name alone."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))

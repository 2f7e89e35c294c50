"""Imports point down. Reads every import of magi_ray, those inside functions too, and a few more promises of the text.

cli commands report api > drivers > cluster > render > {sampling models storage media} >
{errors events forward system timeline manifest settings}

and within render: upkeep > driving > {tasks runs} > artifacts > plans
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEIGHT = {
    "errors": 0, "events": 0, "forward": 0, "system": 0, "timeline": 0, "manifest": 0, "redaction": 0,
    "settings": 0,
    "sampling": 1, "models": 1, "storage": 1, "media": 1,
    "render.plans": 2, "render.artifacts": 3, "render.tasks": 4, "render.runs": 4, "render.driving": 5,
    "render.upkeep": 6, "render": 6,
    "cluster": 7,
    "drivers": 8,
    "api": 9, "commands": 9, "cli": 9, "report": 9, "__main__": 9,
}  # fmt: skip
# Parts of one height that may know each other; other neighbours may not.
TOGETHER = (
    {"errors", "events", "forward", "system", "timeline", "manifest", "redaction", "settings"},
    {"cli", "commands", "report", "__main__"},
)
NOT_ON_THE_GROUND = {"torch", "ray", "boto3", "botocore", "requests", "httpx", "socket", "http", "urllib.request"}


def part_of(module: str) -> str:
    """The part that ``module`` belongs to: "render.plans" for magi_ray.render.plans.row_plan, "storage" for
    magi_ray.storage.keys; "" for the package itself."""
    part, _, rest = module.partition(".")[2].partition(".")
    room = f"{part}.{rest.partition('.')[0]}"
    return room if room in HEIGHT else part


def imports(module: str, tree: ast.AST, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported. ``from a import b`` gives a.b, since b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*above, *filter(None, [base])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and called(node) in ("importlib.import_module", "import_module", "__import__"):
            name = node.args[0] if node.args else None
            yield node.lineno, name.value if isinstance(name, ast.Constant) else "a name made at run time"


def called(call: ast.Call) -> str:
    """``a.b.c`` for the call a.b.c(…)."""
    return dotted(call.func)


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def import_faults(module: str, tree: ast.AST, is_package: bool) -> Iterator[str]:
    part = part_of(module)
    for line, name in imports(module, tree, is_package):
        top = name.split(".")[0]
        if top == "magi_ray":
            other = part_of(name)
            if other not in HEIGHT:
                of_root = name.removeprefix("magi_ray.")
                yield f"{line}: {part or 'the package'} imports {of_root} from the package's root"
                continue
            if other == part:
                continue
            if (part, other) == ("", "api"):
                continue  # magi_ray.load, fetched when it is asked for
            if part not in HEIGHT or HEIGHT[other] > HEIGHT[part]:
                yield f"{line}: {part or 'the package'} imports {other}, which stands above it"
            elif HEIGHT[other] == HEIGHT[part] and not any({part, other} <= group for group in TOGETHER):
                yield f"{line}: {part} imports its neighbour {other}"
        elif top == "ray" and part != "cluster":
            yield f"{line}: {part} imports ray, which only cluster does"
        elif HEIGHT.get(part) == 0 and any(name == bad or name.startswith(f"{bad}.") for bad in NOT_ON_THE_GROUND):
            yield f"{line}: {part} imports {top}, but the ground has no torch, no ray, no network"
        elif top.startswith("a name"):
            yield f"{line}: imports {top}, which no one can check"


def text_faults(module: str, tree: ast.AST, is_package: bool) -> Iterator[str]:
    reads = {f"os.{name}" for name in ("environ", "environb", "getenv", "putenv", "unsetenv")}
    imported = dict.fromkeys(name for _, name in imports(module, tree, is_package))
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if module != "magi_ray.settings.environment":
            names = {f"os.{alias.name}" for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
            from_os = isinstance(node, ast.ImportFrom) and node.module == "os" and names & reads
            if from_os or (isinstance(node, ast.Attribute) and dotted(node) in reads):
                yield f"{line}: reads the environment, which only settings.environment does"
        if isinstance(node, ast.Call):
            options = {keyword.arg: keyword.value for keyword in node.keywords}
            name = called(node)
            waits = name in ("ray.get", "ray.wait") or (name in ("get", "wait") and f"ray.{name}" in imported)
            if waits and (is_none(options.get("timeout")) or "timeout" not in options):
                yield f"{line}: {name} without a timeout"
            thread = name == "threading.Thread" or (name == "Thread" and "threading.Thread" in imported)
            if thread and not is_true(options.get("daemon")):
                yield f"{line}: a thread that is not a daemon"


def is_none(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def is_true(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def faults(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """Everything in ``source`` that the floors do not allow, a line each."""
    tree = ast.parse(source)
    found = [*import_faults(module, tree, is_package), *text_faults(module, tree, is_package)]
    part = part_of(module)
    if part and part not in HEIGHT:
        found.append(f"1: {part} stands on no floor")
    return found


def modules() -> list[Path]:
    return sorted((ROOT / "magi_ray").rglob("*.py"))


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    is_package = path.name == "__init__.py"
    name = path.parent if is_package else path.with_suffix("")
    module = ".".join(name.relative_to(ROOT).parts)

    assert faults(module, path.read_text(), is_package=is_package) == []


def test_all_modules_are_read() -> None:
    assert {part_of(".".join(path.relative_to(ROOT).with_suffix("").parts)) for path in modules()} >= {
        "errors", "timeline", "manifest", "settings", "sampling", "models", "storage", "media",
        "render.plans", "render.artifacts", "render.tasks", "render.runs", "render.driving", "render.upkeep",
    }  # fmt: skip


ABOVE = ", which stands above it"
ONLY = ", which only cluster does"
GROUND = ", but the ground has no torch, no ray, no network"
ENVIRONMENT = "reads the environment, which only settings.environment does"
THREAD = "a thread that is not a daemon"
PLAN = "storage imports render.plans"
PLANS = "render.plans imports render.artifacts"
DRIVING = "render.driving imports render.upkeep"


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("magi_ray.storage.local", "from magi_ray.render.plans.row_plan import Plan", PLAN + ABOVE),
        ("magi_ray.storage.local", "from magi_ray import render", "storage imports render" + ABOVE),
        ("magi_ray.storage.local", "import magi_ray.render.plans.row_plan", "storage imports render.plans" + ABOVE),
        ("magi_ray.storage.local", "from ..render import plan", "storage imports render" + ABOVE),
        ("magi_ray.storage.local", "from .. import render", "storage imports render" + ABOVE),
        ("magi_ray.errors", "def f():\n    from magi_ray import storage", "errors imports storage" + ABOVE),
        ("magi_ray.render.plans.row_plan", "import magi_ray.cluster", "render.plans imports cluster" + ABOVE),
        ("magi_ray.render.plans.identity", "from magi_ray.render.artifacts import commits", PLANS + ABOVE),
        ("magi_ray.render.driving.loop", "from magi_ray.render.upkeep import gc", DRIVING + ABOVE),
        ("magi_ray.render.tasks.embed", "from ..runs import record", "render.tasks imports its neighbour render.runs"),
        ("magi_ray.cluster.actors", "from magi_ray.cli import main", "cluster imports cli" + ABOVE),
        ("magi_ray.cli", "from magi_ray import __version__", "cli imports __version__ from the package's root"),
        ("magi_ray", "from magi_ray.cli import main", "the package imports cli" + ABOVE),
        ("magi_ray.storage.local", "from magi_ray.media import reader", "storage imports its neighbour media"),
        ("magi_ray.models.dit.model", "from ...sampling import window", "models imports its neighbour sampling"),
        ("magi_ray.render.driving.local", "import ray", "render.driving imports ray" + ONLY),
        ("magi_ray.render.driving.local", "from ray.util import state", "render.driving imports ray" + ONLY),
        ("magi_ray.cli", "import importlib\nimportlib.import_module('ray')", "cli imports ray" + ONLY),
        ("magi_ray.cli", "__import__('r' + 'ay')", "imports a name made at run time, which no one can check"),
        ("magi_ray.manifest", "import torch.nn", "manifest imports torch" + GROUND),
        ("magi_ray.settings", "import boto3", "settings imports boto3" + GROUND),
        ("magi_ray.errors", "from urllib import request", "errors imports urllib" + GROUND),
        ("magi_ray.cli", "import os\nos.environ['A']", ENVIRONMENT),
        ("magi_ray.settings.sources", "import os\nos.environ['A']", ENVIRONMENT),
        ("magi_ray.cli", "from os import getenv", ENVIRONMENT),
        ("magi_ray.cluster.workers", "import ray\nray.get(x)", "ray.get without a timeout"),
        ("magi_ray.cluster.workers", "import ray\nray.wait([x], timeout=None)", "ray.wait without a timeout"),
        ("magi_ray.cluster.workers", "from ray import get\nget(x)", "get without a timeout"),
        ("magi_ray.render.driving.local", "import threading\nthreading.Thread(target=f)", THREAD),
        ("magi_ray.render.driving.loop", "from threading import Thread\nThread(target=f, daemon=False)", THREAD),
        ("magi_ray.helpers", "x = 1", "helpers stands on no floor"),
    ],
)  # fmt: skip
def test_the_reader_of_imports_sees_what_is_wrong(module: str, source: str, fault: str) -> None:
    found = [line.split(": ", 1)[1] for line in faults(module, source)]

    assert found == [fault]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "magi_ray.render.plans.row_plan",
            "from magi_ray.storage import keys\nfrom . import identity\nimport magi_ray.errors",
        ),
        ("magi_ray.manifest", "from magi_ray.settings import Settings\nfrom urllib.parse import unquote"),
        ("magi_ray.cluster.workers", "import ray\nray.get(x, timeout=5)\nray.wait([x], timeout=limit)\nq.get()"),
        ("magi_ray.render.driving.local", "import threading\nthreading.Thread(target=f, daemon=True)"),
        ("magi_ray.settings.environment", "import os\nos.environ['A']"),
        ("magi_ray.cli", "from magi_ray.report import show\nfrom magi_ray.commands import look"),
    ],
)
def test_the_reader_of_imports_lets_pass_what_is_right(module: str, source: str) -> None:
    assert faults(module, source) == []

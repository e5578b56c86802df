"""Break the code in one place at a time and see a test go red: python tests/mutants.py [--only WORD …]

mutants.jsonl beside this file has a line for each: `file`; `old`, a text that occurs in it exactly once; `new`, what
takes its place; and `tests`, those that must fail, as pytest's arguments. The tree is copied, so nothing here changes;
the tests that are named must pass in the copy before it is broken. The exit code is 1 where a mutant survives, does not
apply any more, or its tests fail without it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIST = Path(__file__).with_suffix(".jsonl")
# of pytest
PASSED, FAILED = 0, 1
MAX_SECONDS = 900.0


class Tree:
    """A copy of the files that git tracks, in which mutants and tests are tried one after the other."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.green: dict[str, bool] = {}
        names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in filter(None, names.split("\0")):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name)

    def test(self, tests: str) -> int:
        """pytest's exit code; FAILED where the tests don't end."""
        settings = {"PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--benchmark-disable"]
        try:
            return subprocess.run(
                [*command, *shlex.split(tests)],
                cwd=self.folder,
                env=os.environ | settings,
                capture_output=True,
                timeout=MAX_SECONDS,
            ).returncode
        except subprocess.TimeoutExpired:
            return FAILED

    def verdict(self, mutant: dict[str, str]) -> str:
        """`killed`, or what is wrong."""
        path, tests = self.folder / mutant["file"], mutant["tests"]
        text = path.read_text() if path.is_file() else ""
        if (count := text.count(mutant["old"])) != 1:
            return f"does not apply: its text occurs {count} times"
        if tests not in self.green:
            self.green[tests] = self.test(tests) == PASSED
        if not self.green[tests]:
            return "its tests don't pass without it"
        path.write_text(text.replace(mutant["old"], mutant["new"]))
        try:
            code = self.test(tests)
        finally:
            path.write_text(text)
        return {PASSED: "survived", FAILED: "killed"}.get(code, f"broke its tests: pytest ended with code {code}")


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="mutants whose line has one of these words"
    )
    parser.add_argument("--together", type=int, default=2, help="how many at once; default: %(default)s")
    parser.add_argument("--list", type=Path, default=LIST, help="the mutants; default: mutants.jsonl beside this file")
    arguments = parser.parse_args(words)
    lines = [line for line in arguments.list.read_text().splitlines() if line.strip()]
    mutants = [json.loads(line) for line in lines if not arguments.only or any(word in line for word in arguments.only)]
    # those with the same tests go to the same copy, where these are run without a mutant once
    groups: dict[str, list[dict[str, str]]] = {}
    for mutant in mutants:
        groups.setdefault(mutant["tests"], []).append(mutant)
    alive, begun, trees, lock = [], time.time(), threading.local(), threading.Lock()

    with tempfile.TemporaryDirectory() as folder:

        def run(group: list[dict[str, str]]) -> None:
            if not hasattr(trees, "tree"):
                trees.tree = Tree(Path(tempfile.mkdtemp(dir=folder)))
            for mutant in group:
                found = trees.tree.verdict(mutant)
                with lock:
                    if found != "killed":
                        alive.append(mutant)
                    change = " ".join(mutant["new"].split()) or f"without {' '.join(mutant['old'].split())}"
                    print(f"{time.time() - begun:5.0f} s  {found}: {mutant['file']}: {change}", flush=True)

        with ThreadPoolExecutor(arguments.together) as pool:
            list(pool.map(run, groups.values()))
    print(f"{len(mutants) - len(alive)} of {len(mutants)} killed")
    return int(bool(alive))


if __name__ == "__main__":
    sys.exit(main())

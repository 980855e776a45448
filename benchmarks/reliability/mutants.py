"""Which small faults in the package do the tests notice?

    python benchmarks/reliability/mutants.py                      # a seeded sample of every file
    python benchmarks/reliability/mutants.py --per-file 0         # every fault that mutations.py can make
    python benchmarks/reliability/mutants.py --survivors          # those that no test noticed, again

First every quick test file runs once as it is, and the functions that each test enters are noted. Then each fault is
put in, and the tests that enter its function run, the quickest first, until one fails. Everything is loaded and
collected once; each fault gets a forked process of its own, in which the function's code is exchanged. (A fault outside
of functions, or in the default of an argument, is imported instead.) A line per fault goes to ``mutants.csv`` at
once, so that a run which was stopped goes on where it was. Linux only.

A fault counts as killed if a test fails or, rarely, if the tests do not end. One that changes nothing anybody could
see is listed in ``judged.csv`` with the reason.
"""

from __future__ import annotations

import argparse
import csv
import gc
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

from mutations import Mutation, mutations

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS, JUDGED = HERE / "mutants.csv", HERE / "judged.csv"
FIELDS = ("file", "line", "function", "kind", "mutation", "killed_by", "seconds")

# part of the package: names of test files; what runs scripts, processes or needs a network is none of them
COMMON = ("test_checks", "test_golden", "test_mutants*")
AREAS = {
    "sampler": ("test_sampler", "test_sampler_orders", "test_clustering", "test_seeding", "test_mutants*"),
    "retrieval": ("test_retrieval*", *COMMON),
    "losses": ("test_streamed_losses", "test_negatives",
                "test_pair_losses", "test_infonce", "test_sigmoid", "test_triplet", *COMMON),
    "cross_modal.py": ("test_graph", "test_sparse", "test_candidates", *COMMON),
    "graph.py": ("test_graph", "test_sparse", "test_candidates", *COMMON),
    "relations": ("test_graph", "test_sparse", "test_candidates", "test_interaction", *COMMON),
    "interaction.py": ("test_interaction", "test_sparse", "test_candidates", *COMMON),
    "alignment": ("test_alignment", "test_alignment_paths", "test_alignment_speed", "test_alignment_ties",
                  "test_candidates", "test_reference", *COMMON),
}  # fmt: skip
SLOWEST = 8.0  # CPU seconds of one test; slower ones are left out


def sources(area: str) -> list[Path]:
    place = ROOT / "hrem_layers" / area
    files = [place] if place.suffix else sorted(place.glob("*.py"))
    return [x for x in files if x.name != "__init__.py" or len(x.read_text().splitlines()) > 20]


def test_files(area: str) -> list[Path]:
    return sorted({path for name in AREAS[area] for path in (ROOT / "tests").glob(f"{name}.py")})


# ---- in a forked process -------------------------------------------------------------------------


def in_fork(work: Callable[[], object], *, cpu_seconds: float, seconds: float) -> tuple[object, str]:
    """What ``work`` returns and "", or None and why there is nothing ("time", "crash")."""
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "answer.json"
        child = os.fork()
        if child == 0:
            try:
                os.setsid()
                resource.setrlimit(resource.RLIMIT_CPU, (int(cpu_seconds), int(cpu_seconds) + 5))
                resource.setrlimit(resource.RLIMIT_DATA, (8 * 2**30, 8 * 2**30))
                quiet = os.open(os.devnull, os.O_RDWR)
                for stream in (0, 1, 2):
                    os.dup2(quiet, stream)
                answer.with_suffix(".part").write_text(json.dumps(work()))
                answer.with_suffix(".part").rename(answer)
            finally:
                os._exit(0)
        deadline = time.monotonic() + seconds
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            if time.monotonic() > deadline:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return None, "time"
            time.sleep(0.02)
        if answer.exists():
            return json.loads(answer.read_text()), ""
        return None, "time" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU else "crash"


def pytest_main(files: list[Path], plugin: object, *options: str) -> int:
    import pytest

    os.chdir(ROOT)
    arguments = ["-q", "-p", "no:cacheprovider", "-W", "ignore", *options, *map(str, files)]
    return int(pytest.main(arguments, plugins=[plugin]))


class Recorder:
    """Per test: the functions of the package that it enters, its CPU seconds, whether it passes."""

    def __init__(self) -> None:
        self.tests: dict[str, dict[str, object]] = {}
        self.entered: set[str] = set()

    def trace(self, frame, event, argument):  # type: ignore[no-untyped-def]
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE):
            self.entered.add(f"{name[len(PACKAGE) :]}:{frame.f_code.co_firstlineno}")

    def pytest_runtest_setup(self, item) -> None:  # type: ignore[no-untyped-def]
        self.entered, self.start = set(), time.process_time()
        sys.settrace(self.trace)

    def pytest_runtest_logreport(self, report) -> None:  # type: ignore[no-untyped-def]
        if report.when == "call":
            sys.settrace(None)
            self.tests[report.nodeid] = {
                "seconds": time.process_time() - self.start, "passed": report.passed,
                "entered": sorted(self.entered),
            }  # fmt: skip


PACKAGE = str(ROOT / "hrem_layers") + os.sep


def reached(area: str, cache: Path) -> dict[str, dict]:
    """Of the tests of an area: what :class:`Recorder` says; kept per file, as long as the file is the same."""
    cache.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict] = {}
    for file in test_files(area):
        kept = cache / f"{file.stem}.json"
        if not kept.exists() or kept.stat().st_mtime < file.stat().st_mtime:

            def record(file: Path = file) -> dict[str, dict]:
                recorder = Recorder()
                pytest_main([file], recorder)
                return recorder.tests

            start = time.monotonic()
            tests, problem = in_fork(record, cpu_seconds=900, seconds=1800)
            print(f"{file.name}: {len(tests or ())} tests {problem} {time.monotonic() - start:.0f} s", file=sys.stderr)
            kept.write_text(json.dumps(tests or {}))
        found |= json.loads(kept.read_text())
    return {name: x for name, x in found.items() if x["passed"] and x["seconds"] < SLOWEST}


def first_lines(path: Path) -> list[tuple[int, int]]:
    """(first, last) line of every function; the first line of a decorated one is its decorator's."""
    import ast

    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        (min([x.lineno, *(d.lineno for d in x.decorator_list)]), x.end_lineno or x.lineno)
        for x in ast.walk(tree) if isinstance(x, ast.FunctionDef | ast.AsyncFunctionDef)
    ]  # fmt: skip


def chosen_tests(mutation: Mutation, tests: dict[str, dict]) -> list[str]:
    """Those that enter the innermost function around the fault; outside of functions, all that enter the file."""
    name = mutation.file.removeprefix("hrem_layers/")
    spans = sorted(first_lines(ROOT / mutation.file))
    around = [(first, last) for first, last in spans if first <= mutation.line <= last]
    found: list[str] = []
    if around:
        place = f"{name}:{around[-1][0]}"
        found = [test for test, x in tests.items() if place in x["entered"]]
    else:
        found = [test for test, x in tests.items() if any(y.startswith(f"{name}:") for y in x["entered"])]
    return sorted(found, key=lambda test: tests[test]["seconds"])


class Chosen:
    """Only these tests, in this order; remembers the first that fails."""

    def __init__(self, names: list[str]) -> None:
        self.order = {name: i for i, name in enumerate(names)}
        self.failed = ""

    def pytest_collection_modifyitems(self, items) -> None:  # type: ignore[no-untyped-def]
        items[:] = sorted((x for x in items if x.nodeid in self.order), key=lambda x: self.order[x.nodeid])

    def pytest_runtest_logreport(self, report) -> None:  # type: ignore[no-untyped-def]
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_collectreport(self, report) -> None:  # type: ignore[no-untyped-def]
        if report.failed and not self.failed:
            self.failed = f"import ({report.nodeid})"


class Faulty(importlib.abc.MetaPathFinder):
    """Imports one module from a syntax tree instead of its file."""

    def __init__(self, mutation: Mutation) -> None:
        self.path = str(ROOT / mutation.file)
        self.name = mutation.file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        self.code = compile(mutation.tree, self.path, "exec")

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name != self.name:
            return None
        loader = importlib.machinery.SourceFileLoader(name, self.path)
        loader.get_code = lambda fullname: self.code  # type: ignore[method-assign]
        return importlib.util.spec_from_file_location(name, self.path, loader=loader)


def limits(names: list[str], tests: dict[str, dict]) -> dict[str, float]:
    budget = sum(tests[name]["seconds"] for name in names)
    return {"cpu_seconds": 30 + 4 * budget, "seconds": 240 + 20 * budget}


def tried_by_import(mutation: Mutation, tests: dict[str, dict]) -> str:
    """The name of the test that notices the fault; "" if none does."""
    names = chosen_tests(mutation, tests)
    if not names:
        return ""

    def work() -> str:
        sys.meta_path.insert(0, Faulty(mutation))
        plugin = Chosen(names)
        pytest_main(sorted({ROOT / name.split("::", 1)[0] for name in names}), plugin, "-x")
        return plugin.failed

    failed, problem = in_fork(work, **limits(names, tests))
    return f"({problem})" if problem else str(failed)


class Server:
    """Collects the tests once, then exchanges one function after another, each in a fork."""

    def __init__(self, wanted: list[Mutation], tests: dict[str, dict], record: Callable[[Mutation, str, float], None]):
        self.wanted, self.tests, self.record, self.failed = wanted, tests, record, ""

    def pytest_runtest_logreport(self, report) -> None:  # type: ignore[no-untyped-def]
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_runtestloop(self, session) -> bool:  # type: ignore[no-untyped-def]
        items = {item.nodeid: item for item in session.items}
        loaded: Loaded = {}
        for x in gc.get_objects():
            if isinstance(x, types.FunctionType) and x.__code__.co_filename.startswith(PACKAGE):
                place = x.__code__.co_filename, x.__code__.co_qualname, x.__code__.co_firstlineno
                loaded.setdefault(place, []).append(x)
        gc.freeze()  # a collection in the fork would copy all memory
        for mutation in self.wanted:
            start = time.monotonic()
            exchanged = changed_functions(mutation, loaded)
            if not exchanged:
                continue  # left to an import
            names = [name for name in chosen_tests(mutation, self.tests) if name in items]

            def work(exchanged=exchanged, names=names) -> str:  # type: ignore[no-untyped-def]
                for function, code in exchanged:
                    function.__code__ = code
                for name in names:
                    items[name].config.hook.pytest_runtest_protocol(item=items[name], nextitem=None)
                    if self.failed:
                        break
                return self.failed

            failed, problem = in_fork(work, **limits(names, self.tests))
            self.record(mutation, f"({problem})" if problem else str(failed), time.monotonic() - start)
        return True


Loaded = dict[tuple[str, str, int], list[types.FunctionType]]
"""By file, name and first line."""


def changed_functions(mutation: Mutation, loaded: Loaded) -> list[tuple[types.FunctionType, types.CodeType]]:
    """The functions, as they are loaded, whose code the fault changes, with that code; none if it changes others."""
    path = str(ROOT / mutation.file)
    old, new = compile(mutation.source, path, "exec"), compile(mutation.tree, path, "exec")
    before, after = (dict(functions(code)) for code in (old, new))
    changed = {name for name in before if before[name] != after.get(name)}
    if not changed or before.keys() != after.keys():
        return []
    if not all((path, *place) in loaded for place in changed):
        return []
    found = [(x, after[place]) for place in changed for x in loaded[(path, *place)]]
    return found if all(x.__code__.co_freevars == code.co_freevars for x, code in found) else []


def functions(code: types.CodeType) -> Iterator[tuple[tuple[str, int], types.CodeType]]:
    """Of a module: its functions and methods, not those inside of them."""
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            if constant.co_flags & 2:  # CO_NEWLOCALS: a function; the body of a class has none
                if not constant.co_name.startswith("<"):
                    yield (constant.co_qualname, constant.co_firstlineno), constant
            else:
                yield from functions(constant)


# ---- the run -------------------------------------------------------------------------------------


def sample(found: list[Mutation], count: int, seed: int) -> list[Mutation]:
    """``count`` of them (0: all), of every kind in turn."""
    if not count:
        return found
    draw = random.Random(f"{seed} {found[0].file if found else ''}")
    kinds: dict[str, list[Mutation]] = {}
    for mutation in found:
        kinds.setdefault(mutation.kind, []).append(mutation)
    for same in kinds.values():
        draw.shuffle(same)
    taken: list[Mutation] = []
    while len(taken) < count and any(kinds.values()):
        for same in kinds.values():
            if same and len(taken) < count:
                taken.append(same.pop())
    return taken


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write(rows: list[dict[str, object]]) -> None:
    with RESULTS.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def key(row: dict[str, str]) -> tuple[str, str, str]:
    return row["file"], row["function"], row["mutation"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--per-file", type=int, default=8, help="faults per file; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--areas", nargs="+", choices=AREAS, default=list(AREAS))
    parser.add_argument("--survivors", action="store_true", help="try those again that no test noticed")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "mutants", help="what each test enters")
    arguments = parser.parse_args(argv)
    judged = {key(row) for row in read(JUDGED)}
    warm_up()
    for area in arguments.areas:
        tests = reached(area, arguments.cache)
        rows = read(RESULTS)
        known = {key(row) for row in rows}
        again = {key(row) for row in rows if not row["killed_by"]} - judged
        wanted: list[Mutation] = []
        for path in sources(area):
            found = mutations(path, str(path.relative_to(ROOT)))
            if arguments.survivors:
                wanted += [x for x in found if x.key in again]
            else:
                wanted += [x for x in sample(found, arguments.per_file, arguments.seed) if x.key not in known]
        done = RESULTS.with_suffix(f".{area}.part")
        done.unlink(missing_ok=True)

        def serve(wanted=wanted, tests=tests, area=area, done=done) -> None:  # type: ignore[no-untyped-def]
            def recorded(fault: Mutation, killed: str, seconds: float) -> None:
                record(fault, killed, seconds)
                with done.open("a") as file:
                    file.write(json.dumps(fault.key) + "\n")

            pytest_main(test_files(area), Server(wanted, tests, recorded))

        if wanted:
            in_fork(serve, cpu_seconds=10**6, seconds=10**6)
        served = {tuple(json.loads(x)) for x in done.read_text().splitlines()} if done.exists() else set()
        for mutation in wanted:
            if mutation.key not in served:
                start = time.monotonic()
                record(mutation, tried_by_import(mutation, tests), time.monotonic() - start)
        done.unlink(missing_ok=True)
        summary(read(RESULTS), judged)
    return 0


def record(mutation: Mutation, killed: str, seconds: float) -> None:
    rows = {key(row): row for row in read(RESULTS)}
    rows[mutation.key] = {
        "file": mutation.file, "line": str(mutation.line), "function": mutation.function, "kind": mutation.kind,
        "mutation": mutation.change, "killed_by": killed, "seconds": f"{seconds:.1f}",
    }  # fmt: skip
    write(list(rows.values()))


def summary(rows: list[dict[str, str]], judged: set[tuple[str, str, str]]) -> None:
    killed = sum(bool(row["killed_by"]) for row in rows)
    same = sum(not row["killed_by"] and key(row) in judged for row in rows)
    print(f"{len(rows)} faults: {killed} killed, {same} judged to change nothing, {len(rows) - killed - same} survive")


def warm_up() -> None:
    """What every forked process would otherwise load again."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "examples")]
    import einops  # noqa: F401
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import torch.utils.data
    from sklearn.cluster import KMeans  # noqa: F401

    torch.set_num_threads(1)


if __name__ == "__main__":
    sys.exit(main())

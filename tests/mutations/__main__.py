"""`python -m tests.mutations [WORD]`: plant each bug of planted.toml (those that name WORD) in a copy of the
repository, one at a time, and run the test that should notice. Exit code 1 if one stays unnoticed.

A bug in csrc/ is compiled, which takes a compiler and half a minute.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
COPIED = ("src", "tests", "csrc", "examples", "CMakeLists.txt", "README.md", "pyproject.toml")
SECONDS = 300
"""after which a test counts as hanging, which is noticed too"""

# An editable install finds its own sources before anything on the path; child processes of the tests too.
WITHOUT_EDITABLE = """import sys
sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "ScikitBuildRedirectingFinder"]
"""


class Copy:
    """The repository in a temporary folder, its tests run against its own sources."""

    def __init__(self, root: Path) -> None:
        self.root, self.tools = root / "copy", root / "tools"
        native = self._python("-c", "from unvanish import _native; print(_native.__file__)").stdout.strip()
        for name in COPIED:
            place = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            self.root.mkdir(exist_ok=True)
            place(ROOT / name, self.root / name)
        self.tools.mkdir()
        (self.tools / "sitecustomize.py").write_text(WITHOUT_EDITABLE)
        self.native = self.root / "src/unvanish" / Path(native).name
        shutil.copy(native, self.native)
        path = f"{self.tools}{os.pathsep}{self.root / 'src'}"
        self.environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
        found = self._python("-c", "import unvanish; print(unvanish.__file__)").stdout.strip()
        if not Path(found).is_relative_to(self.root):
            raise SystemExit(f"the copy's tests would run {found}; expected sources below {self.root}")

    environment: dict[str, str] | None = None

    def _python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, env=self.environment, check=False
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr}")
        return done

    def test(self, *names: str) -> str:
        """ "passes", "fails", or what went wrong instead"""
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *names]
        with tempfile.TemporaryFile("w+") as said:
            run = subprocess.Popen(
                command, cwd=self.root, env=self.environment, stdout=said, stderr=said, start_new_session=True
            )
            try:
                run.wait(SECONDS)
            except subprocess.TimeoutExpired:
                return "fails"
            finally:
                # A bug may leave children of the test hanging.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(run.pid, signal.SIGKILL)
            said.seek(0)
            output = said.read()
        codes = {0: "passes", 1: "fails", -6: "fails", -11: "fails"}
        return codes.get(run.returncode, f"pytest ended with {run.returncode}:\n{output[-2000:]}")

    def compile(self) -> bool:
        """Whether the kernels compile; those of the copy are replaced."""
        build = self.root / "build"
        if not build.exists():
            self._python("-m", "pip", "install", "-q", "--target", str(self.tools), "nanobind>=2.7")
            self._run("cmake", "-S", ".", "-B", "build", f"-DPython_EXECUTABLE={sys.executable}")
        command = ("cmake", "--build", "build", "--parallel")
        if subprocess.run(command, cwd=self.root, env=self.environment, capture_output=True, check=False).returncode:
            return False
        shutil.copy(build / self.native.name, self.native)
        return True

    def _run(self, *command: str) -> None:
        done = subprocess.run(command, cwd=self.root, env=self.environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


def main(word: str = "") -> int:
    bugs = tomllib.loads((Path(__file__).parent / "planted.toml").read_text(encoding="utf-8"))["bug"]
    bugs = [bug for bug in bugs if word in f"{bug['file']} {bug['test']}"]
    if not bugs:
        raise SystemExit(f"no planted bug names {word!r} in its file or its test")
    lost = [bug for bug in bugs if (ROOT / bug["file"]).read_text(encoding="utf-8").count(bug["old"]) != 1]
    if lost:
        raise SystemExit("\n".join(f"{bug['file']}: expected once: {bug['old']}" for bug in lost))
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(Path(folder))
        clean = copy.test(*dict.fromkeys(bug["test"] for bug in bugs))
        if clean != "passes":
            raise SystemExit(f"without any bug: {clean}")
        unnoticed = 0
        for number, bug in enumerate(bugs, 1):
            path = copy.root / bug["file"]
            sound, native = path.read_text(encoding="utf-8"), copy.native.read_bytes()
            path.write_text(sound.replace(bug["old"], bug["new"]), encoding="utf-8")
            compiled = not path.is_relative_to(copy.root / "csrc") or copy.compile()
            outcome = copy.test(bug["test"]) if compiled else "does not compile"
            path.write_text(sound, encoding="utf-8")
            copy.native.write_bytes(native)
            unnoticed += outcome != "fails"
            seen = {"fails": "noticed", "passes": "UNNOTICED"}.get(outcome, outcome)
            print(f"{number}/{len(bugs)} {bug['file']}: {bug['old']} → {bug['new'] or 'nothing'}: {seen}", flush=True)
    print(f"{len(bugs) - unnoticed} of {len(bugs)} planted bugs noticed")
    return int(unnoticed > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))

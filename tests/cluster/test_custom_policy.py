"""A policy from a package of its own, as the documentation writes it, serves a live cluster."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from local_cluster import Connect, MakeConfig, generate, local_cluster

pytestmark = pytest.mark.cluster

PAGE = Path(__file__).parents[2] / "docs" / "scheduling.md"
METADATA = "Metadata-Version: 2.1\nName: their-policies\nVersion: 1.0\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


@pytest.fixture
def their_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a wheel of the code and the entry point on the page, and let pip install it."""
    page = PAGE.read_text()
    code = re.search(r"```python\n# their_policies\.py\n(.*?)```", page, re.DOTALL)
    entry = re.search(r'\n(\[project\.entry-points\."(.*?)"\])\n(\w+) = "(.*?)"\n', page)
    assert code is not None
    assert entry is not None
    info = "their_policies-1.0.dist-info"
    wheel = tmp_path / "their_policies-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("their_policies.py", code[1])
        archive.writestr(f"{info}/METADATA", METADATA)
        archive.writestr(f"{info}/WHEEL", WHEEL)
        archive.writestr(f"{info}/entry_points.txt", f"[{entry[2]}]\n{entry[3]} = {entry[4]}\n")
        archive.writestr(f"{info}/RECORD", "")
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--target", str(site), str(wheel)], check=True)
    monkeypatch.syspath_prepend(site)  # worker processes start with this process's path


async def test_a_policy_from_another_package_serves(
    their_package: None, make_config: MakeConfig, connect: Connect
) -> None:
    prompts = [[7 * i + j for j in range(20)] for i in range(4)]
    outputs = {}
    for policy in ("chunked_prefill", "last_come_first"):
        config = make_config(scheduler={"policy": policy})
        async with local_cluster(config) as cluster, connect(cluster) as dispatcher:
            async with asyncio.timeout(30):
                outputs[policy] = await asyncio.gather(
                    *(generate(dispatcher, f"r{i}", prompt) for i, prompt in enumerate(prompts))
                )
            for name in cluster.workers:
                assert (await cluster.status(name)).policy == policy
            await cluster.assert_all_free()
    assert outputs["last_come_first"] == outputs["chunked_prefill"]

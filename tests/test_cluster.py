"""`ray up` over three hosts of our own on one machine, and training across them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny

from ray_dmml import yamlio
from ray_dmml.config import Config
from ray_dmml.runfolder import RunFolder
from ray_dmml.training import train

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[1]
NEEDED = ("unshare", "nsenter", "ip", "rsync", "ssh", "/usr/sbin/sshd")
STEPS = 60
PATIENCE_S = 240.0
NUM_LINES_BEFORE_THE_CUT = 4
"""Of metrics.jsonl, which has one every 5 steps."""


class Hosts:
    """Hosts 1 to 3; the first is the head of a Ray cluster on all of them."""

    def __init__(self, folder: Path, images: Path) -> None:
        self.folder = folder
        # Where the interpreter and its packages are; what the home or /tmp has of them is hidden else.
        kept = {sys.base_prefix, sys.prefix, str(images)}
        with (folder / "hosts.log").open("w") as log:
            self._process = subprocess.Popen(
                [ROOT / "tests/cluster/hosts.sh", "3", folder, *sorted(kept)],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.wait_for((folder / "ready").exists)
        self._home = folder / "home"
        (self._home / ".ray").mkdir(parents=True)
        (self._home / ".ray" / "auth_token").write_text(os.urandom(32).hex())
        self._cluster = folder / "cluster.yaml"
        self._cluster.write_text(yamlio.dump(self._settings()))

    def _settings(self) -> dict[str, Any]:
        """deploy/on-prem.yaml with these hosts' addresses, and packages from where they are already: the
        hosts reach no index."""
        found: dict[str, Any] = yamlio.load((ROOT / "deploy/on-prem.yaml").read_text())
        found["cluster_name"] = f"test-{os.getpid()}"
        found["provider"] |= {"head_ip": "10.77.0.11", "worker_ips": ["10.77.0.12", "10.77.0.13"]}
        found["auth"] = {"ssh_user": "root", "ssh_private_key": str(self.folder / "key")}
        make, install, path = found["setup_commands"]
        assert "venv" in make and "pip install" in install and ".bashrc" in path
        packages = sysconfig.get_paths()["purelib"]
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        ray = '#!/bin/sh\\nexec ~/env/bin/python -m ray.scripts.scripts "$@"\\n'
        found["setup_commands"] = [
            f"{sys.base_prefix}/bin/{version} -m venv --without-pip ~/env",
            f"echo {packages} > ~/env/lib/{version}/site-packages/image.pth",
            f"printf '{ray}' > ~/env/bin/ray && chmod +x ~/env/bin/ray",
            "~/env/bin/python -m pip install -q --no-index --no-deps --no-build-isolation"
            " -e ~/ray-dmml",
            path,
        ]
        return found

    def command(self, *command: str | Path) -> list[str]:
        """To be run where the hosts can be reached."""
        outer = (self.folder / "outer").read_text().strip()
        return ["nsenter", "--net", "--target", outer, *map(str, command)]

    def start(self, verb: str, *arguments: str) -> subprocess.Popen[str]:
        """`ray up`, `ray exec`, ... of the cluster file."""
        command = self.command(sys.executable, "-m", "ray.scripts.scripts", verb)
        return subprocess.Popen(
            [*command, str(self._cluster), *arguments],
            env={**os.environ, "HOME": str(self._home), "RAY_UP_enable_autoscaler_v2": "0"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def ray(self, verb: str, *arguments: str, check: bool = True) -> str:
        """The same to its end; what it told."""
        process = self.start(verb, *arguments)
        try:
            told = process.communicate(timeout=PATIENCE_S)[0]
        finally:
            process.kill()
        assert not check or process.returncode == 0, told
        return told

    def ssh(self, host: int, command: str) -> str:
        options = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
        asked = ["ssh", "-i", self.folder / "key", *options.split(), f"root@10.77.0.1{host}"]
        ended = subprocess.run(
            self.command(*asked, command), capture_output=True, text=True, timeout=60
        )
        return ended.stdout + ended.stderr

    def cut(self, host: int, *, off: bool) -> None:
        state = "down" if off else "up"
        subprocess.run(self.command("ip", "link", "set", f"wire{host}", state), check=True)

    def num_nodes(self) -> int:
        told = self.ray("exec", "ray list nodes --format json | grep -o ALIVE | wc -l", check=False)
        counts = re.findall(r"^(\d+)\s*$", told, re.MULTILINE)
        return int(counts[-1]) if counts else 0

    @staticmethod
    def wait_for(is_so: Callable[[], bool], seconds: float = PATIENCE_S) -> None:
        until = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < until, "it did not come"
            time.sleep(0.5)

    def close(self) -> None:
        os.kill(int((self.folder / "outer").read_text()), signal.SIGKILL)
        self._process.wait()
        for left in Path("/tmp/ray").glob(f"cluster-test-{os.getpid()}*"):
            left.unlink()


@pytest.fixture(scope="module")
def hosts(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    missing = [tool for tool in NEEDED if shutil.which(tool) is None]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"needs root and {', '.join(NEEDED)} (missing: {', '.join(missing) or 'root'})")
    found = Hosts(tmp_path_factory.mktemp("hosts"), image_folder)
    try:
        found.ray("up", "-y", "--no-config-cache")
        found.wait_for(lambda: found.num_nodes() == 3)
        yield found
    finally:
        found.close()


def plain(command: str) -> str:
    """Its output as in a file, not as on the terminal that `ray exec` gives it."""
    return f"{command} 2>&1 | cat; exit ${{PIPESTATUS[0]}}"


def settings(images: Path, transport: str, steps: int = STEPS) -> dict[str, Any]:
    """Three peers, one on each host."""
    raw = tiny(
        images,
        train={"steps": steps, "evaluate_every": 20, "log_every": 5, "tensorboard": False},
        checkpoint={"every_steps": 10},
        evaluation={"recall_at": [1], "untrained": False},
    )
    raw["cohort"] |= {
        "peers": [{}, {"view": "weak"}, {"view": "strong"}],
        "transport": transport,
        "placement": "spread",
        "threads_per_peer": 1,
    }
    raw["cohort"]["base"]["num_cpus"] = 1
    return raw


def outcome(run: Path) -> tuple[Any, str]:
    folder = RunFolder.open(run)
    return folder.checkpoints.load("last").peers, folder.metrics_file.read_text()


@pytest.fixture(scope="module")
def alone(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    """What the run ends with in one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    train(Config.parse(settings(image_folder, "direct")), out, in_process=True)
    return outcome(out)


@pytest.mark.parametrize("transport", ["direct", "coordinator"])
def test_peers_on_three_hosts(
    hosts: Hosts, image_folder: Path, alone: tuple[Any, str], transport: str
) -> None:
    """Each on another one; the same weights and metrics as in one process, whichever way embeddings
    went."""
    config, out = hosts.folder / f"{transport}.yaml", hosts.folder / transport
    config.write_text(yamlio.dump(settings(image_folder, transport)))
    command = f"ray-dmml train --address auto --config {config} --out {out}"
    told = hosts.ray("exec", plain(command))
    assert outcome(out) == alone, told
    assert RunFolder(out).environment()["transport"] == transport
    assert len(set(RunFolder(out).environment()["nodes"])) == 3


def test_a_job_needs_nobody_who_waits_for_it(
    hosts: Hosts, image_folder: Path, alone: tuple[Any, str]
) -> None:
    """Submitted to the head and left alone, it runs to its end."""
    config, out = hosts.folder / "job.yaml", hosts.folder / "job"
    config.write_text(yamlio.dump(settings(image_folder, "direct")))
    command = f"ray-dmml train --address auto --config {config} --out {out}"
    hosts.ray("exec", plain(f"ray job submit --no-wait --submission-id lone -- {command}"))
    try:
        hosts.wait_for((out / "results.json").exists)
    except AssertionError:
        raise AssertionError(hosts.ray("exec", plain("ray job logs lone"))) from None
    assert outcome(out) == alone


def test_a_search_by_ray_submit(hosts: Hosts, image_folder: Path) -> None:
    """The script goes to the head by itself; its trials are on all hosts."""
    raw = settings(image_folder, "direct", steps=4)
    raw["train"]["evaluate_every"] = 2
    raw["cohort"]["peers"] = [{}, {"view": "weak"}]
    config, space, out = (hosts.folder / name for name in ("search.yaml", "space.yaml", "search"))
    config.write_text(yamlio.dump(raw))
    space.write_text(yamlio.dump({"space": {"loss.relational.angle": {"uniform": [0, 4]}}}))
    told = hosts.ray(
        "submit", str(ROOT / "experiments/tune_diversity.py"), "--address", "auto",
        "--config", str(config), "--space", str(space), "--storage", str(out),
        "--num-samples", "2", "--search", "random", "--scheduler", "none", "--final-seeds", "0",
    )  # fmt: skip
    assert (out / "best.yaml").exists(), told
    nodes = [RunFolder(run).environment()["nodes"] for run in sorted(out.glob("trials/*/fold0"))]
    assert len(nodes) == 2 and len({node for pair in nodes for node in pair}) > 1


def test_a_host_that_is_cut_off(hosts: Hosts, image_folder: Path, alone: tuple[Any, str]) -> None:
    """In mid-run: its peer is started on another host, and the end is the same. Once the wire is back
    the host is taken in again, and what went on running on it meanwhile reaches nobody."""
    config, out = hosts.folder / "cut.yaml", hosts.folder / "cut"
    config.write_text(yamlio.dump(settings(image_folder, "direct")))
    command = f"ray-dmml train --address auto --config {config} --out {out}"
    run = hosts.start("exec", plain(command))
    metrics = out / "metrics.jsonl"
    hosts.wait_for(
        lambda: (
            run.poll() is not None
            or (metrics.exists() and metrics.read_text().count("\n") >= NUM_LINES_BEFORE_THE_CUT)
        )
    )
    assert run.poll() is None, run.communicate()[0]
    hosts.cut(3, off=True)
    try:
        told = run.communicate(timeout=PATIENCE_S)[0]
    finally:
        hosts.cut(3, off=False)
        run.kill()
    assert run.returncode == 0, told
    assert "10.77.0.13" in told and "all go back from step" in told, told
    assert outcome(out) == alone, told
    hosts.wait_for(lambda: hosts.num_nodes() == 3)


def test_a_cluster_that_is_taken_down_leaves_nothing(hosts: Hosts) -> None:
    """`ray down` ends the head; the docs' line ends the others'."""
    hosts.ray("down", "-y")
    for host in (2, 3):
        hosts.ssh(host, "bash -ic 'ray stop'")
    for host in (1, 2, 3):
        assert "raylet" not in hosts.ssh(host, "ps -e -o args")

"""`ray up` on three hosts, which are namespaces of this machine, and training across them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny

from ray_dmml.config import yamlio
from ray_dmml.config.schema import Config
from ray_dmml.training.run import train
from ray_dmml.training.run_dir import RunDir

pytestmark = pytest.mark.ray


ROOT = Path(__file__).parents[2]
NEEDED = ("unshare", "nsenter", "ip", "pgrep", "rsync", "ssh", "curl", "/usr/sbin/sshd")
STEPS = 60
TIMEOUT_S = 240.0
NUM_LINES_BEFORE_THE_CUT = 4
"""metrics.jsonl has a line every 5 steps."""

BUCKET = "photo-bucket"
REGION = "region=us-east-1"
S3_SERVER = "http://10.77.0.1:5000"
S3_KEYS = {
    "AWS_ENDPOINT_URL": S3_SERVER,
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
}


class Hosts:
    """Hosts 1 to 3, which form a Ray cluster with host 1 as its head."""

    def __init__(self, folder: Path, images: Path) -> None:
        self.folder = folder
        self._beside: list[subprocess.Popen[str]] = []
        self._home, self._commands = folder / "home", folder / "commands"
        self.cluster = folder / "cluster.yaml"
        # The hosts hide the home folder and /tmp. They must still see the interpreter and its packages.
        kept = {sys.base_prefix, sys.prefix, str(images)}
        with (folder / "hosts.log").open("w") as log:
            self._process = subprocess.Popen(
                [ROOT / "tests/cluster/hosts.sh", "3", folder, *sorted(kept)],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            self._wait_until_ready()
            (self._home / ".ray").mkdir(parents=True)
            (self._home / ".ray" / "auth_token").write_text(os.urandom(32).hex())
            self.cluster.write_text(yamlio.dump(self._settings()))
            self._commands.mkdir()
            for name, module in (("ray", "ray.scripts.scripts"), ("ray-dmml", "ray_dmml.cli")):
                script = self._commands / name
                script.write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
                script.chmod(0o755)
        except BaseException:
            self.close()
            raise

    def _wait_until_ready(self) -> None:
        ready = self.folder / "ready"
        self.wait_for(lambda: ready.exists() or self._process.poll() is not None)
        assert ready.exists(), (self.folder / "hosts.log").read_text()

    def _settings(self) -> dict[str, Any]:
        """deploy/on-prem.yaml for these hosts. They reach no package index and use this installation."""
        cluster: dict[str, Any] = yamlio.load((ROOT / "deploy/on-prem.yaml").read_text())
        cluster["cluster_name"] = f"test-{os.getpid()}"
        cluster["provider"] |= {"head_ip": "10.77.0.11", "worker_ips": ["10.77.0.12", "10.77.0.13"]}
        cluster["auth"] = {"ssh_user": "root", "ssh_private_key": str(self.folder / "key")}
        make, install, path = cluster["setup_commands"]
        assert "venv" in make and "pip install" in install and ".bashrc" in path
        keys = " ".join(f"{name}={value}" for name, value in S3_KEYS.items())
        packages = sysconfig.get_paths()["purelib"]
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        ray = '#!/bin/sh\\nexec ~/env/bin/python -m ray.scripts.scripts "$@"\\n'
        cluster["setup_commands"] = [
            f"{sys.base_prefix}/bin/{version} -m venv --without-pip ~/env",
            f"echo {packages} > ~/env/lib/{version}/site-packages/image.pth",
            f"printf '{ray}' > ~/env/bin/ray && chmod +x ~/env/bin/ray",
            "~/env/bin/python -m pip install -q --no-index --no-deps --no-build-isolation -e ~/ray-dmml",
            path,
            f"echo 'export {keys}' >> ~/.bashrc",
        ]
        return cluster

    def command(self, *command: str | Path) -> list[str]:
        """A command in the hosts' network."""
        outer = (self.folder / "outer").read_text().strip()
        return ["nsenter", "--net", "--target", outer, *map(str, command)]

    def start(self, verb: str, *arguments: str) -> subprocess.Popen[str]:
        """Starts `ray up`, `ray exec`, ... with the cluster file."""
        command = self.command(sys.executable, "-m", "ray.scripts.scripts", verb)
        return subprocess.Popen(
            [*command, str(self.cluster), *arguments],
            env={**os.environ, "HOME": str(self._home), "RAY_UP_enable_autoscaler_v2": "0"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def ray(self, verb: str, *arguments: str, check: bool = True) -> str:
        """The output of such a command."""
        process = self.start(verb, *arguments)
        try:
            output = process.communicate(timeout=TIMEOUT_S)[0]
        finally:
            process.kill()
        assert not check or process.returncode == 0, output
        return output

    def ssh(self, host: int, command: str, *, check: bool = True) -> str:
        """The output of a command on a host.

        Args:
            check: the test fails if the command fails.
        """
        options = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
        ssh = ["ssh", "-i", self.folder / "key", *options.split(), f"root@10.77.0.1{host}"]
        result = subprocess.run(self.command(*ssh, command), capture_output=True, text=True, timeout=60)
        output = result.stdout + result.stderr
        assert not check or result.returncode == 0, f"{command}: {result.returncode}\n{output}"
        return output

    def start_beside(self, line: str, cwd: Path) -> subprocess.Popen[str]:
        """Starts a line of bash beside the hosts, with the commands ray and ray-dmml on the PATH."""
        environment = {
            **os.environ,
            **S3_KEYS,
            "HOME": str(self._home),
            "PATH": f"{self._commands}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "RAY_UP_enable_autoscaler_v2": "0",
        }
        process = subprocess.Popen(
            self.command("bash", "-c", line),
            env=environment,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._beside.append(process)
        return process

    def beside(self, line: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Runs such a line to its end."""
        process = self.start_beside(line, cwd)
        output = process.communicate(timeout=TIMEOUT_S)[0]
        return subprocess.CompletedProcess(line, process.returncode, output)

    @contextmanager
    def running_beside(self, line: str, cwd: Path) -> Iterator[Callable[[], str]]:
        """Runs such a line for the length of the block.

        Yields:
            A function that ends it and returns its output.
        """
        process = self.start_beside(line, cwd)

        def end() -> str:
            with suppress(ProcessLookupError):  # it may have ended
                os.killpg(process.pid, signal.SIGTERM)
            return f"{line}\n{process.communicate(timeout=TIMEOUT_S)[0]}"

        try:
            yield end
        finally:
            if process.poll() is None:
                end()

    def start_bucket(self, images: Path) -> None:
        """Starts an S3 server that all hosts reach, and copies the images to it."""
        port = S3_SERVER.rpartition(":")[2]
        server = f"-c 'from moto.server import main; main()' -H 10.77.0.1 -p {port}"
        self.start_beside(f"exec {sys.executable} {server} > moto.log 2>&1", self.folder)
        self.wait_for(lambda: self.beside(f"curl -s {S3_SERVER}", self.folder).returncode == 0)
        fill = (
            "from pyarrow import fs;"
            f"there = fs.FileSystem.from_uri('s3://{BUCKET}?{REGION}&allow_bucket_creation=true')[0];"
            f"there.create_dir('{BUCKET}');"
            f"fs.copy_files({str(images)!r}, '{BUCKET}/photos', destination_filesystem=there)"
        )
        filled = self.beside(f'{sys.executable} -c "{fill}"', self.folder)
        assert filled.returncode == 0, filled.stdout

    def take_down(self) -> None:
        """`ray down` stops the head, and the line of the docs stops the others. No process is left."""
        self.ray("down", "-y")
        for host in (2, 3):
            self.ssh(host, "bash -ic 'ray stop'")
        for host in (1, 2, 3):
            assert "raylet" not in self.ssh(host, "ps -e -o args")

    def cut(self, host: int, *, off: bool) -> None:
        state = "down" if off else "up"
        subprocess.run(self.command("ip", "link", "set", f"wire{host}", state), check=True)

    def num_nodes(self) -> int:
        output = self.ray("exec", "ray list nodes --format json | grep -o ALIVE | wc -l", check=False)
        counts = re.findall(r"^(\d+)\s*$", output, re.MULTILINE)
        return int(counts[-1]) if counts else 0

    @staticmethod
    def wait_for(
        is_so: Callable[[], bool],
        seconds: float = TIMEOUT_S,
        otherwise: Callable[[], str] = lambda: "timed out",
    ) -> None:
        """Waits until ``is_so`` returns True, or fails with the text of ``otherwise``."""
        deadline = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < deadline, otherwise()
            time.sleep(0.5)

    def close(self) -> None:
        for process in self._beside:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if self._process.poll() is None:
            outer = self.folder / "outer"
            if outer.exists():  # all hosts end with it
                with suppress(ProcessLookupError):
                    os.kill(int(outer.read_text()), signal.SIGKILL)
            else:
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for left in Path("/tmp/ray").glob(f"cluster-test-{os.getpid()}*"):
            left.unlink()


@pytest.fixture(scope="module")
def hosts(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    missing = [tool for tool in NEEDED if shutil.which(tool) is None]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"needs root and {', '.join(NEEDED)} (missing: {', '.join(missing) or 'root'})")
    unshare = subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True, text=True)
    if unshare.returncode:
        pytest.skip(f"namespaces are not allowed here: {unshare.stderr.strip()}")
    hosts = Hosts(tmp_path_factory.mktemp("hosts"), image_folder)
    try:
        hosts.ray("up", "-y", "--no-config-cache")
        hosts.wait_for(lambda: hosts.num_nodes() == 3)
        yield hosts
        hosts.take_down()
    finally:
        hosts.close()


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Replaces a command by a shell script."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def put(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    return put


@pytest.mark.skipif(shutil.which("pgrep") is None, reason="pgrep is not installed")
def test_a_failed_start_of_hosts_is_reported(tmp_path: Path, commands: Callable[[str, str], None]) -> None:
    """Soon, with the message of unshare."""
    commands("unshare", "echo 'unshare failed: Operation not permitted' >&2; exit 1")
    for name in ("key", "host_key"):
        (tmp_path / name).write_text("")
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"Operation not permitted\s+.*is it allowed here"):
        Hosts(tmp_path, tmp_path)
    assert time.monotonic() - start < TIMEOUT_S / 4


def test_a_failed_command_on_a_host_is_reported(tmp_path: Path, commands: Callable[[str, str], None]) -> None:
    """Missing output of a failed command must not count as a result."""
    commands("nsenter", "echo 'no route to host' >&2; exit 255")
    hosts = object.__new__(Hosts)
    hosts.folder = tmp_path
    (tmp_path / "outer").write_text("1\n")
    assert hosts.ssh(1, "ps", check=False) == "no route to host\n"
    with pytest.raises(AssertionError, match=r"ps: 255\s+no route to host"):
        hosts.ssh(1, "ps")


def plain(command: str) -> str:
    """The command without the terminal that `ray exec` gives it."""
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
        "placement_strategy": "spread",
        "threads_per_peer": 1,
    }
    raw["cohort"]["base"]["num_cpus"] = 1
    return raw


def results_of(run: Path) -> tuple[Any, str]:
    folder = RunDir.open(run)
    return folder.checkpoints.load("last").peers, folder.metrics_file.read_text()


@pytest.fixture(scope="module")
def local_results(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    """The results of the run in one process."""
    out = tmp_path_factory.mktemp("local") / "run"
    train(Config.parse(settings(image_folder, "direct")), out, local=True)
    return results_of(out)


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize("transport", ["direct", "coordinator"])
def test_peers_on_three_hosts(hosts: Hosts, image_folder: Path, local_results: tuple[Any, str], transport: str) -> None:
    """One peer on each host, with the weights and metrics of one process, for both transports."""
    config, out = hosts.folder / f"{transport}.yaml", hosts.folder / transport
    config.write_text(yamlio.dump(settings(image_folder, transport)))
    command = f"ray-dmml train --address auto --config {config} --out {out}"
    output = hosts.ray("exec", plain(command))
    assert results_of(out) == local_results, output
    assert RunDir(out).environment()["transport"] == transport
    assert len(set(RunDir(out).environment()["nodes"])) == 3


PARTS = ROOT / "tests/cohort/parts_source.py"


@pytest.mark.cluster
def test_own_parts_on_three_hosts(hosts: Hosts, image_folder: Path, tmp_path: Path) -> None:
    """A loss, a mutual term, views, a backbone and a data set from a file that only the first host has: the weights and
    metrics of one process. A module that the other hosts lack is named."""
    raw = settings(image_folder, "direct", steps=12)
    raw["data"] |= {"name": "outside_parts:reversed_folder", "args": {"num_test": 6}}
    raw["loss"] = {"metric": {"name": "outside_parts:Pairs"}, "mutual": [{"name": "outside_parts:Scaled"}]}
    raw["cohort"]["base"]["view"] = "outside_parts:Noise"
    raw["cohort"]["peers"] = [{"backbone": "outside_parts:Blocks", "backbone_args": {"width": 5}}, {}, {}]
    shutil.copy(PARTS, tmp_path / "outside_parts.py")
    train(Config.parse({**raw, "code": [str(tmp_path / "outside_parts.py")]}), tmp_path / "run", local=True)

    content = shlex.quote(PARTS.read_text())
    hosts.ssh(1, f"mkdir -p ~/parts && printf %s {content} > ~/parts/outside_parts.py")
    config, out = hosts.folder / "own.yaml", hosts.folder / "own"
    config.write_text(yamlio.dump({**raw, "code": ["~/parts/outside_parts.py"]}))
    command = f"ray-dmml train --address auto --config {config} --out {out}"
    output = hosts.ray("exec", plain(command))
    assert results_of(out) == results_of(tmp_path / "run"), output
    assert RunDir(out).environment()["transport"] == "direct"
    assert len(set(RunDir(out).environment()["nodes"])) == 3
    config.write_text(yamlio.dump(raw))
    output = hosts.ray("exec", plain(f"PYTHONPATH=~/parts {command}2"), check=False)
    missing = r"error: on host host\d \(10.77.0.1\d\): .*'outside_parts:\w+'.* no module outside_parts"
    assert re.search(missing, output), output
    assert "Traceback" not in output


SHOW_JOBS = "tail -n 50 /tmp/ray/session_latest/logs/job-driver-*; ls ~/runs/c"
ASK_DASHBOARD = "curl --silent --max-time 2 http://localhost:8265"


def lines_of_the_docs() -> list[str]:
    """The commands of the section, without their comments."""
    section = (ROOT / "docs/how-to/cluster.md").read_text().split("\n## Step by step\n")[1]
    block = section.split("```bash\n")[1].split("```")[0]
    return [line.partition("  #")[0].strip() for line in block.splitlines()]


@pytest.mark.slow
@pytest.mark.cluster
def test_each_line_of_the_docs(hosts: Hosts, image_folder: Path, tmp_path: Path) -> None:
    """*Step by step* in docs/how-to/cluster.md, on a machine beside the hosts. The fixture calls `ray up` and `ray
    down`. The images and the job's checkpoints are in a bucket."""
    pytest.importorskip("moto.server", reason="moto[server] is not installed: no S3 server to test")
    hosts.start_bucket(image_folder)
    raw = settings(image_folder, "direct", steps=8)
    raw["data"] |= {"source": f"s3://{BUCKET}/photos?{REGION}", "root": None}
    raw["cohort"]["base"]["num_cpus"] = 0.5  # each host has two
    raw["cohort"]["peers"] = [{}, {"view": "weak"}, {"view": "strong"}, {"init_seed": 1}]
    (tmp_path / "photos.yaml").write_text(yamlio.dump(raw))
    shutil.copy(hosts.cluster, tmp_path / "cluster.yaml")
    (tmp_path / "experiments").mkdir()
    shutil.copy(ROOT / "experiments/tune_diversity.py", tmp_path / "experiments")

    def ran(line: str, expected: int = 0) -> str:
        """The output of the line, with its URI replaced."""
        line = line.replace("s3://...", f"s3://{BUCKET}/run?{REGION}")
        result = hosts.beside(line, tmp_path)
        assert result.returncode == expected, f"{line}\n{result.stdout}"
        return result.stdout

    for line in lines_of_the_docs():
        match line.split()[:2]:
            case ["ray", "up" | "down"]:
                pass
            case ["ray-dmml", "train"] if "num_gpus=2" in line:
                output = ran(line, expected=2)
                assert "GPU" in output and "Traceback" not in output, output
            case ["ray-dmml", "train"] if "--resume" in line:
                ran(line.replace("8000", "12"))
                assert RunDir.open(tmp_path / "runs/c").checkpoints.load("last").step == 12
            case ["ray-dmml", "train"]:
                ran(line)
                assert (tmp_path / "runs/a/results.json").exists()
            case ["ray", "rsync-up"]:
                ran(line)
                assert BUCKET in hosts.ssh(1, "cat ~/photos.yaml")
            case ["ray", "exec"] if "data fetch" in line:
                output = ran(line)
                assert all(f"10.77.0.1{host}" in output for host in (1, 2, 3)), output
            case ["ray", "exec"] if "job submit" in line:
                ran(line)  # returns before the job ends
                hosts.wait_for(
                    lambda: "results.json" in hosts.ssh(1, "ls ~/runs/c", check=False),
                    otherwise=lambda: hosts.ssh(1, SHOW_JOBS, check=False),
                )
                nodes = hosts.ssh(1, "grep -o 10.77.0.1. ~/runs/c/run.json")
                assert len(set(nodes.split())) == 3
            case ["ray", "submit"]:
                short = "--config /root/photos.yaml --space /root/space.yaml --out /root/runs/d"
                short += " --num-samples 2 --scheduler none --sampler random --final-seeds 0"
                short += " --set train.steps=4 --set train.evaluate_every=2"
                hosts.ssh(
                    1,
                    "echo '{space: {loss.relational.angle_weight: {uniform: [0, 4]}}}' > space.yaml",
                )
                ran(f"{line} {short}")
                assert "best.yaml" in hosts.ssh(1, "ls ~/runs/d")
                nodes = hosts.ssh(1, "grep -ho 10.77.0.1. ~/runs/d/trials/*/fold0/run.json")
                assert len(set(nodes.split())) > 1
            case ["ray", "dashboard"]:
                with hosts.running_beside(line, tmp_path) as end:
                    hosts.wait_for(
                        lambda: "Ray Dashboard" in hosts.beside(ASK_DASHBOARD, tmp_path).stdout,
                        otherwise=end,
                    )
                    # Without a token it shows nothing of the cluster.
                    output = hosts.beside(f"{ASK_DASHBOARD}/api/version", tmp_path).stdout
                    assert "Unauthorized" in output
            case _:
                pytest.fail(f"the test does not know this line: {line}")


@pytest.mark.slow
@pytest.mark.cluster
def test_a_host_that_is_cut_off(hosts: Hosts, image_folder: Path, local_results: tuple[Any, str]) -> None:
    """During a run: its peer starts again on another host, with the same results. Later the host comes back to
    the cluster, and the old peer that still runs there reaches nobody."""
    config, out = hosts.folder / "cut.yaml", hosts.folder / "cut"
    config.write_text(yamlio.dump(settings(image_folder, "direct")))
    command = f"ray-dmml train --address auto --config {config} --out {out}"
    run = hosts.start("exec", plain(command))
    metrics = out / "metrics.jsonl"
    hosts.wait_for(
        lambda: (
            run.poll() is not None or (metrics.exists() and metrics.read_text().count("\n") >= NUM_LINES_BEFORE_THE_CUT)
        )
    )
    assert run.poll() is None, run.communicate()[0]
    hosts.cut(3, off=True)
    try:
        output = run.communicate(timeout=TIMEOUT_S)[0]
    finally:
        hosts.cut(3, off=False)
        run.kill()
    assert run.returncode == 0, output
    assert "10.77.0.13" in output and "all peers go back from step" in output, output
    assert results_of(out) == local_results, output
    hosts.wait_for(lambda: hosts.num_nodes() == 3)

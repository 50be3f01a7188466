"""train() in the kernel of a notebook: what the cell shows, and the stop button."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny
from jupyter_client.manager import KernelManager

from ray_dmml.config import yamlio
from ray_dmml.training.run_dir import RunDir

pytestmark = pytest.mark.ray

PATIENCE_S = 240.0


class Notebook:
    """A notebook whose kernel has ``folder`` as its current one."""

    def __init__(self, folder: Path) -> None:
        self._manager = KernelManager(kernel_name="python3")
        self._manager.start_kernel(cwd=str(folder))
        self._client = self._manager.client()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=PATIENCE_S)

    def run(self, code: str, stop_when: Callable[[str], bool] = lambda shown: False) -> tuple[str, str, str]:
        """Runs a cell. The stop button is pressed once when the live display shows what ``stop_when`` waits for.

        Returns the printed text, the live display's last text, and the error.
        """
        printed, shown, error, has_stopped = "", "", "", False

        def take(message: dict[str, Any]) -> None:
            nonlocal printed, shown, error, has_stopped
            content = message["content"]
            match message["msg_type"]:
                case "stream":
                    printed += content["text"]
                case "display_data" | "update_display_data":
                    assert "<pre" in content["data"]["text/html"]
                    shown = content["data"]["text/plain"]
                case "error":
                    error = "\n".join(content["traceback"])
            if not has_stopped and stop_when(shown):
                has_stopped = True
                self._manager.interrupt_kernel()

        self._client.execute_interactive(code, output_hook=take, allow_stdin=False, timeout=PATIENCE_S)
        return printed, shown, error

    def close(self) -> None:
        self._client.stop_channels()
        self._manager.shutdown_kernel(now=True)


@pytest.fixture
def notebook(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Notebook]:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    raw = tiny(
        image_folder,
        train={"steps": 100_000, "evaluate_every": 0, "log_every": 2, "tensorboard": False},
        checkpoint={"every_steps": 0},
        evaluation={"recall_at": [1], "untrained": False},
    )
    (tmp_path / "long.yaml").write_text(yamlio.dump(raw))
    opened = Notebook(tmp_path)
    yield opened
    opened.close()


def has_steps(shown: str) -> bool:
    return "images/s" in shown


@pytest.mark.parametrize(
    "more", [", local=True", pytest.param("", marks=pytest.mark.slow)], ids=["in process", "on Ray"]
)
def test_the_stop_button(notebook: Notebook, tmp_path: Path, more: str) -> None:
    """A table follows the run. The button ends it with a checkpoint and the call that continues it, also a second time;
    in the end the kernel trains on to the last step. The view worker of a peer is no victim of the signal."""
    imported = (
        "from ray_dmml import Config, train\nconfig = Config.load('long.yaml', {'cohort.peers.1.num_workers': 1})"
    )
    assert notebook.run(imported)[2] == ""
    steps = [0]
    for cell in (f"train(config, 'run'{more});", f"train(resume='run'{more});"):
        printed, shown, error = notebook.run(cell, stop_when=has_steps)
        assert "data      imagefolder: train 30 images" in printed
        assert "stopping after this step, with a checkpoint" in printed and "view worker" not in printed
        assert "peer0" in shown and "peer1" in shown
        stopped = re.fullmatch(
            rf"KeyboardInterrupt: stopped at step (\d+) of 100000; train\(resume='run'{more}\) continues the run", error
        )
        assert stopped is not None, error
        steps.append(int(stopped[1]))
        assert RunDir.open(tmp_path / "run").checkpoints.load("last").step == steps[-1] > steps[-2]
        assert f"{steps[-1]}/100000" in shown
    end = f"config.with_overrides({{'train.steps': {steps[-1] + 2}}})"
    printed, shown, error = notebook.run(f"results = train({end}, resume='run'{more})\nresults['step']")
    assert error == "" and f"{steps[-1] + 2}/{steps[-1] + 2}" in shown
    assert RunDir.open(tmp_path / "run").results() is not None

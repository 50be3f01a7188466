"""Search loss weights and diversities, then train the best trial and the baseline again.

    python experiments/tune_diversity.py [OPTIONS]

It is the same as `ray-dmml tune`. Without arguments it runs on the built-in data.
"""

import typer

from ray_dmml import interruption
from ray_dmml.cli.tune import tune

if __name__ == "__main__":
    interruption.watch()
    typer.run(tune)

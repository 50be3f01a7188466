"""Search loss weights and diversities, then train the best setting and the config as it is anew.

    python experiments/tune_diversity.py [OPTIONS]

The same as `ray-dmml tune`; with no argument it runs on the built-in data.
"""

import typer

from ray_dmml.cli.main import tune

if __name__ == "__main__":
    typer.run(tune)

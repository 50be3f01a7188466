"""``python -m ray_dmml.cli`` is the command ``ray-dmml``."""

from ray_dmml.cli.main import main

if __name__ == "__main__":  # Processes that Python spawns import this module again.
    main()

"""``python -m ray_dmml.cli`` is the command ``ray-dmml``."""

from ray_dmml import interruption


def main() -> None:
    """The entry point. The imports of the command take time, in which a signal may come."""
    interruption.watch()
    from ray_dmml.cli.main import main as run_command

    run_command()


if __name__ == "__main__":  # Processes that Python spawns import this module again.
    main()

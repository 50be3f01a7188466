"""``ray-dmml config``"""

from ray_dmml.cli.options import ConfigFile, Overrides
from ray_dmml.cli.output import user_errors


def config(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """Print the effective config as YAML, with the meaning of each setting."""
    with user_errors():
        from ray_dmml.config.document import documented_yaml
        from ray_dmml.config.loading import QUICKSTART
        from ray_dmml.config.parts import load_parts
        from ray_dmml.config.schema import Config

        settings = Config.load(config or QUICKSTART, overrides or ())
        load_parts(settings)
        print(documented_yaml(settings), end="")

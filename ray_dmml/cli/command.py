"""How every command reads its arguments: plain help texts, and hints for options that are settings."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup


class _PlainHelp:
    """Shows no type for an option that takes no value; typer writes `<bool>`."""

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return params


class Group(_PlainHelp, TyperGroup):
    """A command that has commands."""


class Command(_PlainHelp, TyperCommand):
    """A command. Its message for an unknown option or argument says how settings are given."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # typer's own classes of errors differ from version to version
            message = str(getattr(error, "message", ""))
            takes_settings = any(param.name == "overrides" for param in self.params)
            if takes_settings and type(error).__name__ == "NoSuchOption":
                from ray_dmml.config.messages import hint
                from ray_dmml.config.schema import Config  # building the models takes a third of `ray-dmml --help`

                name = str(getattr(error, "option_name", "")).strip("-").replace("-", "_")
                found = hint(name, Config)
                error.message = f"{message}. Settings are given as --set KEY=VALUE{f'; {found}' if found else ''}"  # type: ignore[attr-defined]
            elif takes_settings and "extra argument" in message:
                error.message = f"{message}. A config is given as --config FILE, a setting as --set KEY=VALUE"  # type: ignore[attr-defined]
            raise
